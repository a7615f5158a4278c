"""Interpolation: fixed linear maps over positions, one axis after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import PathFlow, Places
from dagpath.passes.values import Call, Operand
from dagpath.rules.base import Operation, register


class Interpolation(Operation):
    """Interpolation: weighted sums over the positions of a channel, which share a scale."""

    def __init__(self, spatial: int) -> None:
        self.spatial = spatial

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x = flow.activation(call["input"])
        return flow.mix(x, range(x.ndim - self.spatial, x.ndim), "interpolation").expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        x = call["input"]
        sizes = x.shape[-self.spatial :]
        for axis in range(-self.spatial, 0):
            x = along(flow, x, len(x.shape) + axis, self._weights(call, sizes, axis))
        return x

    def _weights(self, call: Call, sizes: Sequence[int], axis: int) -> Tensor:
        """The map along one axis, read off the operation's answers to unit vectors along it."""
        size = sizes[axis]
        units = torch.eye(size, dtype=torch.float64)
        units = units.reshape(size, 1, *[size if d - self.spatial == axis else 1 for d in range(self.spatial)])
        probes = units.expand(size, 1, *sizes).contiguous()
        answers = call.run(lambda leaf: probes if isinstance(leaf, Operand) else leaf)[:, 0].movedim(axis, -1)
        while answers.ndim > 2:
            answers = answers.select(1, 0)
        weights: Tensor = answers.t()
        return weights


def along(flow: PathFlow, x: Any, axis: int, matrix: Tensor) -> Any:
    """A constant matrix times the entries along one axis."""

    def last(entries: Tensor) -> Tensor:
        return entries.movedim(axis, -1)

    def run(entries: Tensor, weights: Tensor, bias: None) -> Tensor:
        return (last(entries) @ weights.t()).movedim(-1, axis)

    def places() -> tuple[Places, Places, Places, Places, int]:
        return lambda dst: last(dst)[..., None], lambda src: last(src)[..., None, :], _same, _same, 1

    shape = [len(matrix) if dim == axis else size for dim, size in enumerate(x.shape)]
    return flow.bilinear(shape, (x, flow.constant(matrix), None), run, places)


def _same(entries: Tensor) -> Tensor:
    return entries


register(Interpolation(1), "upsample_linear1d")
register(
    Interpolation(2),
    *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
register(Interpolation(3), "upsample_trilinear3d")
