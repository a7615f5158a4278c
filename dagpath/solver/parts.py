"""The dense parts of a group matrix: a table of masses, or the product of what arrives and what leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_CACHED = 2**20
"""Masses that are multiplied from both sides before the next are read."""


def on_host(tensor: Tensor) -> Any:
    """A NumPy array where the tensor is on the CPU, since NumPy multiplies faster there; else the tensor."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


class Part(Protocol):
    """A non-negative matrix. Vectors are NumPy arrays for masses on the CPU, else tensors on their device."""

    def products(self, x: Any, y: Any) -> tuple[Any, Any]:
        """``A @ y`` and ``x @ A``."""

    def scaled(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> Part:
        """``diag(x) @ A @ diag(y)`` in another type."""

    def divided(self, number: float) -> Part:
        """Every mass divided by a number."""

    def tempered(self, power: float) -> Part:
        """Every mass to a power."""

    def log_range(self) -> tuple[float, float]:
        """Logarithms of the smallest mass that is not zero and of the largest; ±infinity where there is none."""

    def table(self) -> Tensor:
        """All masses, [rows, columns]."""


@dataclass(frozen=True, eq=False)
class Table:
    """Masses one by one.

    Attributes:
        masses: [rows, columns].
    """

    masses: Tensor

    @cached_property
    def _masses(self) -> Any:
        return on_host(self.masses)

    def products(self, x: Any, y: Any) -> tuple[Any, Any]:
        step = max(1, _CACHED // len(y))  # rows that the second product finds in the cache
        into, out_of = [], []
        for start in range(0, len(x), step):
            rows = self._masses[start : start + step]
            into.append(rows @ y)
            out_of.append(x[start : start + step] @ rows)
        if len(into) == 1:
            return into[0], out_of[0]
        return (torch.cat(into) if isinstance(y, Tensor) else np.concatenate(into)), sum(out_of)

    def scaled(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> Table:
        return Table((x[:, None] * self.masses).mul_(y[None, :]).to(dtype))

    def divided(self, number: float) -> Table:
        return Table(self.masses / number)

    def tempered(self, power: float) -> Table:
        return Table(self.masses**power)

    def log_range(self) -> tuple[float, float]:
        return log_range(self.masses)

    def table(self) -> Tensor:
        return self.masses


@dataclass(frozen=True, eq=False)
class Product:
    """Masses ``left[i] · right[j]``, which those of a linear layer are: what leaves unit i times what arrives at j.

    Attributes:
        left: [rows].
        right: [columns].
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), len(self.right)

    @cached_property
    def _sides(self) -> tuple[Any, Any]:
        return on_host(self.left), on_host(self.right)

    def products(self, x: Any, y: Any) -> tuple[Any, Any]:
        left, right = self._sides
        return left * (right @ y), right * (left @ x)

    def scaled(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> Product:
        return Product((x * self.left).to(dtype), (self.right * y).to(dtype))

    def divided(self, number: float) -> Product:
        root = number**0.5
        return Product(self.left / root, self.right / root)

    def tempered(self, power: float) -> Product:
        return Product(self.left**power, self.right**power)

    def log_range(self) -> tuple[float, float]:
        (low, high), (lower, higher) = log_range(self.left), log_range(self.right)
        empty = math.inf in (low, lower)
        return (math.inf, -math.inf) if empty else (low + lower, high + higher)

    def table(self) -> Tensor:
        return self.left[:, None] * self.right[None, :]


def log_range(masses: Tensor) -> tuple[float, float]:
    """Logarithms of the smallest mass that is not zero and of the largest; ±infinity where there is none."""
    live = masses[masses > 0]
    return (math.log(live.min()), math.log(live.max())) if len(live) else (math.inf, -math.inf)
