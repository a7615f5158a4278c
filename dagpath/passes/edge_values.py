"""What stands for a tensor while the unrolled graph is built: nodes for activations, weights of edges for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from dagpath.passes.values import Operand, dense


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
class Slots(Operand):
    """A factor of a product that is a gate of each edge.

    Attributes:
        numbers: int64 tensor of its shape: the numbers of the gates.
    """

    numbers: Tensor
    params: bool = False
    node: fx.Node | None = None
    data: bool = False


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
        tensor = dense(tensor)
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

        def looked_up(part: Tensor) -> Tensor:
            flat = part.flatten(part.ndim - len(self.shape)) if self.shape else part[..., None]
            return torch.nn.functional.pad(flat, (1, 0))[..., places]

        return EdgeWeights(looked_up(self.values), looked_up(self.elements), looked_up(self.slopes), self.params)

    def expand(self, shape: torch.Size) -> EdgeWeights:
        aligned = (1,) * (len(shape) - len(self.shape)) + tuple(self.shape)

        def expanded(part: Tensor) -> Tensor:
            lead = part.shape[: part.ndim - len(self.shape)]
            return part.view(*lead, *aligned).expand(*lead, *shape)

        return EdgeWeights(expanded(self.values), expanded(self.elements), expanded(self.slopes), self.params)

    def times(self, other: EdgeWeights) -> EdgeWeights:
        """Products, entry by entry: edges in a row."""
        shape = torch.broadcast_shapes(self.shape, other.shape)  # type: ignore[no-untyped-call]
        a, b = self.expand(shape), other.expand(shape)
        values = a.values[:, None] * b.values[None]
        elements = a.elements[:, None] * b.exists[None, :, None], b.elements[None] * a.exists[:, None, None]
        slopes = a.slopes[:, None] * b.values[None, :, None], b.slopes[None] * a.values[:, None, None]
        params = self.params or other.params
        return EdgeWeights(
            values.flatten(0, 1), torch.cat(elements, 2).flatten(0, 1), torch.cat(slopes, 2).flatten(0, 1), params
        )

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

        def aside(part: Tensor) -> Tensor:
            return part.flatten(part.ndim - dims).movedim(-1, 0).flatten(0, 1) if dims else part

        return EdgeWeights(aside(self.values), aside(self.elements), aside(self.slopes), self.params)


def stacked(weights: Sequence[EdgeWeights], dim: int) -> EdgeWeights:
    """Weights side by side along a dimension: 0 for parallel edges, -1 for the last dimension of their shape."""
    factors = max(weight.elements.shape[1] for weight in weights)
    parallel = max(len(weight.values) for weight in weights) if dim else 0

    def side_by_side(parts: Sequence[Tensor], lead: int) -> Tensor:
        padded = []
        for part in parts:
            pads = [0, 0] * (part.ndim - lead)
            pads += [0, factors - part.shape[1]] if lead == 2 else []
            padded.append(torch.nn.functional.pad(part, [*pads, 0, max(parallel - len(part), 0)]))
        return torch.cat(padded, dim)

    return EdgeWeights(
        side_by_side([weight.values for weight in weights], 1),
        side_by_side([weight.elements for weight in weights], 2),
        side_by_side([weight.slopes for weight in weights], 2),
        any(weight.params for weight in weights),
    )
