"""The windows that convolutions and poolings look through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dagpath.passes.values import Call


def setting(call: Call, name: str, default: int, dims: int) -> list[int]:
    """A setting of a convolution or pooling, one number per dimension."""
    value = call.get(name)
    value = [default] if value is None or value == [] else value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values


def strides(call: Call, kernel: Sequence[int]) -> list[int]:
    """The strides of a pooling: those given, else the sizes of its windows."""
    given = call.get("stride")
    return list(kernel) if given is None or given == [] else setting(call, "stride", 1, len(kernel))


@dataclass(frozen=True)
class Windows:
    """Which positions each window sees.

    Attributes:
        positions: for each dimension an int64 tensor [windows, kernel] of positions counted from 1; 0 is outside.
    """

    positions: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        call: Call,
        sizes: Sequence[int],
        counts: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> Windows:
        """The windows of a call.

        Args:
            call: a convolution or a pooling, which says padding and dilation.
            sizes: of what the windows look at.
            counts: how many windows there are along each dimension.
            kernel: sizes of a window.
            stride: from one window to the next; what the call says if None.
        """
        dims = len(kernel)
        stride = setting(call, "stride", 1, dims) if stride is None else stride
        dilation = setting(call, "dilation", 1, dims)
        padding = call.get("padding")
        if padding == "same":
            before = [step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True)]
        else:
            before = [0] * dims if padding == "valid" else setting(call, "padding", 0, dims)
        found = []
        for dim in range(dims):
            first = torch.arange(counts[dim])[:, None] * stride[dim] - before[dim]
            at = first + torch.arange(kernel[dim]) * dilation[dim]
            found.append(torch.where((at >= 0) & (at < sizes[dim]), at + 1, 0))
        return cls(tuple(found))

    @classmethod
    def adaptive(cls, sizes: Sequence[int], counts: Sequence[int]) -> Windows:
        """The windows of an adaptive pooling."""
        found = []
        for size, count in zip(sizes, counts, strict=True):
            index = torch.arange(count)[:, None]
            first, end = index * size // count, -(-(index + 1) * size // count)
            at = first + torch.arange(int((end - first).amax()) if count else 0)
            found.append(torch.where(at < end, at + 1, 0))
        return cls(tuple(found))

    def gathered(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """What each window sees of the last dimensions, and ``fill`` outside: [..., *windows, *kernel]."""
        dims = len(self.positions)
        tensor = torch.nn.functional.pad(tensor, [1, 0] * dims, value=fill)
        lead = tensor.ndim - dims
        for dim, positions in enumerate(self.positions):
            axis = lead + 2 * dim
            shape = (*tensor.shape[:axis], *positions.shape, *tensor.shape[axis + 1 :])
            tensor = tensor.index_select(axis, positions.flatten()).view(shape)
        return tensor.permute(*range(lead), *range(lead, tensor.ndim, 2), *range(lead + 1, tensor.ndim, 2))
