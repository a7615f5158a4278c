"""Calls in a row: what one call leaves behind, the next one reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dagpath.capture.alike import same
from dagpath.capture.dry_run import Record, dry_runs, is_clear
from dagpath.capture.export import export
from dagpath.capture.graph import CapturedGraph
from dagpath.capture.running import capture_error, mode_text
from dagpath.capture.sizes import copies
from dagpath.runtime.reach import Reach
from dagpath.runtime.state import Setting, mode, switch, without_autocast

_CALLS_IN_A_ROW = 10
"""Calls in a row that are looked at where one leaves something behind: most counters are small."""

_MOST_LATER = 4
"""Of these, as many are captured that are like no earlier one."""

_BEFORE = (1, 2, _CALLS_IN_A_ROW - 1)
"""After so many calls in one setting, one in another is looked at."""


class Rows:
    """Captures the calls that follow others, where they are others than the first ones.

    Args:
        model: the model.
        is_compound: operations for which this holds are replaced by those that PyTorch makes them of.
        settings: how the model is called, with its inputs.
        others: inputs of other sizes.

    Attributes:
        looked: how many calls in a row were looked at, in each setting in which one leaves something behind.
        not_captured: calls that could not be captured, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        is_compound: Callable[[Any], bool],
        settings: Mapping[Setting, Any],
        others: Sequence[Any],
    ) -> None:
        self._model, self._is_compound, self._settings, self._others = model, is_compound, settings, others
        self._known: list[Record | None] = []
        self.looked = 1
        self.not_captured: list[str] = []

    def after(self, setting: Setting) -> dict[Setting, list[CapturedGraph]]:
        """For each setting, the graphs of the calls in it that follow calls in the given setting."""
        found = {setting: [*self._in_one_setting(setting), *self._in_other_sizes(setting)]}
        for other in self._settings:
            if other != setting:
                found[other] = self._in_another_setting(setting, other)
                found[setting] += self._back_in(setting, other)
        return found

    def _in_one_setting(self, setting: Setting) -> list[CapturedGraph]:
        inputs = self._settings[setting]
        with dry_runs(self._model, setting.training, setting.grad_mode) as dry_run:
            records = dry_run.in_a_row([(inputs, setting)] * _CALLS_IN_A_ROW)
        numbers = []
        for number, record in enumerate(records[1:], 1):  # the second one may read other values than the first did
            known = self._known if number == 1 else [records[0], *self._known]
            if (number == 1 or is_clear(record)) and not any(same(record, other) for other in known):
                numbers.append(number)
                self._known.append(record)
        looked = max(2, sum(map(is_clear, records)))
        looked = numbers[_MOST_LATER] if len(numbers) > _MOST_LATER else looked
        self.looked = looked if self.looked == 1 else min(looked, self.looked)
        call = inputs, setting
        found = [self._captured([call] * number, call) for number in numbers[:_MOST_LATER]]
        return [graph for graph in found if graph is not None]

    def _in_another_setting(self, setting: Setting, other: Setting) -> list[CapturedGraph]:
        found: list[CapturedGraph | None] = []
        inputs = self._settings[setting if setting.training else other]
        for number in _BEFORE:
            with dry_runs(self._model, other.training, other.grad_mode) as dry_run:
                record = dry_run.in_a_row([(inputs, setting)] * number + [(inputs, other)])[-1]
                if (number > 1 and not is_clear(record)) or any(
                    same(record, known) for known in [dry_run(inputs), *self._known]
                ):
                    continue
            self._known.append(record)
            found.append(self._captured([(inputs, setting)] * number, (inputs, other)))
        return [graph for graph in found if graph is not None]

    def _back_in(self, setting: Setting, other: Setting) -> list[CapturedGraph]:
        """The call in one setting after one in it and one in another: training after a validation."""
        inputs = self._settings[setting if setting.training else other]
        with dry_runs(self._model, setting.training, setting.grad_mode) as dry_run:
            record = dry_run.in_a_row([(inputs, setting), (inputs, other), (inputs, setting)])[-1]
            if not is_clear(record) or any(same(record, known) for known in [dry_run(inputs), *self._known]):
                return []
        self._known.append(record)
        graph = self._captured([(inputs, setting), (inputs, other)], (inputs, setting))
        return [] if graph is None else [graph]

    def _in_other_sizes(self, setting: Setting) -> list[CapturedGraph]:
        """The calls after one of another size."""
        found: list[CapturedGraph | None] = []
        given = self._settings[setting], setting
        for other in ((inputs, setting) for inputs in self._others):
            for row in ([given, other], [given, other, given], [given, other, other]):
                with dry_runs(self._model, setting.training, setting.grad_mode) as dry_run:
                    records = dry_run.in_a_row(row)
                    if (len(row) > 2 and not is_clear(records[-1])) or any(
                        same(records[-1], known) for known in [dry_run(row[-1][0]), *records[:-1], *self._known]
                    ):
                        continue
                if self._takes(row):
                    self._known.append(records[-1])
                    found.append(self._captured(row[:-1], row[-1]))
        return [graph for graph in found if graph is not None]

    def _takes(self, row: Sequence[tuple[Any, Setting]]) -> bool:
        """Does the model take these calls, one after the other?"""
        try:
            with mode(self._model, None), without_autocast():
                self._make(row)
        except Exception:  # what one call left behind may not fit to inputs of another size
            return False
        return True

    def _make(self, calls: Sequence[tuple[Any, Setting]]) -> None:
        asks = len({setting.grad_mode for setting in self._settings}) > 1
        for inputs, setting in calls:
            switch(self._model, setting.training)
            args, kwargs = copies(inputs)
            with setting.grad_mode() if asks else torch.no_grad():
                self._model(*args, **kwargs)

    def _captured(self, before: Sequence[tuple[Any, Setting]], call: tuple[Any, Setting]) -> CapturedGraph | None:
        """The graph of a call after others.

        Args:
            before: the inputs of those before, and how they are made.
            call: its own inputs, and how it is made itself.
        """
        inputs, setting = call
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        with mode(self._model, setting.training), without_autocast():
            reach = Reach(self._model)
            self._make(before)
            switch(self._model, setting.training)
            made = Reach(self._model).left_since(reach).values()
            options = _ordinal(len(before) + 1), [*made], names, setting.grad_mode
            try:
                return export(self._model, inputs, setting.training, self._is_compound, None, *options)
            except Exception as failure:
                if len(names) != len(list(self._model.parameters())):
                    return None  # the first call made parameters, which no model has before it
                is_of_one_size = all(earlier is inputs for earlier, _ in before)
                if setting != Setting(False) or len(before) > 1 or before[0][1] != setting or not is_of_one_size:
                    which = _ordinal(len(before) + 1) + (" of another size" if not is_of_one_size else "")
                    self.not_captured.append(f"{which} in {mode_text(setting.training)}")
                    return None
                raise capture_error(self._model, failure) from failure


def _ordinal(number: int) -> str:
    return f"a {['first', 'second', 'third'][number - 1] if number < 4 else f'{number}th'} call"
