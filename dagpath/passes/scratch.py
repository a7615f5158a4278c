"""Memory that is used again."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGE = 2**20
"""Bytes from which fresh memory costs: the system clears it page by page, and takes it back at once."""

_ALIGNED = 64
"""Address of a tensor, in bytes, a multiple of which vector instructions like."""


class Scratch:
    """One piece of the host's memory, lent to one large tensor after the other.

    A tensor made from an array holds it, and so does all that shares its storage: views, and what a backward pass
    saves. Once the array is gone, its memory is free for the next.

    Args:
        size: in bytes; what does not fit gets memory of its own.
    """

    def __init__(self, size: int) -> None:
        memory = np.empty(size + _ALIGNED if size >= _LARGE else 0, dtype=np.uint8)
        self._memory = memory[-memory.ctypes.data % _ALIGNED :][:size]
        self._lent: weakref.ref[Any] | None = None

    def like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """An uninitialized tensor like another; None where fresh memory is as good or this one is in use."""
        size = tensor.numel() * dtype.itemsize
        if size < _LARGE or size > len(self._memory) or not tensor.is_contiguous() or tensor.device.type != "cpu":
            return None
        if self._lent is not None and self._lent() is not None:
            return None
        part = self._memory[:size]
        self._lent = weakref.ref(part)
        return torch.from_numpy(part).view(dtype).view(tensor.shape)
