"""Tensors by name, flattened and one after the other in one vector, as ``model.parameters()`` gives them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)


class Flattened(Generic[Name]):
    """Where the entries of each tensor stand in the vector.

    Args:
        shapes: name -> shape, in the order of the vector.

    Attributes:
        shapes: as given.
        spans: name -> the places of the tensor's entries.
    """

    def __init__(self, shapes: Mapping[Name, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self._ends = list(itertools.accumulate(shape.numel() for shape in self.shapes.values()))
        sizes = zip(self.shapes.items(), self._ends, strict=True)
        self.spans = {name: range(end - shape.numel(), end) for (name, shape), end in sizes}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def split(self, vector: Tensor) -> dict[Name, Tensor]:
        """Name -> the tensor's entries in the vector, in the tensor's shape; without a copy."""
        return {name: vector[span.start : span.stop].view(self.shapes[name]) for name, span in self.spans.items()}

    def find(self, place: int) -> tuple[Name, tuple[int, ...]]:
        """The tensor that has an entry at this place, and the entry's index in the tensor."""
        name = list(self.shapes)[bisect.bisect_right(self._ends, place)]
        index = torch.unravel_index(torch.tensor(place - self.spans[name].start), self.shapes[name])
        return name, tuple(int(part) for part in index)
