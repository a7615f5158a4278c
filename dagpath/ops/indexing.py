"""Entries that indices choose, and that are added where indices say: by constants, or by the input of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dagpath.flow.constants import NotConstantError
from dagpath.flow.edge_values import Nodes
from dagpath.flow.edges import EdgeFlow, Values, all_places
from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, Call, Mass, Operand, Weight, expanded
from dagpath.ops.base import Operation, register
from dagpath.ops.movement import Movement

_CHOSEN = "a choice by values that depend on the input"
_ADDED = "entries that are added where values that depend on the input say"
_INDEX = torch.ops.aten.index.Tensor


class Index(Movement):
    """Indexing. Where the input of the model chooses, the entries that it may choose share a scale.

    For path masses such a choice is a sum, as a maximum is: every entry has a path to each place that may choose it.
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

    def chosen_mass(self, flow: MassFlow, call: Call) -> Any:
        x, dims = call["input"], self._dims(call)
        if dims is None:
            return super().chosen_mass(flow, call)
        total = (x.values.sum(dims, keepdim=True) if dims else x.values).expand(x.values.shape)
        values = self._taken(call, total, [0] * len(dims))
        return flow.result(call.leaves(Mass), values, x.exponent, layer=x.params and not x.data)

    def chosen_edges(self, flow: EdgeFlow, call: Call) -> Any:
        x, dims = call["input"], self._dims(call)
        if dims is None:
            return super().chosen_edges(flow, call)
        places = all_places(x.shape)
        ways = itertools.product(*(range(x.shape[dim]) for dim in dims))
        taken = torch.stack([self._taken(call, places, way) for way in ways])

        def is_taken(values: Values) -> Tensor:
            real = call.on(values)
            found: Tensor = taken == real.run(lambda leaf: places if leaf is real["input"] else leaf)
            return found

        src = torch.nn.functional.pad(flow.nodes(x).flatten(), (1, 0))[taken]
        slots = flow.slots(taken.shape, is_taken)
        dst = flow.new(call.output.shape)
        flow.connect(dst, src, slots=slots)
        return Nodes(dst, x.params)

    @staticmethod
    def _dims(call: Call) -> list[int] | None:
        """The dimensions along which indices choose; None where masks do."""
        ndim = len(_shape(call["input"]))
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
            indices = [None if i is None else torch.full(_shape(i), next(left), device=x.device) for i in call.args[1]]
            taken: Tensor = _INDEX(x, indices)
            return taken
        strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.ndim)] if call["dim"] is None else [1]
        place = sum(at * stride for at, stride in zip(way, strides, strict=True))

        def convert(leaf: Any) -> Any:
            if leaf is call["input"]:
                return x
            return torch.full(_shape(leaf), place, device=x.device) if isinstance(leaf, (Tensor, Operand)) else leaf

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
            added = flow.join(result.index_select(dim, dst), source.index_select(dim, places), "a sum")
            result.index_copy_(dim, dst, added.expand(source.index_select(dim, places).shape))
        return expanded(result)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        x, source, dim = call["input"], call["source"], call["dim"]
        added = flow.scaled(source, source.values, flow.number(call.get("alpha", 1)))
        exponent = flow.common([x, added])
        values, more = flow.at(x, exponent), flow.at(added, exponent)
        try:
            values = values.index_add(dim, self._index(flow, call).to(more.device), more)
        except NotConstantError:
            values = values + more.sum(dim, keepdim=True)
        return flow.result(call.leaves(Mass), values, exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        x, dim, alpha = call["input"], call["dim"], float(call.get("alpha", 1))
        source = flow.nodes(call["source"])
        shape, axis = call.output.shape, dim % max(1, len(call.output.shape))
        try:
            index, slots = self._index(flow, call), None
        except NotConstantError:
            rows = torch.arange(shape[axis])

            def goes_there(values: Values) -> Tensor:
                real = call.on(values)["index"]
                there: Tensor = real[None, :] == rows[:, None]
                return there.view(len(rows), *[1] * axis, -1, *[1] * (len(shape) - axis - 1)).expand(
                    len(rows), *source.shape
                )

            slots = flow.slots((len(rows), *source.shape), goes_there)
        dst = flow.new(shape)
        flow.add(dst, x)
        if slots is None:
            flow.connect(dst.index_select(axis, index), source, alpha)
        else:
            flow.connect(dst.movedim(axis, 0).unsqueeze(1 + axis), source, alpha, slots)
        return Nodes(dst, call["input"].params or call["source"].params)

    @staticmethod
    def _index(flow: Any, call: Call) -> Tensor:
        value: Tensor = flow.real_node(call.node.args[2])
        return value.to("cpu", torch.int64)


def _shape(operand: Any) -> tuple[int, ...]:
    return tuple(operand.values.shape if isinstance(operand, Mass) else operand.shape)


register(Index(), "index", "index_select", "gather", "take_along_dim")
register(IndexAdd(), "index_add")
