"""What stands for a tensor while the unrolled graph is built: nodes for activations, weights of edges for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from dagpath.flow.values import Operand


@dataclass(frozen=True)
class Nodes(Operand):
    """An activation.

    Attributes:
        numbers: int64 tensor of its shape: which node stands in each entry; 0 in entries that are always zero.
        params: does it depend on a parameter?
        node: the node of the captured graph that made it.
    """

    numbers: Tensor
    params: bool = False
    node: fx.Node | None = field(default=None, repr=False)
    data: bool = True

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape


@dataclass(frozen=True)
class EdgeWeights(Operand):
    """A parameter, a constant, or a weight computed from parameters: the weights of T parallel edges in each entry.

    Attributes:
        values: float64 tensor [T, *shape]; their sum over T is the tensor's value.
        elements: int64 tensor [T, F, *shape]: the parameter elements that a value depends on, counted from 1 over all
            parameters; 0 for none.
        slopes: float64 tensor [T, F, *shape]: the derivative of the value with respect to each.
        params: does it depend on a parameter?
        node: the node of the captured graph that made it.
    """

    values: Tensor
    elements: Tensor
    slopes: Tensor
    params: bool = False
    node: fx.Node | None = field(default=None, repr=False)
    data: bool = False

    @classmethod
    def constant(cls, tensor: Tensor) -> EdgeWeights:
        """Edges of fixed weight; infinite ones are none."""
        values = (tensor.abs() if tensor.is_complex() else tensor).detach().cpu().double()[None]
        values = values.masked_fill(values.isinf(), 0.0) if bool(values.isinf().any()) else values
        none = values.new_zeros((1, 0, *values.shape[1:]))
        return cls(values, none.long(), none)

    @classmethod
    def parameter(cls, tensor: Tensor, first: int) -> EdgeWeights:
        """A parameter whose elements have the numbers from ``first`` on."""
        elements = torch.arange(first, first + tensor.numel()).view(tensor.shape)[None, None]
        return cls(
            tensor.detach().cpu().double()[None], elements, torch.ones(elements.shape, dtype=torch.float64), params=True
        )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[1:]

    @property
    def total(self) -> Tensor:
        """The tensor's value."""
        return self.values.sum(0)

    @property
    def exists(self) -> Tensor:
        """Which edges there are: those whose weight is not zero for good."""
        return (self.values != 0) | (self.elements > 0).any(1)

    def taken(self, places: Tensor) -> EdgeWeights:
        """The entries at flat places counted from 1, in the shape of ``places``; zero where that is 0."""
        values, elements, slopes = (
            torch.nn.functional.pad(part.flatten(-len(self.shape)) if self.shape else part[..., None], (1, 0))[
                ..., places
            ]
            for part in (self.values, self.elements, self.slopes)
        )
        return EdgeWeights(values, elements, slopes, self.params)

    def expand(self, shape: torch.Size) -> EdgeWeights:
        aligned = (1,) * (len(shape) - len(self.shape)) + tuple(self.shape)
        parts = (
            part.view(*part.shape[:lead], *aligned).expand(*part.shape[:lead], *shape)
            for part, lead in ((self.values, 1), (self.elements, 2), (self.slopes, 2))
        )
        return EdgeWeights(*parts, self.params)

    def times(self, other: EdgeWeights) -> EdgeWeights:
        """Products, entry by entry: edges in a row."""
        shape = torch.broadcast_shapes(self.shape, other.shape)  # type: ignore[no-untyped-call]
        a, b = self.expand(shape), other.expand(shape)
        values = a.values[:, None] * b.values[None]
        of_a = a.elements[:, None] * b.exists[None, :, None], a.slopes[:, None] * b.values[None, :, None]
        of_b = b.elements[None] * a.exists[:, None, None], b.slopes[None] * a.values[:, None, None]
        elements, slopes = (
            torch.cat([part.expand(*values.shape[:2], -1, *shape) for part in parts], 2)
            for parts in zip(of_a, of_b, strict=True)
        )
        joined = (part.flatten(0, 1) for part in (values, elements, slopes))
        return EdgeWeights(*joined, self.params or other.params)

    def scaled(self, factor: float) -> EdgeWeights:
        return self.times(EdgeWeights.constant(torch.tensor(factor, dtype=torch.float64)))

    def plus(self, other: EdgeWeights) -> EdgeWeights:
        """Sums, entry by entry: parallel edges."""
        shape = torch.broadcast_shapes(self.shape, other.shape)  # type: ignore[no-untyped-call]
        return stacked([self.expand(shape), other.expand(shape)], 0)

    def merged(self) -> EdgeWeights:
        """The parallel edges as one."""
        elements, slopes = (part.flatten(0, 1)[None] for part in (self.elements, self.slopes))
        return EdgeWeights(self.values.sum(0, keepdim=True), elements, slopes, self.params)

    def summed(self, dims: int) -> EdgeWeights:
        """The sum over the last dimensions: their entries become parallel edges."""
        parts = []
        for part, lead in ((self.values, 1), (self.elements, 2), (self.slopes, 2)):
            flat = part.flatten(part.ndim - dims).movedim(-1, 0) if dims else part[None]
            kept = self.shape[: len(self.shape) - dims]
            parts.append(flat.reshape(flat.shape[0] * flat.shape[1], *flat.shape[2 : lead + 1], *kept))
        return EdgeWeights(*parts, self.params)


def stacked(weights: list[EdgeWeights], dim: int) -> EdgeWeights:
    """Weights side by side along a dimension: 0 for parallel edges, -1 for the last dimension of their shape."""
    factors = max(weight.elements.shape[1] for weight in weights)
    parallel = max(len(weight.values) for weight in weights) if dim else 0
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for weight in weights:
        more = max(parallel - len(weight.values), 0)
        for found, part in zip(parts, (weight.values, weight.elements, weight.slopes), strict=True):
            missing = 0 if part is weight.values else factors - part.shape[1]
            pads = [0, 0] * len(weight.shape) + ([0, missing] if part is not weight.values else []) + [0, more]
            found.append(torch.nn.functional.pad(part, pads))
    return EdgeWeights(*(torch.cat(part, dim) for part in parts), any(weight.params for weight in weights))
