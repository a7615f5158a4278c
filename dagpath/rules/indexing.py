"""Entries that indices choose, and that are added where indices say: by constants, or by the input of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.constants import NotConstantError
from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import Gate, PathFlow
from dagpath.passes.values import FIXED, Call, Operand, Weight, expanded, plain
from dagpath.rules.base import Operation, register
from dagpath.rules.movement import Movement

_CHOSEN = "a choice by values that depend on the input"
_ADDED = "entries that are added where values that depend on the input say"
_INDEX = torch.ops.aten.index.Tensor


class Index(Movement):
    """Indexing. Where the input of the model chooses, the entries that it may choose share a scale.

    To paths such a choice is a sum, as a maximum is: every entry has a path to each place that may choose it.
    """

    def chosen_neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x, dims = call["input"], self._dims(call)
        if dims is None:
            return super().chosen_neurons(flow, call)
        if isinstance(x, Weight):
            sizes = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
            shared = flow.fresh(math.prod(sizes), x).view(sizes)
            flow.use(x, shared, torch.tensor(FIXED))
        else:
            shared = flow.mix(x, dims, _CHOSEN)
        return expanded(self._taken(call, shared.expand(x.shape), [0] * len(dims)))

    def chosen_paths(self, flow: PathFlow, call: Call) -> Any:
        x, dims = call["input"], self._dims(call)
        if dims is None:
            return super().chosen_paths(flow, call)
        ways = list(itertools.product(*(range(x.shape[dim]) for dim in dims)))

        def rows(entries: Tensor) -> Tensor:
            return torch.stack([self._taken(call, entries, way) for way in ways], -1)

        def is_taken(real: Call) -> Tensor:
            places = torch.arange(x.shape.numel()).view(x.shape)
            found = real.run(lambda leaf: places if leaf is real["input"] else leaf)
            taken: Tensor = rows(places) == found[..., None]
            return taken

        def total(entries: Tensor) -> Tensor:
            sums = (entries.sum(dims, keepdim=True) if dims else entries).expand(entries.shape)
            return self._taken(call, sums, [0] * len(dims))

        return flow.reduced(x, call.output.shape, rows, gate=Gate(is_taken), total=total)

    @staticmethod
    def _dims(call: Call) -> list[int] | None:
        """The dimensions along which indices choose; None where masks do."""
        ndim = len(call["input"].shape)
        if call.target is not _INDEX:
            dim = call["dim"]
            return list(range(ndim)) if dim is None else [dim % ndim] if ndim else []
        indices = call.node.args[1]
        if any(node is not None and node.meta["val"].dtype in (torch.bool, torch.uint8) for node in indices):  # type: ignore[union-attr]
            return None
        return [dim for dim, node in enumerate(indices) if node is not None]  # type: ignore[arg-type]

    @staticmethod
    def _taken(call: Call, x: Tensor, way: Sequence[int]) -> Tensor:
        """The call on these entries, with indices that all choose the entry at one place along their dimensions."""
        if call.target is _INDEX:
            left = iter(way)
            shapes = [None if index is None else tuple(index.shape) for index in call.args[1]]
            filled = [None if shape is None else torch.full(shape, next(left), device=x.device) for shape in shapes]
            taken: Tensor = _INDEX(x, filled)
            return taken
        strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.ndim)] if call["dim"] is None else [1]
        place = sum(at * stride for at, stride in zip(way, strides, strict=True))

        def convert(leaf: Any) -> Any:
            if leaf is call["input"]:
                return x
            is_index = isinstance(leaf, (Tensor, Operand))
            return torch.full(tuple(leaf.shape), place, device=x.device) if is_index else leaf

        result: Tensor = call.run(convert)
        return result


class IndexAdd(Operation):
    """Entries along a dimension that are added to those of another tensor where indices say: those share a scale."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x, source, dim = flow.activation(call["input"]), flow.activation(call["source"]), call["dim"]
        try:
            index = self._index(flow, call)
        except NotConstantError:
            shared = flow.mix(x, [dim % x.ndim], _ADDED), flow.mix(source, [dim % source.ndim], _ADDED)
            return flow.join(*shared, _ADDED).expand(call.output.shape)
        result = x.clone()
        order = index.argsort(stable=True)
        turn = torch.arange(len(order)) - torch.searchsorted(index[order], index[order])
        for nth in range(int(turn.max()) + 1 if len(turn) else 0):  # the n-th that is added to each entry
            places = order[turn == nth]
            dst = index[places]
            more = source.index_select(dim, places)
            added = flow.join(result.index_select(dim, dst), more, "a sum", plain(call.get("alpha", 1)) or 1.0)
            result.index_copy_(dim, dst, added.expand(more.shape))
        return expanded(result)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        x, source, shape, dim = call["input"], call["source"], call.output.shape, call["dim"]
        axis, rows = dim % max(1, len(shape)), shape[dim] if shape else 1
        alpha = plain(call.get("alpha", 1))
        try:
            index = self._index(flow, call)
        except NotConstantError:
            added = flow.reduced(
                source,
                shape,
                lambda entries: (entries if shape else entries[None]).movedim(axis, -1).unsqueeze(axis),
                gate=Gate(
                    lambda real: _one_hot_rows(real["index"], rows, len(shape) - axis - 1),
                    (rows, *[1] * (len(shape) - axis - 1), call["index"].shape.numel()),
                ),
                total=lambda entries: entries.sum(dim, keepdim=True),
            )
        else:
            added = flow.reduced(
                source,
                shape,
                lambda entries: entries,
                lambda entries: entries.index_select(axis, index),
                total=lambda entries: entries.new_zeros(shape).index_add(dim, index.to(entries.device), entries),
            )
        return flow.sum(shape, [(x, 1.0), (added, 1.0 if alpha is None else alpha)])

    @staticmethod
    def _index(flow: Any, call: Call) -> Tensor:
        value: Tensor = flow.real_node(call.node.args[2])
        return value.to("cpu", torch.int64)


def _one_hot_rows(index: Tensor, rows: int, others: int) -> Tensor:
    """1 where an entry of the index is the number of the row: [rows, 1 ..., entries], with so many ones between."""
    return (index.reshape(1, -1) == torch.arange(rows)[:, None]).view(rows, *[1] * others, -1)


register(Index(), "index", "index_select", "gather", "take_along_dim")
register(IndexAdd(), "index_add")
