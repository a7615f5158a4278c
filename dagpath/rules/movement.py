"""Data movement: every entry of the output is an entry of an input (or zero). The operation itself is the rule."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.passes.constants import NotConstantError
from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import PathFlow
from dagpath.passes.values import (
    FIXED,
    ZERO,
    Call,
    Operand,
    Weight,
    compact,
    expanded,
    is_scaleless,
    leaves,
    mapped,
    plain,
)
from dagpath.rules.base import Operation, Unknown, register

_MOVED = Unknown("is moved by values that depend on the input")


class Movement(Operation):
    """Data movement: neurons, parameters and paths move as the operation moves values.

    Tensors of integers or booleans beside what is moved say where it goes. Where those depend on the input of the
    model, the methods that are called ``chosen_...`` answer.
    """

    moves_weights = True

    @staticmethod
    def move(call: Call, convert: Callable[[Any], Any]) -> Any:
        """Run the operation on what ``convert`` makes of its arguments.

        A kernel that knows no integers gets float64 in their place, exact to 2**53.
        """
        converted = call.converted(convert)
        try:
            return converted.run()
        except (NotImplementedError, RuntimeError):
            if not all(map(is_index, converted.leaves(Tensor))):
                raise
            moved = converted.converted(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf).run()
            return mapped(moved, Tensor, lambda tensor: tensor.long())

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if is_index(call.output):
            return flow.constant(call.output)
        try:
            known = with_indices(call, flow.real_node)
        except NotConstantError:
            return self.chosen_neurons(flow, call)
        if known.leaves(Weight) and not known.leaves(Tensor):
            moved = self.move(known, lambda leaf: flow.elements(leaf) if isinstance(leaf, Weight) else leaf)
            return mapped(moved, Tensor, lambda elements: Weight(elements.shape, elements=elements))
        return mapped(self.move(known, flow.activation), Tensor, expanded)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        if is_index(call.output):
            return flow.moved(call, self.move) if call.target is operator.getitem else flow.barrier(call)
        try:
            known = with_indices(call, flow.real_node)
        except NotConstantError:
            return self.chosen_paths(flow, call)
        return flow.moved(known, self.move)

    def chosen_neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return _MOVED.neurons(flow, call)

    def chosen_paths(self, flow: PathFlow, call: Call) -> Any:
        return flow.barrier(call)


class SameValues(Operation):
    """Another layout, type or device: nothing moves."""

    moves_weights = True

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return call.args[0]

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return call.args[0] if call.output.is_floating_point() else flow.barrier(call)


class ShapedLike(Operation):
    """The first tensor in the shape of the second, of which nothing else is used."""

    moves_weights = True

    def __init__(self, expands: bool) -> None:
        self.expands = expands

    def _shaped(self, tensor: Tensor, call: Call) -> Tensor:
        return tensor.expand(call.output.shape) if self.expands else tensor.reshape(call.output.shape)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        value = call.args[0]
        if isinstance(value, Weight):
            return Weight(call.output.shape, elements=self._shaped(flow.elements(value), call))
        return self._shaped(value, call)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return flow.placed(call.args[0], functools.partial(self._shaped, call=call))


class Concatenate(Movement):
    """Concatenation: data movement along one axis."""

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
    """Padding: zeros and infinities are right under any scale; another value is a constant."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if call.get("mode", "constant") != "constant":
            return super().neurons(flow, call)
        fill = ZERO if is_scaleless(call.get("value") or 0) else FIXED
        return torch.nn.functional.pad(flow.activation(call["input"]), call["pad"], value=fill)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        if call.get("mode", "constant") != "constant" or (call.get("value") or 0) == 0:
            return super().paths(flow, call)
        fill = flow.operand(call["value"], "value")
        return flow.moved(Call(_padded, (call["input"], fill, call["pad"]), {}, call.node), self.move)


def _padded(x: Tensor, fill: Tensor, pad: list[int]) -> Tensor:
    """Padding by an entry of another tensor."""
    inside = torch.nn.functional.pad(torch.ones_like(x), pad) > 0
    return torch.where(inside, torch.nn.functional.pad(x, pad), fill)


