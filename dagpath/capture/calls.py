"""The calls of a model that a trace looks at: with other numbers of examples, and with other lengths."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dagpath.capture.alike import Ways, alike
from dagpath.capture.dry_run import Place, Record
from dagpath.capture.graph import CapturedGraph
from dagpath.capture.running import run
from dagpath.capture.sizes import (
    Dim,
    batch_sizes,
    common_batch,
    larger,
    neighbours,
    other_lengths,
    resized,
    shapes_text,
    smaller,
    with_batch,
    without_values,
)
from dagpath.errors import CaptureError

MANY = 13
"""A number of examples that few models have as a size."""

_FAR = (515, 512, 131, 128)
"""Sizes beyond most of those that code compares a size with."""

_FAR_IN_LOOPS = (67, 64)
"""For models that take a number of steps that depends on the size, since a dry run takes them all."""

_UNCHECKED = ("embedding_bag", "segment_reduce", "sparse")
"""Parts of the names of PyTorch's operations that do not look whether the indices that they are given are in range."""

_MOST_CALLS = 1500
"""A dry run far beyond the examples is given up after so many calls of functions, or twice those of the examples."""

_NEAR = (1, 2, 3)
"""The smallest sizes that a model may take."""

DryRun = Callable[..., Record | None]


@dataclass(frozen=True, eq=False)
class Call:
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

    def trains(self) -> bool:
        """May train mode be looked at in this call? A batch norm does not train on one example."""
        return common_batch(self.inputs) != 1

    def has_rows(self) -> bool:
        """Have the outputs as many rows as the inputs, as far as the dry run knows?"""
        outputs = self.record.calls[-1].leaves if self.record is not None and self.record.is_clear else []
        places = [place for place in outputs if isinstance(place, Place) and place.shape]
        return all(place.shape[0] == common_batch(self.inputs) for place in places)


