"""Pooling and reductions: order statistics and means over positions, which then share a scale.

For path masses a maximum is a sum (every input has a path through it), and a mean over k entries is a sum of edges
with the constant weight 1/k.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dagpath.flow.edge_values import EdgeWeights, Nodes
from dagpath.flow.edges import EdgeFlow
from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import Call, Mass, Operand, Weight
from dagpath.ops.base import Operation, Unknown, register
from dagpath.ops.resample import along
from dagpath.ops.windows import Windows, setting, strides

_MIXED = "pooling"


class Pool(Operation):
    """Pooling: the positions of a channel share a scale."""

    def __init__(self, spatial: int, average: bool, adaptive: bool = False) -> None:
        self.spatial, self.average, self.adaptive = spatial, average, adaptive

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x = flow.activation(call["input"])
        mixed = flow.mix(x, range(x.ndim - self.spatial, x.ndim), _MIXED)

        outputs = call.output
        if isinstance(outputs, Tensor):
            return mixed.expand(outputs.shape)
        return (mixed.expand(outputs[0].shape), flow.constant(outputs[1]))

    def mass(self, flow: MassFlow, call: Call) -> Any:
        mass = call["input"]
        x = mass.values
        shape = (call.output if isinstance(call.output, Tensor) else call.output[0]).shape[-self.spatial :]
        if self.adaptive:
            sizes = [_adaptive_sizes(x.shape[dim - self.spatial], shape[dim]) for dim in range(self.spatial)]
            count = functools.reduce(torch.mul, torch.meshgrid(*sizes, indexing="ij")).to(x)
            pooled = call.run(lambda leaf: leaf.values if isinstance(leaf, Mass) else leaf)
            if not self.average:  # run as a mean: the windows are the same
                pooled = _ADAPTIVE_MEAN[self.spatial](x, call["output_size"])
            pooled = pooled * count
            weight = flow.constant(1 / count) if self.average else None
        else:
            pooled, weight = _window_sum(x, call, self.spatial, shape), None
            if self.average:
                ones = torch.ones_like(x[:1, :1] if x.ndim == self.spatial + 2 else x[:1])
                mean = call.run(lambda leaf: ones if isinstance(leaf, Mass) else leaf)
                weight = flow.constant(mean / _window_sum(ones, call, self.spatial, shape))
        result = flow.scaled(mass, pooled, weight)
        return result if isinstance(call.output, Tensor) else (result, None)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        x, outputs = flow.nodes(call["input"]), call.output
        shape = (outputs if isinstance(outputs, Tensor) else outputs[0]).shape
        windows = self._windows(call, x.shape[-self.spatial :], shape[-self.spatial :])
        src, weight, slots = windows.gathered(x), EdgeWeights.constant(torch.ones(())), None
        if self.average:
            weight = EdgeWeights.constant(self._mean_weights(call, windows, x.shape[-self.spatial :]))
        else:
            slots = flow.slots(src.shape, lambda values: self._chosen(call.on(values)["input"], windows))
        dst = flow.new(shape)
        flow.connect(dst.view(*dst.shape, *[1] * self.spatial), src, weight, slots)
        result = Nodes(dst, call["input"].params)
        return result if isinstance(outputs, Tensor) else (result, None)

    def _windows(self, call: Call, sizes: torch.Size, counts: torch.Size) -> Windows:
        if self.adaptive:
            return Windows.adaptive(sizes, counts)
        kernel = setting(call, "kernel_size", 1, self.spatial)
        return Windows.of(call, sizes, counts, kernel, strides(call, kernel))

    def _mean_weights(self, call: Call, windows: Windows, sizes: torch.Size) -> Tensor:
        """The weight of every entry that a window sees: the mean of ones, over the number of ones."""
        ones = torch.ones(1, 1, *sizes, dtype=torch.float64)
        mean = call.run(lambda leaf: ones if isinstance(leaf, Operand) else leaf)[0, 0]
        count = windows.gathered(ones[0, 0]).flatten(-self.spatial).sum(-1)
        weights: Tensor = mean / count
        return weights.view(*weights.shape, *[1] * self.spatial)

    def _chosen(self, x: Tensor, windows: Windows) -> Tensor:
        """1 at the largest entry of each window."""
        seen = windows.gathered(x, fill=-math.inf)
        return _first(seen.flatten(-self.spatial)).view(seen.shape)


def _first(x: Tensor) -> Tensor:
    """1 at the first of the largest entries along the last dimension."""
    return F.one_hot(x.argmax(-1), x.shape[-1])


_SLICE = torch.ops.aten.slice.Tensor
_ADAPTIVE_MEAN = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _adaptive_sizes(size: int, count: int) -> Tensor:
    """Window sizes of PyTorch's adaptive pooling of ``size`` entries into ``count`` windows."""
    index = torch.arange(count)
    return -(-(index + 1) * size // count) - index * size // count


def _window_sum(x: Tensor, call: Call, spatial: int, shape: torch.Size) -> Tensor:
    """Sums over the windows of a pooling call, one dimension after the other."""
    kernel = setting(call, "kernel_size", 1, spatial)
    stride = strides(call, kernel)
    padding, dilation = (setting(call, name, default, spatial) for name, default in (("padding", 0), ("dilation", 1)))
    pads: list[int] = []
    for dim in range(spatial):
        reach = (shape[dim] - 1) * stride[dim] + dilation[dim] * (kernel[dim] - 1) + 1
        size = x.shape[dim - spatial]
        pads = [padding[dim], reach - size - padding[dim], *pads]
    x = F.pad(x, pads)
    for dim in range(spatial):
        starts = range(0, kernel[dim] * dilation[dim], dilation[dim])
        length = (shape[dim] - 1) * stride[dim] + 1
        seen = (_SLICE(x, dim - spatial, start, start + length, stride[dim]) for start in starts)
        x = functools.reduce(torch.add, seen)
    return x


class Reduce(Operation):
    """A mean, sum, maximum or minimum over dimensions, whose entries share a scale."""

    def __init__(self, average: bool = False, chooses: bool = False) -> None:
        self.average, self.chooses = average, chooses

    @staticmethod
    def _dims(call: Call, ndim: int) -> list[int]:
        dims = call.get("dim")
        dims = list(range(ndim)) if dims is None or dims == [] else dims
        return [dim % ndim for dim in (dims if isinstance(dims, (list, tuple)) else [dims])] if ndim else []

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if isinstance(call["input"], Weight):
            return Unknown("a parameter is reduced").neurons(flow, call)
        x = call["input"]
        dims = self._dims(call, x.ndim)
        mixed = flow.mix(x, dims, _MIXED)
        for dim in sorted(dims, reverse=True):
            mixed = mixed.select(dim, 0)
        outputs = call.output
        if isinstance(outputs, Tensor):
            return mixed.reshape(outputs.shape) if call.get("keepdim") else mixed
        values = mixed.reshape(outputs[0].shape) if call.get("keepdim") else mixed
        return (values, *flow.constant(list(outputs[1:])))

    def mass(self, flow: MassFlow, call: Call) -> Any:
        mass = call["input"]
        dims = self._dims(call, mass.values.ndim)
        total = mass.values.sum(dims, keepdim=bool(call.get("keepdim"))) if dims else mass.values
        count = math.prod(mass.values.shape[dim] for dim in dims)
        result = flow.scaled(mass, total, flow.number(1 / count) if self.average else None)
        return result if isinstance(call.output, Tensor) else (result, *[None] * (len(call.output) - 1))

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        x, outputs = flow.nodes(call["input"]), call.output
        dims = self._dims(call, x.ndim)
        others = [dim for dim in range(x.ndim) if dim not in dims]
        src = x.permute(*others, *dims).flatten(len(others)) if dims else x[..., None]
        slots = None
        if self.chooses:
            slots = flow.slots(src.shape, lambda values: self._chosen(call.on(values), others, dims))
        dst = flow.new((outputs if isinstance(outputs, Tensor) else outputs[0]).shape)
        weight = 1 / src.shape[-1] if self.average else 1.0
        flow.connect(dst.view(*src.shape[:-1], 1), src, weight, slots)
        result = Nodes(dst, call["input"].params)
        return result if isinstance(outputs, Tensor) else (result, *[None] * (len(outputs) - 1))

    @staticmethod
    def _chosen(real: Call, others: list[int], dims: list[int]) -> Tensor:
        """1 at the first entry that equals the result."""
        x, result = real["input"], real.run(lambda leaf: leaf)
        rows = x.permute(*others, *dims).flatten(len(others)) if dims else x[..., None]
        result = result if isinstance(result, Tensor) else result[0]
        return _first((rows == result.reshape(*rows.shape[:-1], 1)).int())


class Scan(Operation):
    """A cumulative sum: the entries along its dimension share a scale."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x = flow.activation(call["input"])
        return flow.mix(x, [call["dim"] % x.ndim], "a cumulative sum").expand(call.output.shape)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return flow.linear(call)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        x = call["input"]
        axis = call["dim"] % max(len(x.shape), 1)
        return along(flow, x, axis, torch.ones(x.shape[axis], x.shape[axis]).tril())


class Fold(Operation):
    """Patches that are added up at their places: those of a channel share a scale."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x, output = flow.activation(call["input"]), call.output
        patches = x.reshape(*x.shape[:-2], output.shape[-3], -1, x.shape[-1])
        mixed = flow.mix(patches, [-2 % patches.ndim, -1 % patches.ndim], "patches that are added up")
        return mixed.expand(output.shape)

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return flow.linear(call)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        x = flow.nodes(call["input"])
        dst = flow.new(call.output.shape)
        settings = (call[name] for name in ("kernel_size", "dilation", "padding", "stride"))
        patches = torch.ops.aten.im2col(dst.double(), *settings).long()
        flow.connect(patches, x)
        return Nodes(dst, call["input"].params)


for _n in (1, 2, 3):
    register(Pool(_n, average=False), f"max_pool{_n}d", f"max_pool{_n}d_with_indices")
    register(Pool(_n, average=True), f"avg_pool{_n}d")
    register(Pool(_n, average=True, adaptive=True), f"adaptive_avg_pool{_n}d", f"_adaptive_avg_pool{_n}d")
    register(Pool(_n, average=False, adaptive=True), f"adaptive_max_pool{_n}d")
register(Scan(), "cumsum")
register(Fold(), "col2im")
register(Reduce(average=True), "mean")
register(Reduce(), "sum")
register(Reduce(chooses=True), "amax", "amin", "max", "min")
