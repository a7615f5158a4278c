"""What a kind of operation of random networks is.

A kind draws its settings with ``pick(options)``, the simplest option first, builds its module if it has one, and runs.
Settings need not fit: what PyTorch refuses is left out of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pick = Callable[[Sequence[Any]], Any]
Shape = tuple[int, ...]
"""Channels and positions, without the batch."""

BOTH = (False, True)


class Kind:
    """A kind of operation.

    Attributes:
        operands: how many earlier values it reads.
        positions: does it need values that have positions?
    """

    operands = 1
    positions = False

    def settings(self, pick: Pick, shape: Shape) -> dict[str, Any]:
        return {}

    def module(self, shape: Shape, **settings: Any) -> nn.Module:
        return nn.Identity()

    def run(self, module: nn.Module, *values: Tensor, **settings: Any) -> Tensor:
        return module(*values)


class Parameters(nn.Module):
    """Parameters and buffers by name."""

    def __init__(self, buffers: dict[str, Tensor] | None = None, **shapes: Shape) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)


class Function(Kind):
    """A function without parameters, from a table."""

    def __init__(self, functions: dict[str, Callable[..., Tensor]], operands: int = 1, positions: bool = False) -> None:
        self.functions, self.operands, self.positions = functions, operands, positions

    def settings(self, pick, shape):
        return {"function": pick(list(self.functions))}

    def run(self, module, *values, function):
        return self.functions[function](*values)
