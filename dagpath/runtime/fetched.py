"""Tensors that are fetched when they are asked for: too many to be held all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class Fetched(Mapping[str, Tensor]):
    """A mapping whose every look-up fetches its tensor anew; none is kept.

    Args:
        names: in their order.
        fetch: makes the tensor of a name.
        device: where the tensors are.
    """

    def __init__(self, names: list[str], fetch: Callable[[str], Tensor], device: torch.device) -> None:
        self._names = dict.fromkeys(names)
        self._fetch = fetch
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """Where the tensors of a mapping are; the CPU if it is empty."""
    if isinstance(tensors, Fetched):
        return tensors.device
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
