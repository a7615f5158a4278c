"""Which calls of a model a trace looks at, and which of them need a graph of their own.

One call is not the model. It is also called with other numbers of examples, with other lengths, in train mode, and once
more after it left something behind. Dry runs tell which of these calls are provably alike; of each other one there is a
graph, and where two graphs tie neurons in different ways, the neurons keep their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dagpath.capture.alike import alike, same
from dagpath.capture.causes import check_model
from dagpath.capture.dry_run import Place, Record, dry_runs
from dagpath.capture.export import export, quiet
from dagpath.capture.faithful import check_faithful
from dagpath.capture.graph import CapturedGraph, outputs_have_batch
from dagpath.capture.running import capture_error, headline, mode_text, run, user_line
from dagpath.capture.sizes import (
    Dim,
    batch_sizes,
    common_batch,
    copies,
    larger,
    neighbours,
    num_entries,
    other_lengths,
    resized,
    smaller,
    with_batch,
)
from dagpath.distributed import has_all_values
from dagpath.errors import CaptureError
from dagpath.reach import Reach
from dagpath.state import GradMode, has_mixed_modes, mode, parameters_kept, without_autocast

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
        not_captured: calls that the model takes and that could not be captured, in words.
        sizes: other sizes of dimensions of the inputs that the model takes too, one for each call with them.
        written: names of the parameters that a call writes to.
    """

    eval: CapturedGraph
    train: CapturedGraph | None
    others: tuple[CapturedGraph, ...]
    train_others: tuple[CapturedGraph, ...]
    train_failure: str
    covers: tuple[str, ...]
    not_captured: tuple[str, ...] = ()
    sizes: tuple[Mapping[Dim, int], ...] = ()
    written: tuple[str, ...] = ()

    @property
    def graphs(self) -> list[CapturedGraph]:
        """All graphs, the eval graph first."""
        return [graph for graph in (self.eval, self.train, *self.others, *self.train_others) if graph is not None]

    def buffers_read(self) -> dict[str, Tensor]:
        """Buffer name -> tensor, for the buffers that any graph reads."""
        return {name: graph.tensors[node.name] for graph, node, name in self._readers()}

    def tables(self) -> dict[str, Tensor]:
        """Buffer name -> a copy of it, for those of which the neurons may depend: all but running statistics."""
        statistics: dict[str, bool] = {}
        for _, node, name in self._readers():
            are = all("_norm" in str(user.target) and node in user.args[3:5] for user in node.users)
            statistics[name] = are and statistics.get(name, True)
        return {name: t.detach().clone() for name, t in self.buffers_read().items() if not statistics[name]}

    def _readers(self) -> Iterator[tuple[CapturedGraph, fx.Node, str]]:
        for graph in self.graphs:
            for node in graph.module.graph.nodes:
                if node.users and node.name in graph.buffers:
                    yield graph, node, graph.buffers[node.name]


@dataclass(frozen=True, eq=False)
class _Call:
    """A call to look at.

    Attributes:
        inputs: its inputs.
        name: what it is in words.
        record: its dry run; None where that fails.
        sizes: in which sizes the inputs differ from those that were given.
    """

    inputs: Any
    name: str
    record: Record | None
    sizes: Mapping[Dim, int] = field(default_factory=dict)


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
    with quiet(), mode(model, None), parameters_kept(model) as written:
        captured = _Survey(model, given, more, is_compound, agree).captured()
    return replace(captured, written=tuple(written))


_CALLS_IN_A_ROW = 10
"""Calls in a row that are looked at where one leaves something behind: most counters are small."""

