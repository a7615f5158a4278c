"""Which calls of a model a trace looks at, and which of them need a graph of their own.

One call is not the model. It is also called with other numbers of examples, with other lengths, in train mode, and once
more after it left something behind. Dry runs tell which of these calls are provably alike; of each other one there is a
graph, and where two graphs tie neurons in different ways, the neurons keep their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dagpath.capture.alike import alike, same
from dagpath.capture.calls import Call, Calls, has_unchecked, once, plain_arguments
from dagpath.capture.causes import check_inputs, check_model
from dagpath.capture.dry_run import dry_runs, is_clear
from dagpath.capture.export import export, quiet
from dagpath.capture.faithful import check_faithful
from dagpath.capture.graph import Capture, CapturedGraph, outputs_have_batch
from dagpath.capture.rows import Rows
from dagpath.capture.running import capture_error, headline, mode_text, run, user_line
from dagpath.capture.sizes import (
    batch_sizes,
    common_batch,
    num_entries,
    shapes_text,
    with_batch,
)
from dagpath.errors import CaptureError
from dagpath.runtime.distributed import has_all_values
from dagpath.runtime.kept import overlaps
from dagpath.runtime.reach import Reach
from dagpath.runtime.state import GradMode, Setting, has_mixed_modes, mode, parameters_kept


def survey(
    model: nn.Module,
    given: Any,
    more: Sequence[Any],
    is_compound: Callable[[Any], bool],
    agree: Callable[[CapturedGraph, CapturedGraph], bool],
) -> Capture:
    """Look at the calls of a model, and capture those that the others are not provably like.

    Where dimension 0 of the example inputs is the batch, the eval graph is that of one example, to which a path
    belongs. Inputs that the model does not take in other numbers, or does not treat alike, are used as given.

    Args:
        model: the model.
        given: its example inputs, positional and by keyword.
        more: further example inputs.
        is_compound: operations for which this holds are replaced by those that PyTorch makes them of.
        agree: do two graphs join the same elements of parameters to the same neurons?

    Raises:
        CaptureError: the model's forward raised, or no graph stands for it.
    """
    check_model(model)
    check_inputs((given, *more))
    if common_batch(given) == 0:
        given = with_batch(given, 1)  # no example tells nothing
    with quiet(), mode(model, None), parameters_kept(model) as written:
        captured = _Survey(model, given, more, is_compound, agree).captured()
    return replace(captured, written=tuple(written), pinned=_pinned(model))


def _pinned(model: nn.Module) -> dict[str, str]:
    """Name -> what ties their ends, of the parameters that code can read as numbers."""
    memories = Reach(model).memories
    read = [name for name, parameter in model.named_parameters() if any(overlaps(parameter, m) for m in memories)]
    return {name: f"an array of numbers whose memory {name} shares" for name in read}


class _Survey:
    def __init__(
        self,
        model: nn.Module,
        given: Any,
        more: Sequence[Any],
        is_compound: Callable[[Any], bool],
        agree: Callable[[CapturedGraph, CapturedGraph], bool],
    ) -> None:
        self._model, self._given, self._more, self._is_compound, self._agree = model, given, more, is_compound, agree
        self._batch = common_batch(given)
        self._has_values = has_all_values(model)
        self._calls = Calls(model, given, more, self._has_values)
        self._trained = given
        self._leaves: dict[Setting, tuple[str, ...]] = {}
        self._rows: Rows | None = None
        self._families: list[list[Call]] = []
        self._names = Reach(model).names
        self._own_train = any(type(module).train is not nn.Module.train for module in model.modules())
        self._not_captured: list[str] = []

    def captured(self) -> Capture:
        with dry_runs(self._model, training=False) as dry_run:
            calls = self._calls.taken(once(dry_run), training=False)
        graph, first = self._first_graph(calls)
        if not graph.leaves and first.record is not None:
            graph = replace(graph, leaves=first.record.changes)
        if self._has_values:
            try:
                check_faithful(graph, self._model, first.inputs, is_made_up=False)
            except CaptureError:
                run(self._model, self._given, training=False)  # if these are refused too, the message is about them
                raise
        graphs = self._graphs([call for call in calls if not alike(first.record, call.record)], first, training=False)
        graphs += self._without_gradients(calls, training=False)
        if has_mixed_modes(self._model) or self._own_train:  # its own train may drop what it keeps
            graphs += self._mixed_graphs(calls)
        train, train_graphs, failure = self._train_graphs(graph, calls)
        self._leaves[Setting(False)] = graph.leaves
        if self._has_values:
            inputs = {setting: self._trained if setting.training else first.inputs for setting in self._leaves}
            others = self._other_inputs(calls, first) if self._may_run_others(graph) else []
            self._rows = Rows(self._model, self._is_compound, inputs, others)
            for leaving in [setting for setting, leaves in self._leaves.items() if leaves]:
                for setting, later in self._rows.after(leaving).items():
                    (train_graphs if setting.training else graphs).extend(later)
            self._not_captured += self._rows.not_captured
        self._others = [*([train] if train is not None else []), *graphs, *train_graphs]
        return Capture(
            graph,
            train,
            tuple(graphs),
            tuple(train_graphs),
            failure,
            self._covers(graph, calls),
            tuple(dict.fromkeys(self._not_captured)),
            tuple(call.sizes for call in calls if call.sizes),
        )

    def _other_inputs(self, calls: Sequence[Call], first: Call) -> list[Any]:
        """The inputs of a call with another number of examples, and of one with another length."""
        others = [call for call in calls if call.sizes and shapes_text(call.inputs) != shapes_text(first.inputs)]
        by_batch = {common_batch(call.inputs): call.inputs for call in reversed(others)}
        return [*by_batch.values()][-2:]

    def _may_run_others(self, graph: CapturedGraph) -> bool:
        """May the model be run on inputs that are made up? Indices out of range can end the process, or the device."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._model.parameters())
        return self._has_values and on_cpu and not has_unchecked(graph)

    def _first_graph(self, calls: Sequence[Call]) -> tuple[CapturedGraph, Call]:
        """The graph of one example where the model treats examples alike, else of the inputs as given; and its call."""
        first = calls[0]
        batches = [call for call in calls if set(call.sizes) <= set(batch_sizes(self._given, 1))]
        if common_batch(first.inputs) == 1 and all(call.has_rows() for call in batches):
            apart = [call for call in batches if call is not first and not alike(first.record, call.record)]
            for graph in self._exported(first, batch=1):
                others = [self._exported(call) for call in apart[:2]]
                if outputs_have_batch(graph, 1) and all(other and self._agree(graph, *other) for other in others):
                    return replace(graph, call=""), first
        try:
            given = next(call for call in calls if call.inputs is self._given)
            return export(self._model, self._given, False, self._is_compound), given
        except Exception as failure:  # export raises many types
            run(self._model, self._given, training=False, dry=not self._has_values)
            raise capture_error(self._model, failure) from failure

    def _exported(
        self,
        call: Call,
        batch: int | None = None,
        training: bool | None = False,
        grad_mode: GradMode = torch.enable_grad,
    ) -> list[CapturedGraph]:
        """The graph of a call; none where it cannot be captured, which is remembered if the model takes the call."""
        options: dict[str, Any] = {"batch": batch, "call": call.name, "grad_mode": grad_mode}
        try:
            graph = export(self._model, call.inputs, training, self._is_compound, **options)
        except Exception:
            if self._calls.runs(call.inputs, training) is not False:
                self._not_captured.append(f"{call.name} in {mode_text(training)}" if training else call.name)
            return []
        if self._may_run_others(graph) or (self._has_values and call.inputs is self._given):
            check_faithful(graph, self._model, call.inputs, training, grad_mode)
        return [graph]

    def _graphs(self, calls: Sequence[Call], first: Call | None, training: bool | None) -> list[CapturedGraph]:
        """The graphs of calls, but for the first one."""
        found = []
        for call in calls:
            if any(call.inputs is inputs for inputs in self._more):
                found.append(self._required(call, training))
            elif call is not first:
                found += self._exported(call, training=training)
        return found

    def _required(self, call: Call, training: bool | None) -> CapturedGraph:
        try:
            return export(self._model, call.inputs, training, self._is_compound, None, call.name)
        except Exception as failure:
            run(self._model, call.inputs, training=training, dry=not self._has_values)
            raise capture_error(self._model, failure) from failure

    def _without_gradients(self, calls: Sequence[Call], training: bool) -> list[CapturedGraph]:
        """The graphs of the calls that record no gradients, where they are others."""
        found: list[CapturedGraph] = []
        asks = any(call.record is not None and call.record.asks_for_gradients for call in calls)
        chosen = calls if asks else [calls[0], *(call for call in calls[1:] if call.inputs is self._given)]
        before = {call.name: call.record for call in calls}
        known = [call.record for call in calls]
        for call in chosen:
            if not is_clear(call.record):
                named = replace(call, name=f"{call.name} in torch.no_grad")
                found += self._exported(named, training=training, grad_mode=torch.no_grad)
        for grad_mode in (torch.inference_mode, torch.no_grad):  # in the first of these, gradients are off too
            with dry_runs(self._model, training, grad_mode) as dry_run:
                if asks:
                    looked = self._calls.taken(once(dry_run), training)
                    self._families.append(looked)
                else:
                    looked = [replace(call, record=dry_run(call.inputs)) for call in chosen if is_clear(call.record)]
            if asks and looked[0].record is not None:
                self._leaves[Setting(training, grad_mode)] = looked[0].record.changes
            others = [call for call in looked if not same(call.record, before.get(call.name))]
            others = [call for call in others if is_clear(before.get(call.name, call.record))]
            for call in others:
                if not any(same(call.record, other) or alike(call.record, other) for other in known):
                    known.append(call.record)
                    named = replace(call, name=f"{call.name} in torch.{grad_mode.__name__}")
                    found += self._exported(named, training=training, grad_mode=grad_mode)
            if not asks and not others:
                break
        return found

    def _mixed_graphs(self, calls: Sequence[Call]) -> list[CapturedGraph]:
        """The graph of the model with its modules in the modes that they are in."""
        call = next(
            call for call in calls if call.inputs is self._given or shapes_text(call.inputs) == shapes_text(self._given)
        )
        with dry_runs(self._model, training=None) as dry_run:
            if same(dry_run(call.inputs), call.record):
                return []
        return self._exported(replace(call, name="a call in the modes that its modules are in"), training=None)

    def _train_graphs(
        self, graph: CapturedGraph, calls: Sequence[Call]
    ) -> tuple[CapturedGraph | None, list[CapturedGraph], str]:
        """Graphs of train mode where it makes other calls than eval mode, and why there are none."""
        batch = 2 if graph.batch == 1 else None  # a batch norm does not train on one example
        inputs = self._trained = with_batch(self._given, batch)
        with dry_runs(self._model, training=True) as dry_run:
            first = dry_run(inputs)
            self._leaves[Setting(True)] = () if first is None else first.changes
            in_eval = {call.name: call.record for call in calls}
            training = [call for call in calls if call.trains()] or calls
            telling = [call for call in training if _tells(call, training)]
            is_as_eval = all(same(dry_run(call.inputs), call.record) for call in telling)
            if is_as_eval and "training" not in self._names:
                return None, [], ""
            calls = self._calls.taken(once(dry_run), training=True)  # it may take other sizes
        others = [call for call in calls if call.trains() or is_clear(call.record)]
        if is_as_eval and all(same(call.record, in_eval.get(call.name)) for call in others):
            return None, self._without_gradients(calls, training=True), ""
        self._families.append(calls)
        trained, failure = None, None
        for chosen, size in ((inputs, batch), (self._given, None)):
            try:
                trained = export(self._model, chosen, True, self._is_compound, size)
                break
            except Exception as error:
                failure = error
        if trained is None:
            assert failure is not None
            return None, [], f"{headline(failure)} {user_line(failure)}".strip()
        if self._has_values:
            check_faithful(trained, self._model, chosen, True)
        norms = {name for name, part in self._model.named_modules() if isinstance(part, _NormBase)}
        written = [place for place in trained.leaves if place.rpartition(".")[0] not in norms]  # statistics tie nothing
        self._leaves[Setting(True)] = tuple(dict.fromkeys((*self._leaves[Setting(True)], *written)))
        apart = [call for call in calls if not alike(first, call.record)]
        return trained, self._graphs(apart, None, training=True) + self._without_gradients(calls, training=True), ""

    def _covers(self, graph: CapturedGraph, calls: Sequence[Call]) -> tuple[str, ...]:
        captured = [call for call in calls if call.name not in self._not_captured]
        batch = set(batch_sizes(self._given, 1))
        longer = [call for call in captured if set(call.sizes) - batch]
        shortest = [call for call in captured if call not in longer]
        numbers = {common_batch(call.inputs) for call in shortest}
        families = [calls, *self._families]
        anything = graph.batch == 1 and len(numbers) > 1
        anything = anything and all(_are_alike([c for c in each if not set(c.sizes) - batch]) for each in families)
        lines = []
        if anything:
            lines.append("any number n of examples: the model treats each one alike")
        elif self._batch is not None:
            tried = sorted({number for call in captured if (number := common_batch(call.inputs)) is not None})
            lines.append(f"sizes of dimension 0 that were looked at ({', '.join(map(str, tried))})")
        by_size = sorted(longer, key=lambda call: num_entries(with_batch(call.inputs, 1)))
        looked = "; ".join(dict.fromkeys(shapes_text(call.inputs, anything) for call in by_size))
        shapes = shapes_text(self._given, anything)
        if not longer:
            lines.append(f"inputs of the size {shapes} alone: the model took no other one")
        elif all(_are_alike(each) for each in ([captured[0], *longer], *self._families)):
            lines.append(f"inputs of other sizes too; looked at: {looked}")
        else:
            lines.append(f"inputs of the sizes {shapes}; {looked} alone: calls of other sizes differ")
        chosen = dict.fromkeys(line for each in (graph, *self._others) for line in each.chosen)
        if chosen:
            lines.append(
                f"values that choose as many entries as those of the example: other numbers of them are not looked at "
                f"({'; '.join(list(chosen)[:3])})"
            )
        plain = plain_arguments(self._model, self._given)
        if plain:
            lines.append(f"the arguments {', '.join(f'{name}={value}' for name, value in plain.items())} as given")
        if self._more:
            lines.append("the further examples: " + "; ".join(shapes_text(inputs) for inputs in self._more))
        leaves = dict.fromkeys(place for places in self._leaves.values() for place in places)
        if leaves:
            number = 1 if self._rows is None else self._rows.looked
            looked = f"the first {number} calls in one mode and size" if number > 1 else "the first call"
            looked += ", and one of another mode or size after these," if number > 1 else ""
            more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
            text = f"{', '.join([*leaves][:3])}{more}"
            lines.append(f"{looked} alone: a call changes {text}, which later calls may read")
        if self._not_captured:
            names = [name.removeprefix("a ") for name in dict.fromkeys(self._not_captured)]
            lines.append(f"no {' and no '.join(names)}, which could not be captured")
        return tuple(lines)


def _are_alike(calls: Sequence[Call]) -> bool:
    """Is it certain that one graph stands for all of these calls?"""
    return all(alike(calls[0].record, call.record) for call in calls)


def _tells(call: Call, calls: Sequence[Call]) -> bool:
    """Is the call not provably like a later one of these?"""
    return not any(alike(call.record, other.record) for other in calls[calls.index(call) + 1 :])
