"""The numbers of parameter elements: those of a model's parameters in one row, then those of computed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dagpath.passes.values import Weight


class Elements:
    """Numbers every element of every parameter, and of every virtual parameter that is added.

    Args:
        parameters: the parameters by name.

    Attributes:
        shapes: name -> shape of each.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._names: list[str] = []
        self._starts = torch.zeros(1, dtype=torch.int64)
        for name, parameter in parameters.items():
            self.add(name, parameter.shape)

    def add(self, name: str, shape: torch.Size) -> None:
        """Number the elements of a new parameter."""
        self.shapes[name] = shape
        if shape.numel():
            self._names.append(name)
            self._starts = torch.cat([self._starts, self._starts[-1:] + shape.numel()])

    def of(self, weight: Weight) -> Tensor:
        """The element numbers of a weight, as a tensor of its shape."""
        if weight.elements is not None:
            return weight.elements
        assert weight.name is not None
        start = int(self._starts[self._names.index(weight.name)]) if math.prod(weight.shape) else 0
        return torch.arange(start, start + math.prod(weight.shape)).view(weight.shape)

    def name_of(self, weight: Weight) -> str | None:
        """The parameter that a weight is, in its own shape or another: all of its elements, in their order."""
        if weight.name is not None:
            return weight.name
        elements = self.of(weight).reshape(-1)
        if not len(elements):
            return None
        name = self._names[int(torch.bucketize(elements[0], self._starts[:-1], right=True)) - 1]
        whole = self.of(Weight(self.shapes[name], name)).view(-1)
        return name if torch.equal(elements, whole) else None

    def by_parameter(self, elements: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """(parameter, mask over ``elements``, their flat positions in the parameter), for each parameter met."""
        owners = torch.bucketize(elements.contiguous(), self._starts[:-1], right=True) - 1
        result = []
        for owner in sorted(set(owners.flatten().tolist())):
            inside = owners == owner
            result.append((self._names[owner], inside, elements[inside] - self._starts[owner]))
        return result
