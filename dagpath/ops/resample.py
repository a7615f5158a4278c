"""Interpolation: fixed linear maps over positions, one axis after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import Call, Mass
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
            weights = self._weights(flow, call, values, axis)
            values = (values.movedim(axis, -1) @ weights.values.t()).movedim(-1, axis)
            exponent += weights.exponent
        return flow.result([mass], values, exponent)

    def _weights(self, flow: MassFlow, call: Call, like: Tensor, axis: int) -> Mass:
        """``|w|^q`` of the map along one axis, read off the operation's answers to unit vectors along it."""
        shape = list(call["input"].values.shape[-self.spatial :])
        size = shape[axis]
        units = torch.eye(size, dtype=like.dtype, device=like.device)
        units = units.reshape(size, 1, *[size if d - self.spatial == axis else 1 for d in range(self.spatial)])
        probes = units.expand(size, 1, *shape).contiguous()
        answers = call.run(lambda leaf: probes if isinstance(leaf, Mass) else leaf)[:, 0].movedim(axis, -1)
        while answers.ndim > 2:
            answers = answers.select(1, 0)
        return flow.constant(answers.t())


register(Interpolation(1), "upsample_linear1d")
register(
    Interpolation(2),
    *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
register(Interpolation(3), "upsample_trilinear3d")
