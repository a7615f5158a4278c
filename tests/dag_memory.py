"""Operations of random networks that keep something for the next call."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_base import Kind


class Memory(nn.Module):
    """Where something is kept: a tensor, a number, a list of tensors; None for nothing.

    Attributes:
        first: what is kept before the first call.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.first: Any = None
        if weight is not None:
            self.weight = nn.Parameter(weight)

    def read(self) -> Any:
        raise NotImplementedError

    def write(self, value: Any) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """Keep again what was there before the first call."""
        self.write(_copied(self.first))

    def begin_here(self) -> None:
        """What is kept now is what is there before the first call."""
        self.first = _copied(self.read())


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


class InAttribute(Memory):
    kept: Any = None

    def read(self):
        return self.kept

    def write(self, value):
        self.kept = value


class InList(Memory):
    def __init__(self, weight=None):
        super().__init__(weight)
        self.kept = []

    def read(self):
        return self.kept[-1] if self.kept else None

    def write(self, value):
        self.kept.clear()
        if value is not None:
            self.kept.append(value)


class InDictionary(Memory):
    """A list inside of a dictionary."""

    def __init__(self, weight=None):
        super().__init__(weight)
        self.kept = {"values": [None]}

    def read(self):
        return self.kept["values"][0]

    def write(self, value):
        self.kept["values"] = [value]


class InObject(Memory):
    def __init__(self, weight=None):
        super().__init__(weight)
        self.kept = types.SimpleNamespace(value=None)

    def read(self):
        return self.kept.value

    def write(self, value):
        self.kept.value = value


class _Slot:
    __slots__ = ("value",)


class InSlot(InObject):
    def __init__(self, weight=None):
        super().__init__(weight)
        self.kept = _Slot()
        self.kept.value = None


class InClosure(Memory):
    def __init__(self, weight=None):
        super().__init__(weight)
        kept: Any = None

        def read():
            return kept

        def write(value):
            nonlocal kept
            kept = value

        self._read, self._write = read, write

    def read(self):
        return self._read()

    def write(self, value):
        self._write(value)


class InHook(InClosure):
    """A hook stores what it sees."""

    def __init__(self, weight=None):
        super().__init__(weight)
        self.seen = nn.Identity()
        write = self._write
        self.seen.register_forward_hook(lambda module, inputs, output: write(output))

    def write(self, value):
        self.seen(value)


class InBuffer(Memory):
    """A buffer that is replaced."""

    def __init__(self, weight=None):
        super().__init__(weight)
        self.register_buffer("kept", None)

    def read(self):
        return self.kept

    def write(self, value):
        self.kept = value


class InWrittenBuffer(Memory):
    """A buffer that is written in place: zeros before anything is kept."""

    def __init__(self, weight, shape):
        super().__init__(weight)
        self.register_buffer("kept", torch.zeros(1, *shape))

    def read(self):
        return self.kept

    def write(self, value):
        if value is None:
            self.kept.zero_()
        elif value.shape == self.kept.shape:
            with torch.no_grad():
                self.kept.copy_(value)


PLACES = {
    "attribute": InAttribute,
    "list": InList,
    "dictionary": InDictionary,
    "object": InObject,
    "slot": InSlot,
    "closure": InClosure,
    "hook": InHook,
    "buffer": InBuffer,
    "written buffer": InWrittenBuffer,
}

KEPT = {
    "an example": lambda old, x, weight: x[:1],
    "all": lambda old, x, weight: x,
    "detached": lambda old, x, weight: x.detach(),
    "the mean": lambda old, x, weight: x.mean(0, keepdim=True),
    "a sum": lambda old, x, weight: x[:1] if old is None or old.shape != x[:1].shape else old + x[:1],
    "a list": lambda old, x, weight: [*(old or []), x[:1]],
    "of a weight": lambda old, x, weight: F.relu(2 * weight),
    "how often": lambda old, x, weight: (old or 0) + 1,
    "how many": lambda old, x, weight: len(x),
    "how long": lambda old, x, weight: x.shape[-1],
}
"""What is kept, of what was kept before, the value, and the module's weight."""

USES = {
    "added": lambda x, kept: x + kept,
    "largest": torch.maximum,
    "shifted": lambda x, kept: torch.cat([kept.expand_as(x), x], -1)[..., 1 : x.shape[-1] + 1],
    "instead": lambda x, kept: kept.expand_as(x),
    "product": lambda x, kept: x * kept,
    "otherwise": lambda x, kept: x.abs(),
    "flipped": lambda x, kept: x.flip(1),
}
"""What is made of a value and of what was kept."""


class Remember(Kind):
    """Something of the second value is kept for the next call, or once for all, and used for the first."""

    operands = 2

    def settings(self, pick, shape):
        return {
            "place": pick(list(PLACES)),
            "kept": pick(list(KEPT)),
            "use": pick(list(USES)),
            "once": pick((False, False, True)),
            "reads_first": pick((True, True, False)),
        }

    def module(self, shape, place, kept, **settings):
        weight = torch.zeros(1, *shape) if kept == "of a weight" else None
        if place == "written buffer":
            if kept not in ("an example", "the mean", "a sum", "of a weight"):
                raise ValueError("a buffer has one shape")
            return InWrittenBuffer(weight, shape)
        if place == "buffer" and kept in ("a list", "how often", "how many", "how long"):
            raise ValueError("a buffer is a tensor")
        return PLACES[place](weight)

    def run(self, module, x, y, place, kept, use, once, reads_first):
        old = module.read()
        if old is None or not once:
            module.write(KEPT[kept](old, y, getattr(module, "weight", None)))
        value = old if reads_first else module.read()
        if isinstance(value, list):
            value = sum(part for part in value if part.shape[1:] == x.shape[1:]) if value else None
        if value is None or (isinstance(value, Tensor) and not _fits(value, x)):
            return x
        if isinstance(value, int) and use not in ("otherwise", "flipped"):
            return x * value
        return USES[use](x, value) if not isinstance(value, int) or value % 2 else x


def _fits(value: Tensor, x: Tensor) -> bool:
    return value.shape[1:] == x.shape[1:] and len(value) in (1, len(x))


class Cached(Memory):
    """A table of constants for each size, made once by a function whose results are kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        @functools.cache
        def table(size: int) -> Tensor:
            return (torch.arange(size) % 3 - 1.0).expand(channels, size)

        self.table = table

    def read(self):
        return None

    def write(self, value):
        self.table.cache_clear()


class UseTable(Kind):
    """A product with, or a sum with, a table of constants that is made once for each length."""

    def settings(self, pick, shape):
        return {"sums": pick((False, True))}

    def module(self, shape, sums):
        return Cached(shape[0])

    def run(self, module, x, sums):
        table = module.table(x.shape[-1]).to(x.dtype)
        table = table.reshape(-1, *[1] * (x.ndim - 3), x.shape[-1]) if x.ndim > 2 else table[0]
        return x + table if sums else x * table