_MOST_LATER = 4
"""Of these, as many are captured that are like no earlier one."""


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
        self._trained = given
        self._train_leaves: tuple[str, ...] = ()
        self._in_a_row = 1
        self._rows: list[Record | None] = []
        self._not_captured: list[str] = []

    def captured(self) -> Capture:
        with dry_runs(self._model, training=False) as dry_run:
            calls = self._calls(_once(dry_run), training=False)
        graph, first = self._first_graph(calls)
        if self._has_values:
            check_faithful(graph, self._model, first.inputs)
        graphs = self._graphs([call for call in calls if not alike(first.record, call.record)], first, training=False)
        graphs += self._without_gradients(calls)
        if has_mixed_modes(self._model):
            graphs += self._mixed_graphs(calls)
        train, train_graphs, failure = self._train_graphs(graph, calls)
        if graph.leaves:
            graphs += self._later_calls(first.inputs, training=False)
        if self._train_leaves:
            train_graphs += self._later_calls(self._trained, training=True)
            graphs += self._in_other_mode(self._trained, training=True)
        if graph.leaves:
            train_graphs += self._in_other_mode(self._trained, training=False)
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

    def _calls(self, dry_run: Callable[[Any], Record | None], training: bool) -> list[_Call]:
        """The call with one example, that with the inputs as given, and those with other numbers of examples, with
        other lengths, and with further examples: those that the model takes.
        """
        given, one = self._given, with_batch(self._given, 1)
        tells = dry_run(one) is not None or dry_run(given) is not None

        def takes(inputs: Any) -> bool:
            record = dry_run(inputs)
            if (tells and (record is None or record.is_clear)) or not self._may_run():
                return record is not None
            return self._runs(inputs, training)

        trials: list[Mapping[Dim, int]] = [{}]
        many, few = (MANY, *larger(self._batch or 1)), (2, *smaller(self._batch or 1))
        grown: dict[Dim, int] | None = None
        for sizes, batches in ((larger, many), (neighbours, few), (smaller, few)):
            candidates = [batch_sizes(given, batch) for batch in batches if batch != self._batch]
            base = next((chosen for chosen in candidates if chosen and takes(resized(given, chosen))), {})
            if sizes is neighbours and not grown:
                continue  # what takes no larger size takes none next to it
            lengths = grown = other_lengths(resized(given, base), sizes, takes)
            whole = {**base, **lengths}
            trials.append(base)
            if self._is_taken(given, resized(given, whole), dry_run, training):
                trials.append(whole)
            else:  # the dry run took sizes that the model does not take: each kind of them alone
                leaves = pytree.tree_leaves(given)
                before = {dim: leaves[dim[0]].shape[dim[1]] for dim in lengths}
                kinds = [{dim: n for dim, n in lengths.items() if before[dim] == size} for size in set(before.values())]
                trials += [{**base, **kind} for kind in kinds]
        inputs = [one, *(resized(given, trial) if trial else given for trial in trials)]
        found: dict[str, _Call] = {}
        for tried, changed in zip(inputs, [{}, *trials], strict=True):
            if tried is given or (_text(tried) not in found and self._is_taken(given, tried, dry_run, training)):
                found.setdefault(_text(tried), _Call(tried, _text(tried), dry_run(tried), changed))
        further = enumerate(self._more, 1)
        return [
            *found.values(),
            *(_Call(inputs, f"further example {number}", dry_run(inputs)) for number, inputs in further),
        ]

    def _is_taken(self, given: Any, inputs: Any, dry_run: Callable[[Any], Record | None], training: bool) -> bool:
        """Does the model take these inputs, values and all? A dry run knows of no index that is out of range."""
        record = dry_run(inputs)
        if alike(dry_run(given), record):
            return True
        return self._runs(inputs, training) if self._may_run() else record is not None

    def _runs(self, inputs: Any, training: bool | None) -> bool:
        """Does the model take these inputs? With its values where it has them, since indices may be out of range."""
        try:
            run(self._model, inputs, training=training, dry=not self._has_values)
        except CaptureError:
            return False
        return True

    def _first_graph(self, calls: Sequence[_Call]) -> tuple[CapturedGraph, _Call]:
        """The graph of one example where the model treats examples alike, else of the inputs as given; and its call."""
        first = calls[0]
        batches = [call for call in calls if set(call.sizes) <= set(batch_sizes(self._given, 1))]
        if common_batch(first.inputs) == 1 and all(map(_has_rows, batches)):
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
        call: _Call,
        batch: int | None = None,
        training: bool | None = False,
        grad_mode: GradMode = torch.enable_grad,
    ) -> list[CapturedGraph]:
        """The graph of a call; none where it cannot be captured, which is remembered if the model takes the call."""
        options: dict[str, Any] = {"batch": batch, "call": call.name, "grad_mode": grad_mode}
        try:
            return [export(self._model, call.inputs, training, self._is_compound, **options)]
        except Exception:
            if not self._may_run() or self._runs(call.inputs, training):
                self._not_captured.append(f"{call.name} in {mode_text(training)}" if training else call.name)
            return []

    def _graphs(self, calls: Sequence[_Call], first: _Call | None, training: bool | None) -> list[CapturedGraph]:
        """The graphs of calls, but for the first one."""
        found = []
        for call in calls:
            if any(call.inputs is inputs for inputs in self._more):
                found.append(self._required(call, training))
            elif call is not first:
                found += self._exported(call, training=training)
        return found

    def _required(self, call: _Call, training: bool | None) -> CapturedGraph:
        try:
            return export(self._model, call.inputs, training, self._is_compound, None, call.name)
        except Exception as failure:
            run(self._model, call.inputs, training=training, dry=not self._has_values)
            raise capture_error(self._model, failure) from failure

    def _may_run(self) -> bool:
        """May the model be run with any indices? (It has values, and on a GPU one out of range ends the process.)"""
        return self._has_values and all(parameter.device.type == "cpu" for parameter in self._model.parameters())

    def _later_calls(self, inputs: Any, training: bool) -> list[CapturedGraph]:
        """The graphs of the calls after one that leaves something behind, where they are others."""
        if not self._has_values:
            return []
        modes = [training] * _CALLS_IN_A_ROW
        with dry_runs(self._model, training) as dry_run:
            records = dry_run.in_a_row(inputs, modes)
        numbers = []
        for number, record in enumerate(records[1:], 1):  # the second one may read other values than the first did
            known = self._rows if number == 1 else [records[0], *self._rows]
            if (number == 1 or _is_clear(record)) and not any(same(record, other) for other in known):
                numbers.append(number)
                self._rows.append(record)
        looked = max(2, sum(map(_is_clear, records)))
        looked = numbers[_MOST_LATER] if len(numbers) > _MOST_LATER else looked
        self._in_a_row = looked if self._in_a_row == 1 else min(looked, self._in_a_row)  # of both modes
        found = [self._after(modes[:number], training, inputs) for number in numbers[:_MOST_LATER]]
        return [graph for graph in found if graph is not None]

    def _in_other_mode(self, inputs: Any, training: bool) -> list[CapturedGraph]:
        """The graph of the call in the other mode that follows, if it is another one than without the call before."""
        if not self._has_values:
            return []
        with dry_runs(self._model, not training) as dry_run:
            record = dry_run.in_a_row(inputs, [training, not training])[1]
            if any(same(record, other) for other in [dry_run(inputs), *self._rows]):
                return []
        graph = self._after([training], not training, inputs)
        return [] if graph is None else [graph]

    def _after(self, modes: Sequence[bool], training: bool, inputs: Any) -> CapturedGraph | None:
        """The graph of a call after others with the same inputs.

        Args:
            modes: the modes of those before.
            training: that of the call.
            inputs: of each call.
        """
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        with mode(self._model, training), without_autocast():
            before = Reach(self._model)
            for earlier in modes:
                self._model.train(earlier)
                args, kwargs = copies(inputs)
                with torch.no_grad():
                    self._model(*args, **kwargs)
            self._model.train(training)
            made = Reach(self._model).left_since(before).values()
            call = _ordinal(len(modes) + 1), [*made], names
            try:
                return export(self._model, inputs, training, self._is_compound, None, *call)
            except Exception as failure:
                if len(names) != len(list(self._model.parameters())):
                    return None  # the first call made parameters, which no model has before it
                if training or modes != [False]:
                    self._not_captured.append(f"{_ordinal(len(modes) + 1)} in {mode_text(training)}")
                    return None
                raise capture_error(self._model, failure) from failure

    def _without_gradients(self, calls: Sequence[_Call]) -> list[CapturedGraph]:
        """The graphs of the calls that record no gradients, where they are others."""
        found: list[CapturedGraph] = []
        known: list[Record | None] = []
        asks = any(call.record is not None and call.record.asks_for_gradients for call in calls)
        for call in calls if asks else [calls[0], *(call for call in calls[1:] if call.inputs is self._given)]:
            if not _is_clear(call.record):
                name = f"{call.name} in torch.no_grad"
                found += self._exported(replace(call, name=name), grad_mode=torch.no_grad)
                continue
            for grad_mode in (torch.inference_mode, torch.no_grad):  # in the first of these, gradients are off too
                with dry_runs(self._model, training=False, grad_mode=grad_mode) as dry_run:
                    record = dry_run(call.inputs)
                if same(record, call.record):
                    break
                if not any(same(record, other) or alike(record, other) for other in known):
                    known.append(record)
                    name = f"{call.name} in torch.{grad_mode.__name__}"
                    found += self._exported(replace(call, name=name), grad_mode=grad_mode)
        return found

    def _mixed_graphs(self, calls: Sequence[_Call]) -> list[CapturedGraph]:
        """The graph of the model with its modules in the modes that they are in."""
        call = next(call for call in calls if call.inputs is self._given or _text(call.inputs) == _text(self._given))
        with dry_runs(self._model, training=None) as dry_run:
            if same(dry_run(call.inputs), call.record):
                return []
        return self._exported(replace(call, name="a call in the modes that its modules are in"), training=None)

    def _train_graphs(
        self, graph: CapturedGraph, calls: Sequence[_Call]
    ) -> tuple[CapturedGraph | None, list[CapturedGraph], str]:
        """Graphs of train mode where it makes other calls than eval mode, and why there are none."""
        batch = 2 if graph.batch == 1 else None  # a batch norm does not train on one example
        inputs = self._trained = with_batch(self._given, batch)
        with dry_runs(self._model, training=True) as dry_run:
            first = dry_run(inputs)
            self._train_leaves = () if first is None else first.changes
            training = [call for call in calls if _trains(call)] or calls
            telling = [call for call in training if _tells(call, training)]
            if all(same(dry_run(call.inputs), call.record) for call in telling):
                return None, [], ""
            calls = self._calls(_once(dry_run), training=True)  # it may take other sizes
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
        if not _is_clear(first):
            self._train_leaves = trained.leaves
        apart = [call for call in calls if not alike(first, call.record)]
        return trained, self._graphs(apart, None, training=True), ""

    def _covers(self, graph: CapturedGraph, calls: Sequence[_Call]) -> tuple[str, ...]:
        lines, anything = [], graph.batch == 1
        captured = [call for call in calls if call.name not in self._not_captured]
        if anything:
            lines.append("any number n of examples: the model treats each one alike")
        elif self._batch is not None:
            tried = sorted({batch for call in captured if (batch := common_batch(call.inputs)) is not None})
            lines.append(f"sizes of dimension 0 that were looked at ({', '.join(map(str, tried))})")
        other = [call for call in captured if set(call.sizes) - set(batch_sizes(self._given, 1))]
        if other:
            by_size = sorted(other, key=lambda call: num_entries(with_batch(call.inputs, 1)))
            looked = "; ".join(dict.fromkeys(_shapes(call.inputs, anything) for call in by_size))
            lines.append(f"inputs of other sizes too; looked at: {looked}")
        else:
            lines.append(f"inputs of the size {_shapes(self._given, anything)} alone: the model took no other one")
        if self._more:
            lines.append("the further examples: " + "; ".join(_shapes(inputs) for inputs in self._more))
        leaves = dict.fromkeys((*graph.leaves, *self._train_leaves))
        if leaves:
            looked = f"the first {self._in_a_row} calls" if self._in_a_row > 1 else "the first call"
            more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
            text = f"{', '.join([*leaves][:3])}{more}"
            lines.append(f"{looked} alone: a call changes {text}, which later calls may read")
        if self._not_captured:
            names = [name.removeprefix("a ") for name in dict.fromkeys(self._not_captured)]
            lines.append(f"no {' and no '.join(names)}, which could not be captured")
        return tuple(lines)