def _is_unchecked(target: Any) -> bool:
    """Does an operation not look whether its indices are in range? Some of PyTorch's, and those of other libraries."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    is_pytorchs = target.namespace in ("aten", "prim", "prims")
    return not is_pytorchs or any(part in target.__name__ for part in _UNCHECKED)


def has_unchecked(graph: CapturedGraph) -> bool:
    """Has a graph an operation that does not look whether the indices that it is given are in range?"""
    return any(_is_unchecked(node.target) for node in graph.module.graph.nodes)


class _UncheckedError(Exception):
    """An operation does not check its arguments."""


class _OnlyChecked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops before an operation that does not check its arguments: some of PyTorch's, and all of other libraries."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_unchecked(func):
            raise _UncheckedError(str(func))
        return func(*args, **(kwargs or {}))


class Calls:
    """Finds the calls to look at.

    Args:
        model: the model.
        given: its example inputs.
        more: further example inputs.
        has_values: has the model values?
    """

    def __init__(self, model: nn.Module, given: Any, more: Sequence[Any], has_values: bool) -> None:
        self._model, self._given, self._more, self._has_values = model, given, more, has_values
        self._batch = common_batch(given)

    def runs(self, inputs: Any, training: bool | None) -> bool | None:
        """Does the model take these inputs, values and all? Indices among them may be out of range.

        None where this cannot be tried: the model has no values, is not on the CPU, or runs an operation that does not
        check its indices. Such an operation may end the process.
        """
        if not self._has_values or any(parameter.device.type != "cpu" for parameter in self._model.parameters()):
            return None
        try:
            with _OnlyChecked():  # type: ignore[no-untyped-call]
                run(self._model, inputs, training=training)
        except CaptureError as error:
            # where PyTorch has no modes that take operators of a higher order (cond), these fail, and say their kind
            is_untried = isinstance(error.__cause__, _UncheckedError) or "HigherOrderOperator" in str(error.__cause__)
            return None if is_untried else False
        return True

    def taken(self, dry_run: DryRun, training: bool) -> list[Call]:
        """The call with one example, that with the inputs as given, and those with other numbers of examples, with
        other lengths, and with further examples: those that the model takes.

        Args:
            dry_run: makes dry runs of the model.
            training: in train mode?
        """
        found: dict[str, Call] = {}

        def look_at(inputs: Any, sizes: Mapping[Dim, int]) -> None:
            name = f"a call with inputs of the sizes {shapes_text(inputs)}"
            if inputs is self._given or (name not in found and self._is_taken(inputs, dry_run, training)):
                found.setdefault(name, Call(inputs, name, dry_run(inputs), sizes))

        look_at(with_batch(self._given, 1), {})
        look_at(self._given, {})
        for sizes in self._other_sizes(dry_run, training):
            look_at(resized(self._given, sizes), sizes)
        for sizes in (*self._apart(list(found.values()), dry_run), *self._turns(list(found.values()), dry_run)):
            look_at(resized(self._given, sizes), sizes)
        further = enumerate(self._more, 1)
        return [
            *found.values(),
            *(Call(inputs, f"further example {number}", dry_run(inputs)) for number, inputs in further),
        ]

    def _other_sizes(self, dry_run: DryRun, training: bool) -> Iterator[Mapping[Dim, int]]:
        """Larger, neighbouring and smaller sizes."""
        given, batch = self._given, self._batch or 1
        tells = dry_run(with_batch(given, 1)) is not None or dry_run(given) is not None

        def takes(inputs: Any) -> bool:
            record = dry_run(inputs)
            known = None if tells and (record is None or record.is_clear) else self.runs(inputs, training)
            return record is not None if known is None else known

        many, few = (MANY, *larger(batch)), (2, *smaller(batch))
        grown: dict[Dim, int] | None = None
        for sizes, batches in ((larger, many), (neighbours, few), (smaller, few)):
            candidates = [batch_sizes(given, size) for size in batches if size != self._batch]
            base = next((chosen for chosen in candidates if chosen and takes(resized(given, chosen))), {})
            if sizes is neighbours and not grown:
                continue  # what takes no larger size takes none next to it
            lengths = grown = other_lengths(resized(given, base), sizes, takes)
            whole = {**base, **lengths}
            yield base
            if self._is_taken(resized(given, whole), dry_run, training):
                yield whole
            else:  # the dry run took sizes that the model does not take: each kind of them alone
                leaves = pytree.tree_leaves(given)
                before = {dim: leaves[dim[0]].shape[dim[1]] for dim in lengths}
                for size in set(before.values()):
                    yield {**base, **{dim: n for dim, n in lengths.items() if before[dim] == size}}

    def _apart(self, calls: Sequence[Call], dry_run: DryRun) -> Iterator[Mapping[Dim, int]]:
        """Sizes of dimensions that are equal in the example and differ here, if calls with these are other ones.

        Tall images and wide ones, sequences of two lengths. Where the calls of other sizes differ already, nothing is
        claimed of these.
        """
        leaves = pytree.tree_leaves(self._given)
        batch, records = batch_sizes(self._given, 1).keys(), [call.record for call in calls]
        longest = max((call.sizes for call in calls if call.sizes.keys() - batch), key=_total, default={})
        if not all(alike(records[0], record) for record in records):
            return
        by_size: dict[int, list[Dim]] = {}
        for dim in longest.keys() - batch:
            by_size.setdefault(leaves[dim[0]].shape[dim[1]], []).append(dim)
        for dims in by_size.values():
            for first in sorted(dims)[:: max(1, len(dims) - 1)] if len(dims) > 1 else ():
                sizes = {dim: size for dim, size in longest.items() if dim not in dims or dim == first}
                record = dry_run(without_values(self._given, sizes))
                if record is not None and not any(alike(known, record) for known in records):
                    yield sizes

    def _turns(self, calls: Sequence[Call], dry_run: DryRun) -> Iterator[Mapping[Dim, int]]:
        """The sizes from which on, upwards or downwards, the model does something that it does in none of these calls.

        Dry runs of inputs that are much larger, and of the smallest ones that the model takes, tell.
        """
        given = batch_sizes(self._given, self._batch or 1)
        longer = [call.sizes for call in calls if call.sizes.keys() - given.keys()]
        for dims, base in ((given.keys(), given), *((sizes.keys() - given.keys(), sizes) for sizes in longer[-1:])):
            if dims:
                yield from self._turn(dims, base, calls, dry_run)

    def _turn(
        self, dims: Set[Dim], base: Mapping[Dim, int], calls: Sequence[Call], dry_run: DryRun
    ) -> Iterator[Mapping[Dim, int]]:
        """The sizes in these dimensions, next to those of ``base``, with which the model does something else.

        Where the calls of other sizes are alike, something else is what is like none of them; where they differ, it is
        another way through the code.
        """
        least, records = min(base[dim] for dim in dims), [call.record for call in calls]
        ways = Ways(records)
        are_alike = all(alike(records[0], call.record) for call in calls if dims & call.sizes.keys())
        any_empty = any(known.is_empty() for known in records if known is not None)
        most_calls = max(_MOST_CALLS, 2 * max((len(known.calls) for known in records if known is not None), default=0))

        def sizes(size: int) -> dict[Dim, int]:
            return {**base, **{dim: size + base[dim] - least for dim in dims}}

        def record(size: int) -> Record | None:
            return dry_run(without_values(self._given, sizes(size)), most_calls)

        def turns(size: int) -> bool:
            found = record(size)
            if found is None or not found.is_clear or (found.is_empty() and not any_empty):
                return False  # an image that is too small for its crop, say, has no neurons
            return not any(alike(known, found) for known in records) if are_alike else found not in ways

        larger_ones = [size for size in (_FAR_IN_LOOPS if ways.loops else _FAR) if size > least]
        smaller_ones = [size for size in _NEAR if size < least]
        for trials in (larger_ones, smaller_ones):
            outside = next((size for size in trials if record(size) is not None), None)
            if outside is None or not turns(outside):
                continue
            inside = least
            while abs(outside - inside) > 1:
                middle = (inside + outside) // 2
                inside, outside = (inside, middle) if turns(middle) else (middle, outside)
            yield sizes(outside)

    def _is_taken(self, inputs: Any, dry_run: DryRun, training: bool) -> bool:
        """Does the model take these inputs, values and all? A dry run knows of no index that is out of range."""
        record = dry_run(inputs)
        known = True if alike(dry_run(self._given), record) else self.runs(inputs, training)
        return record is not None if known is None else known


def _total(sizes: Mapping[Dim, int]) -> int:
    return sum(sizes.values())


def once(dry_run: DryRun) -> DryRun:
    """The same function, which makes one dry run for inputs of the same sizes."""
    known: dict[tuple[Any, ...], Record | None] = {}

    def run_once(inputs: Any, most_calls: int | None = None) -> Record | None:
        leaves, structure = pytree.tree_flatten(inputs)
        key = shapes_text(inputs), repr([leaf for leaf in leaves if not isinstance(leaf, Tensor)]), structure
        if key not in known:
            known[key] = dry_run(inputs, most_calls)
        return known[key]

    return run_once


def plain_arguments(model: nn.Module, given: Any) -> dict[str, str]:
    """Name -> text of the arguments that are neither tensors nor None: code decides by them, so they are constants."""
    args, kwargs = given
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments  # as the exporter does
    return {
        f"{name}{pytree.keystr(path)}": reprlib.repr(leaf)
        for name, argument in arguments.items()
        for path, leaf in pytree.tree_flatten_with_path(argument)[0]
        if leaf is not None and not isinstance(leaf, Tensor)
    }
