"""Linear layers: convolutions and matrix products with a parameter. They make new neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, Call, Mass, Weight, compact
from dagpath.ops.base import Operation, Unknown, register


class Contraction(Operation):
    """``output[j] = Σ_i weight[j, i] · input[i] + bias[j]`` along one axis, the same at all other positions.

    A channel is one neuron: its positions share their weights, so they share a scale. A weight that is not made of
    parameters (a constant, a normalized weight) has no factor to give: it ties the inputs it joins to their outputs.
    """

    def __init__(self, axis: int | None) -> None:
        self.axis = axis

    def _axis(self, call: Call) -> int:
        """The channel axis of the input, counted from the end; None in the constructor means a convolution's."""
        return self.axis if self.axis is not None else 1 - len(call["weight"].shape)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x, weight, bias = flow.activation(call["input"]), call["weight"], call.get("bias")
        groups = call.get("groups", 1)
        axis = self._axis(call)
        if isinstance(weight, Tensor) and (compact(weight) > FIXED).any():
            return Unknown("is multiplied with weights that depend on the input").neurons(flow, call)
        src = flow.per_channel(x, axis, "weights that they share")
        src = src.reshape(groups, -1)
        rows = weight.shape[0]
        if isinstance(weight, Weight):
            dst = flow.fresh(rows, weight)
            joined = src if groups == 1 else src.repeat_interleave(rows // groups, 0)
            ones = [1] * (len(weight.shape) - 2)
            flow.use(weight, dst.view(rows, 1, *ones), joined.view(*joined.shape, *ones))
        else:
            shared = flow.mix(src, [1], "weights that are not rescaled")
            dst = shared.repeat_interleave(rows // groups, 0).view(rows)
        if isinstance(bias, Weight):
            flow.use(bias, dst, torch.tensor(FIXED))
        elif isinstance(bias, Tensor):
            flow.tie(dst, bias, "a constant bias")
        return dst.view(rows, *[1] * (-1 - axis)).expand(call.output.shape)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        x, weight, bias = call["input"], call["weight"], call.get("bias")
        if weight.data:
            return flow.barrier(call)
        product = exponent = x.exponent + weight.exponent
        if bias is not None and not bias.zero:
            exponent = bias.exponent if x.zero or weight.zero else max(exponent, bias.exponent)
        aligned = {id(x): flow.shifted(x.values, product - exponent), id(weight): weight.values}
        if bias is not None:
            aligned[id(bias)] = flow.shifted(bias.values, bias.exponent - exponent)
        values = call.run(lambda leaf: aligned.get(id(leaf), leaf))
        return flow.result(call.leaves(Mass), values, exponent)


register(Contraction(None), "conv1d", "conv2d", "conv3d")
register(Contraction(-1), "linear")