def _once(dry_run: Callable[[Any], Record | None]) -> Callable[[Any], Record | None]:
    """The same function, which makes one dry run for inputs of the same sizes."""
    known: dict[tuple[Any, ...], Record | None] = {}

    def run_once(inputs: Any) -> Record | None:
        leaves, structure = pytree.tree_flatten(inputs)
        key = _shapes(inputs), repr([leaf for leaf in leaves if not isinstance(leaf, Tensor)]), structure
        if key not in known:
            known[key] = dry_run(inputs)
        return known[key]

    return run_once


def _trains(call: _Call) -> bool:
    """May train mode be looked at in this call? A batch norm does not train on one example."""
    return common_batch(call.inputs) != 1


def _tells(call: _Call, calls: Sequence[_Call]) -> bool:
    """Is the call not provably like a later one of these?"""
    return not any(alike(call.record, other.record) for other in calls[calls.index(call) + 1 :])


def _is_clear(record: Record | None) -> bool:
    return record is not None and record.is_clear


def _ordinal(number: int) -> str:
    return f"a {['first', 'second', 'third'][number - 1] if number < 4 else f'{number}th'} call"


def _has_rows(call: _Call) -> bool:
    """Have the outputs as many rows as the inputs, as far as the dry run knows?"""
    outputs = call.record.calls[-1].leaves if call.record is not None and call.record.is_clear else []
    return all(
        place.shape[0] == common_batch(call.inputs) for place in outputs if isinstance(place, Place) and place.shape
    )


def _text(inputs: Any) -> str:
    return f"a call with inputs of the sizes {_shapes(inputs)}"


def _shapes(inputs: Any, any_batch: bool = False) -> str:
    """The shapes of inputs; with n for their number of examples, if it may be any."""
    batch = set(batch_sizes(inputs, 1)) if any_batch else set()
    leaves = enumerate(pytree.tree_leaves(inputs))
    shapes = [
        ["n" if (position, dim) in batch else str(size) for dim, size in enumerate(leaf.shape)]
        for position, leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    return ", ".join(f"[{', '.join(shape)}]" for shape in shapes)
