"""Which calls of a model a trace looks at, and which of them need a graph of their own.

One call is not the model. It is also called with other numbers of examples, with other lengths, in train mode, and once
more after it left something behind. Dry runs tell which of these calls are provably alike; of each other one there is a
graph, and where two graphs tie neurons in different ways, the neurons keep their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagpath.alike import alike, same
from dagpath.capture import (
    CapturedGraph,
    capture_error,
    check_model,
    export,
    headline,
    outputs_have_batch,
    run,
    user_line,
)
from dagpath.distributed import has_all_values
from dagpath.dry_run import Record, dry_runs
from dagpath.errors import CaptureError
from dagpath.reach import Reach
from dagpath.sizes import common_batch, copies, larger, other_lengths, resized, smaller, with_batch
from dagpath.state import mode, without_autocast

MANY = 13
"""A number of examples that few models have as a size."""


@dataclass(frozen=True)
class Capture:
    """The graphs of a model.

    Attributes:
        eval: the eval graph.
        train: the train graph; None where it puts the same constraints on scales, or cannot be captured.
        others: graphs of further calls in eval mode: other sizes, further examples, a second call.
        train_others: those in train mode.
        train_failure: why train mode cannot be captured; empty if it can.
        covers: what the trace holds for, a line each.
    """

    eval: CapturedGraph
    train: CapturedGraph | None
    others: tuple[CapturedGraph, ...]
    train_others: tuple[CapturedGraph, ...]
    train_failure: str
    covers: tuple[str, ...]

    @property
    def graphs(self) -> list[CapturedGraph]:
        """All graphs, the eval graph first."""
        return [graph for graph in (self.eval, self.train, *self.others, *self.train_others) if graph is not None]


@dataclass(frozen=True)
class _Call:
    """A call to look at: its inputs, what it is in words, and its dry run."""

    inputs: Any
    name: str
    record: Record | None = None


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
    return _Survey(model, given, more, is_compound, agree).captured()


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
        self._covers: list[str] = []

    def captured(self) -> Capture:
        with dry_runs(self._model, training=False) as dry_run:
            one = with_batch(self._given, 1)
            first = _Call(one, "", dry_run(one))
            whole = first if one is self._given else _Call(self._given, "", dry_run(self._given))
            calls = self._other_calls(whole, dry_run)
        graph = self._first_graph(first, whole, calls)
        base = first if graph.batch == 1 else whole
        apart = [call for call in calls if not alike(base.record, call.record)]
        if base is whole and whole is not first and not alike(whole.record, first.record):
            apart.append(replace(first, name=_text(first.inputs)))
        others = self._graphs(apart, training=False)
        if graph.leaves_state:
            others += self._second_call(base)
        train, train_others, failure = self._train_graphs(graph, whole, calls)
        return Capture(graph, train, tuple(others), tuple(train_others), failure, tuple(self._covers))

    def _other_calls(self, whole: _Call, dry_run: Callable[[Any], Record | None]) -> list[_Call]:
        """Calls with other numbers of examples and other lengths, and with further examples."""

        def takes(inputs: Any) -> bool:
            return dry_run(inputs) is not None if whole.record is not None else self._runs(inputs)

        given = whole.inputs
        trials = [with_batch(given, MANY)] if self._batch is not None else []
        for sizes, batch in ((larger, MANY), (smaller, 2)):
            lengths = other_lengths(given, sizes, takes)
            if lengths:
                trials.append(with_batch(resized(given, lengths), batch))
        found = [_Call(inputs, _text(inputs), dry_run(inputs)) for inputs in trials if takes(inputs)]
        further = enumerate(self._more, 1)
        return found + [_Call(inputs, f"further example {number}", dry_run(inputs)) for number, inputs in further]

    def _runs(self, inputs: Any) -> bool:
        """Does the model take these inputs? With its values where it has them, since indices may be out of range."""
        try:
            run(self._model, inputs, training=False, dry=not self._has_values)
        except CaptureError:
            return False
        return True

    def _first_graph(self, first: _Call, whole: _Call, calls: Sequence[_Call]) -> CapturedGraph:
        """The graph of one example where the model treats examples alike, else of the inputs as given."""
        if self._batch is not None and all(alike(first.record, call.record) for call in calls if _has_batch(call)):
            graph = self._exported(first, batch=1)
            if graph is not None and outputs_have_batch(graph, 1):
                return graph
        elif self._batch is not None:
            graph, other = (
                self._exported(first, batch=1),
                self._exported(replace(whole, inputs=with_batch(whole.inputs, 2))),
            )
            if graph is not None and other is not None and outputs_have_batch(graph, 1) and self._agree(graph, other):
                return graph
        try:
            return export(self._model, self._given, False, self._is_compound)
        except Exception as failure:  # export raises many types
            run(self._model, self._given, training=False, dry=not self._has_values)
            raise capture_error(self._model, failure) from failure

    def _exported(self, call: _Call, batch: int | None = None, training: bool = False) -> CapturedGraph | None:
        try:
            return export(self._model, call.inputs, training, self._is_compound, batch, call.name)
        except Exception:  # a call that cannot be captured is none that others are compared with
            return None

    def _graphs(self, calls: Sequence[_Call], training: bool) -> list[CapturedGraph]:
        """The graphs of calls that no other graph stands for."""
        found = []
        for call in calls:
            further = any(call.inputs is inputs for inputs in self._more)
            if further:
                found.append(self._required(call, training))
            elif not self._on_cpu() or self._runs(call.inputs):
                graph = self._exported(call, training=training)
                if graph is not None:
                    found.append(graph)
        return found

    def _required(self, call: _Call, training: bool) -> CapturedGraph:
        try:
            return export(self._model, call.inputs, training, self._is_compound, None, call.name)
        except Exception as failure:
            run(self._model, call.inputs, training=training, dry=not self._has_values)
            raise capture_error(self._model, failure) from failure

    def _on_cpu(self) -> bool:
        """Has the model values that may be run with any indices? (On a GPU, one out of range ends the process.)"""
        return self._has_values and all(parameter.device.type == "cpu" for parameter in self._model.parameters())

    def _second_call(self, call: _Call) -> list[CapturedGraph]:
        """The graph of the call after this one, which reads what this one leaves behind."""
        if not self._has_values:
            return []
        args, kwargs = call.inputs
        with mode(self._model, training=False), without_autocast(), torch.no_grad():
            before = Reach(self._model)
            self._model(*copies(args), **copies(kwargs))
            made = Reach(self._model).left_since(before).values()
            try:
                return [export(self._model, call.inputs, False, self._is_compound, None, "a second call", [*made])]
            except Exception as failure:
                raise capture_error(self._model, failure) from failure

    def _train_graphs(
        self, graph: CapturedGraph, whole: _Call, calls: Sequence[_Call]
    ) -> tuple[CapturedGraph | None, list[CapturedGraph], str]:
        """Graphs of train mode where it makes other calls than eval mode, and why there are none."""
        batch = 2 if graph.batch == 1 else None  # a batch norm does not train on one example
        call = replace(whole, inputs=with_batch(whole.inputs, batch))
        with dry_runs(self._model, training=True) as dry_run:
            records = [dry_run(other.inputs) for other in calls]
            if calls and all(same(record, other.record) for record, other in zip(records, calls, strict=True)):
                return None, [], ""
            first = dry_run(call.inputs)
        if not calls:
            with dry_runs(self._model, training=False) as dry_run:
                if same(first, dry_run(call.inputs)):
                    return None, [], ""
        trained, failure = None, None
        for inputs, size in ((call.inputs, batch), (self._given, None)):
            try:
                trained = export(self._model, inputs, True, self._is_compound, size)
                break
            except Exception as error:
                failure = error
        if trained is None:
            assert failure is not None
            return None, [], f"{headline(failure)} {user_line(failure)}".strip()
        apart = [other for other, record in zip(calls, records, strict=True) if not alike(first, record)]
        return trained, self._graphs(apart, training=True), ""


def _has_batch(call: _Call) -> bool:
    return common_batch(call.inputs) is not None


def _text(inputs: Any) -> str:
    shapes = [list(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return f"a call with {'an input' if len(shapes) == 1 else 'inputs'} of shape {', '.join(map(str, shapes))}"
