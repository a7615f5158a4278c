"""Data movement: every entry of the output is an entry of an input (or zero). The operation itself is the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, ZERO, Call, Weight, compact
from dagpath.ops.base import Operation, register


def move(call: Call, convert: Callable[[Any], Any]) -> Any:
    """Execute a data movement on integer tensors; kernels that know no integers get float64, exact to 2**53."""
    try:
        return call.run(convert)
    except (NotImplementedError, RuntimeError):
        moved = call.run(lambda leaf: _double(convert(leaf)))
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.long(), moved)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


class Movement(Operation):
    """Neuron numbers, element numbers and masses all move as the operation moves values."""

    moves_weights = True

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if call.leaves(Weight) and not call.leaves(Tensor):
            moved = move(call, lambda leaf: flow.elements(leaf) if isinstance(leaf, Weight) else leaf)
            return pytree.tree_map_only(Tensor, lambda elements: Weight(elements.shape, elements=elements), moved)
        return move(call, flow.activation)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return flow.linear(call)


class SameValues(Operation):
    """The output is the first argument with another layout, type or device: nothing moves."""

    moves_weights = True

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return call.args[0]

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return call.args[0]


class Concatenate(Movement):
    """A movement along one axis: the dimensions that are expanded in all operands stay so."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        values = list(call.args[0])
        axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
        if any(isinstance(value, Weight) for value in values):
            return super().neurons(flow, call)
        values = [value for value in values if value.shape != (0,)]
        axis %= values[0].ndim
        shared = [d for d in range(values[0].ndim) if d != axis and all(v.stride(d) == 0 for v in values)]
        moved = torch.cat([compact(value, shared) for value in values], axis)
        return moved.expand([-1 if d not in shared else values[0].shape[d] for d in range(moved.ndim)])


class ConstantPad(Movement):
    """Padding with zeros adds entries that are right under any scale; another value is a constant."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if call.get("mode", "constant") != "constant":
            return super().neurons(flow, call)
        fill = FIXED if call["value"] else ZERO
        return torch.nn.functional.pad(flow.activation(call["input"]), call["pad"], value=fill)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        value = call.get("value")
        if call.get("mode", "constant") != "constant" or not value:
            return flow.linear(call)
        mass = call["input"]
        exponent = max(mass.exponent, 0)
        values = flow.shifted(mass.values, mass.exponent - exponent)
        fill = float(flow.shifted(flow.power(value), -exponent))
        return flow.result([mass], torch.nn.functional.pad(values, call["pad"], value=fill), exponent)


register(
    Movement(),
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes", "movedim"),
    *("squeeze", "unsqueeze", "expand", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
    *("tensor_split", "stack", "roll", "flip", "repeat", "tile", "getitem", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "native_channel_shuffle", "repeat_interleave", "diagonal", "unfold", "view_as", "reshape_as"),
    *("expand_as", "broadcast_to", "numpy_T", "mT", "adjoint", "rot90", "upsample_nearest1d", "upsample_nearest2d"),
    *(
        "upsample_nearest3d",
        "swapdims",
        "ravel",
        "tril",
        "triu",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "copy",
    ),
)
register(
    SameValues(),
    *("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy", "lift_fresh", "float"),
)
register(Concatenate(), "cat", "concat", "concatenate")
register(ConstantPad(), "pad", "constant_pad_nd")