class ZeroFill(Movement):
    """Data movement that leaves zeros, which are right under any scale, where nothing arrives.

    Numbers move shifted by one, so that zero becomes ZERO.
    """

    moves_weights = False

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if call.leaves(Weight):
            return Unknown().neurons(flow, call)
        return self.move(call, lambda leaf: leaf - ZERO if isinstance(leaf, Tensor) else leaf) + ZERO


def is_index(value: Any) -> bool:
    """Is it a tensor of integers or booleans?"""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def with_indices(call: Call, real_node: Callable[[fx.Node], Any]) -> Call:
    """The call with its integer and boolean tensors replaced by their values, out of sight of the flow.

    Raises:
        NotConstantError: the values depend on the input of the model.
    """
    if not any(is_index(node.meta.get("val")) for node in call.node.all_input_nodes):
        return call

    def known(argument: Any) -> Any:
        is_known = isinstance(argument, fx.Node) and is_index(argument.meta.get("val"))
        return _Known(real_node(argument)) if is_known else argument

    def target(*args: Any, **kwargs: Any) -> Any:
        moved = leaves((args, kwargs), Tensor)
        device = moved[0].device if moved else torch.device("cpu")  # numbers of neurons are there
        args, kwargs = mapped((args, kwargs), _Known, lambda leaf: leaf.value.to(device))
        return call.target(*args, **kwargs)

    nodes, named = fx.node.map_arg((call.node.args, call.node.kwargs), known)
    args, kwargs = pytree.tree_map(
        lambda node, value: node if isinstance(node, _Known) else value,
        (list(nodes), dict(named)),
        (list(call.args), call.kwargs),
        is_leaf=lambda leaf: isinstance(leaf, (_Known, fx.Node, Weight, Operand, Tensor)) or leaf is None,
    )
    return Call(target, tuple(args), kwargs, call.node)


class _Known:
    """A tensor of constants among neuron numbers."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Inspection(Operation):
    """Looks at a tensor's type or shape and returns none."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return flow.constant(call.output)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return call.output


class Copy(Operation):
    """A copy of the second argument in the shape of the first."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return flow.activation(call["src"]).expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return flow.placed(call["src"], lambda x: x.expand(call.output.shape))


class Filled(Operation):
    """A tensor of one number; zeros and infinities are right under any scale."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def _fill(self, call: Call) -> float | None:
        return self.value if self.value is not None else plain(call.get("fill_value", call.get("value")))

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return flow.constant(call.output) + (ZERO if is_scaleless(self._fill(call)) else FIXED)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        name = "fill_value" if "fill_value" in call.arguments else "value"
        return flow.placed(flow.operand(self._fill(call), name), lambda x: x.expand(call.output.shape))


register(
    Movement(),
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes", "movedim"),
    *("squeeze", "unsqueeze", "expand", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
    *("tensor_split", "stack", "roll", "flip", "repeat", "tile", "getitem", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "native_channel_shuffle", "repeat_interleave", "diagonal", "unfold"),
    *("broadcast_to", "numpy_T", "mT", "adjoint", "rot90", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "swapdims", "ravel", "slice_scatter", "select_scatter", "diagonal_scatter"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "atleast_1d"),
    *("atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "hstack", "vstack", "dstack", "unsafe_split"),
    *("unsafe_chunk", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d"),
    *("replication_pad2d", "replication_pad3d", "squeeze_copy", "unsafe_split_with_sizes"),
)
register(ShapedLike(expands=False), "view_as", "reshape_as")
register(ShapedLike(expands=True), "expand_as")
register(
    SameValues(),
    *("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy", "lift_fresh", "float"),
    *("double", "half"),
)
register(Concatenate(), "cat", "concat", "concatenate")
register(ConstantPad(), "pad", "constant_pad_nd")
register(ZeroFill(), "im2col", "tril", "triu", "diag_embed")
register(Unknown("is read as another type"), "view.dtype")
register(
    Inspection(),
    *("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_size", "sym_numel"),
    *("sym_constrain_range_for_size", "sym_stride"),
)
register(Copy(), "copy")
register(Filled(0.0), "zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty")
register(Filled(1.0), "ones", "ones_like", "new_ones")
register(Filled(), "full", "full_like", "new_full", "fill.Scalar")
