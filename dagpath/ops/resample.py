"""Interpolation: fixed linear maps over positions, one axis after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.flow.edge_values import EdgeWeights, Nodes
from dagpath.flow.edges import EdgeFlow
from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import Call, Operand
from dagpath.ops.base import Operation, register


class Interpolation(Operation):
    """Interpolation: weighted sums over the positions of a channel, which share a scale."""

    def __init__(self, spatial: int) -> None:
        self.spatial = spatial

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x = flow.activation(call["input"])
        return flow.mix(x, range(x.ndim - self.spatial, x.ndim), "interpolation").expand(call.output.shape)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        mass = call["input"]
        values, exponent = mass.values, mass.exponent
        for axis in range(-self.spatial, 0):
            weights = flow.constant(self._weights(call, mass.values.shape, values, axis))
            values = (values.movedim(axis, -1) @ weights.values.t()).movedim(-1, axis)
            exponent += weights.exponent
        return flow.result([mass], values, exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        x = call["input"]
        like = torch.zeros((), dtype=torch.float64)
        for axis in range(-self.spatial, 0):
            x = along(flow, x, axis, self._weights(call, call["input"].shape, like, axis))
        return x

    def _weights(self, call: Call, shape: torch.Size, like: Tensor, axis: int) -> Tensor:
        """The map along one axis, read off the operation's answers to unit vectors along it."""
        shape = shape[-self.spatial :]
        size = shape[axis]
        units = torch.eye(size, dtype=like.dtype, device=like.device)
        units = units.reshape(size, 1, *[size if d - self.spatial == axis else 1 for d in range(self.spatial)])
        probes = units.expand(size, 1, *shape).contiguous()
        answers = call.run(lambda leaf: probes if isinstance(leaf, Operand) else leaf)[:, 0].movedim(axis, -1)
        while answers.ndim > 2:
            answers = answers.select(1, 0)
        weights: Tensor = answers.t()
        return weights


def along(flow: EdgeFlow, x: Nodes | EdgeWeights, axis: int, matrix: Tensor) -> Nodes:
    """New nodes: a constant matrix times the entries along one axis."""
    src = flow.nodes(x).movedim(axis, -1)
    dst = flow.new((*src.shape[:-1], len(matrix)), f"axis {axis}")
    flow.connect(dst[..., None], src[..., None, :], EdgeWeights.constant(matrix))
    return Nodes(dst.movedim(-1, axis), x.params)


register(Interpolation(1), "upsample_linear1d")
register(
    Interpolation(2),
    *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
register(Interpolation(3), "upsample_trilinear3d")
