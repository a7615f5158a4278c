"""Pooling and reductions: order statistics and means over positions, which then share a scale.

To paths a maximum is a sum (every input has a path through it) with a gate for each of its edges, and a mean over k
entries is a sum of edges of the constant weight 1/k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import Gate, PathFlow
from dagpath.passes.values import Call, Operand, Weight
from dagpath.rules.base import Operation, Unknown, first_of, register
from dagpath.rules.resample import along
from dagpath.rules.windows import Windows, setting, strides

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

    def paths(self, flow: PathFlow, call: Call) -> Any:
        x, shape = call["input"], _first_shape(call.output)
        sizes, counts = x.shape[-self.spatial :], shape[-self.spatial :]
        windows = functools.cache(lambda: self._windows(call, sizes, counts))
        result = flow.reduced(
            x,
            shape,
            lambda entries: windows().gathered(entries),
            weight=self._mean_weights(call, sizes, counts) if self.average else 1.0,
            gate=None if self.average else Gate(lambda real: self._chosen(real["input"], windows())),
            total=lambda entries: self._total(call, entries, counts),
        )
        return first_of(result, call.output)

    def _total(self, call: Call, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Sums over the windows."""
        if not self.adaptive:
            return _window_sum(x, call, self.spatial, counts)
        sizes = [_adaptive_sizes(x.shape[dim - self.spatial], counts[dim]) for dim in range(self.spatial)]
        number = functools.reduce(torch.mul, torch.meshgrid(*sizes, indexing="ij")).to(x)
        sums: Tensor = _ADAPTIVE_MEAN[self.spatial](x, counts) * number  # the windows of a maximum are the same
        return sums

    def _windows(self, call: Call, sizes: torch.Size, counts: torch.Size) -> Windows:
        if self.adaptive:
            return Windows.adaptive(sizes, counts)
        kernel = setting(call, "kernel_size", 1, self.spatial)
        return Windows.of(call, sizes, counts, kernel, strides(call, kernel))

    def _mean_weights(self, call: Call, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
        """The weight of every entry that a window sees: the mean of ones, over the number of ones."""
        ones = torch.ones(1, 1, *sizes, dtype=torch.float64)
        mean = call.run(lambda leaf: ones if isinstance(leaf, Operand) else leaf)
        weights: Tensor = (mean / self._total(call, ones, counts))[0, 0]
        return weights

    def _chosen(self, x: Tensor, windows: Windows) -> Tensor:
        """1 at the largest entry of each window."""
        seen = windows.gathered(x, fill=-math.inf)
        return _first(seen.flatten(-self.spatial)).view(seen.shape)


def _first(x: Tensor) -> Tensor:
    """1 at the first of the largest entries along the last dimension."""
    return F.one_hot(x.argmax(-1), x.shape[-1])


def _first_shape(output: Any) -> torch.Size:
    """The shape of what an operation returns, or of the first of it."""
    shape: torch.Size = (output if isinstance(output, Tensor) else output[0]).shape
    return shape


_SLICE = torch.ops.aten.slice.Tensor
_ADAPTIVE_MEAN: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _adaptive_sizes(size: int, count: int) -> Tensor:
    """Window sizes of PyTorch's adaptive pooling of ``size`` entries into ``count`` windows."""
    index = torch.arange(count)
    return -(-(index + 1) * size // count) - index * size // count


def _window_sum(x: Tensor, call: Call, spatial: int, shape: Sequence[int]) -> Tensor:
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

    def paths(self, flow: PathFlow, call: Call) -> Any:
        x, shape = call["input"], _first_shape(call.output)
        dims = self._dims(call, len(x.shape))
        others = [dim for dim in range(len(x.shape)) if dim not in dims]

        def rows(entries: Tensor) -> Tensor:
            return entries.permute(*others, *dims).reshape(*shape, *(x.shape[dim] for dim in dims))

        def is_chosen(real: Call) -> Tensor:
            seen = rows(real["input"])
            result = real.result if isinstance(real.result, Tensor) else real.result[0]
            equal: Tensor = seen.reshape(*shape, -1) == result[..., None]
            return _first(equal.int()).view(seen.shape)

        result = flow.reduced(
            x,
            shape,
            rows,
            weight=1 / math.prod(x.shape[dim] for dim in dims) if self.average else 1.0,
            gate=Gate(is_chosen) if self.chooses else None,
            total=lambda entries: entries.sum(dims).view(shape) if dims else entries,
        )
        return first_of(result, call.output)


class Scan(Operation):
    """A cumulative sum: the entries along its dimension share a scale."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x = flow.activation(call["input"])
        return flow.mix(x, [call["dim"] % x.ndim], "a cumulative sum").expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        x, axis = call["input"], call["dim"] % max(len(call["input"].shape), 1)
        size = x.shape[axis] if x.shape else 1
        return along(flow, x, axis, torch.ones(size, size, dtype=torch.float64).tril())


class Fold(Operation):
    """Patches that are added up at their places: those of a channel share a scale."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x, output = flow.activation(call["input"]), call.output
        patches = x.reshape(*x.shape[:-2], output.shape[-3], -1, x.shape[-1])
        mixed = flow.mix(patches, [-2 % patches.ndim, -1 % patches.ndim], "patches that are added up")
        return mixed.expand(output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        settings = [call[name] for name in ("kernel_size", "dilation", "padding", "stride")]

        def patches(entries: Tensor) -> Tensor:
            numbers: Tensor = torch.ops.aten.im2col(entries.double(), *settings).long()
            return numbers

        x = call["input"]
        return flow.reduced(x, call.output.shape, lambda entries: entries, patches, total=call.as_function_of(x))


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
