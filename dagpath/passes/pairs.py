"""Sums of products of the paths of two networks of one architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture.graph import CapturedGraph
from dagpath.passes.constants import Constants
from dagpath.passes.masses import MassFlow
from dagpath.passes.paths import Terms
from dagpath.passes.values import NOTHING, Mass, dense

_EVEN = {torch.float64: 150, torch.float32: 16}
"""Tensors whose largest entry is between 2**-e and 2**e are multiplied as they are."""
_FAR = {torch.float64: 900, torch.float32: 90}
"""Derivatives of what is added to masses this many powers of two larger may leave the range of the type."""

Scaled = tuple[Tensor, int]
"""Values and the power of two beside them."""


class PairFlow(MassFlow):
    """``Σ Φ(θ) Φ(θ')`` over all paths, signs included. Both networks' parameters may require gradients.

    Args:
        graph, parameters, rule, cut, kept, dtype: see :class:`~dagpath.passes.masses.MassFlow`.
        others: the parameters θ' by name.
        other_graph: the graph of the other network, which has the same calls in the same order; its constants are used.
        leaves: of both networks, the values and powers of two that some parameters were computed from, by name.

    Raises:
        OverflowError: a gradient would leave the range of the type.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        *decided: Any,
        others: Mapping[str, Tensor],
        other_graph: CapturedGraph | None = None,
        leaves: Sequence[Mapping[str, Scaled]] = ({}, {}),
        **options: Any,
    ) -> None:
        super().__init__(graph, parameters, *decided, **options)
        self.records = any(tensor.requires_grad for tensor in (*parameters.values(), *others.values()))
        self._sides = tuple(zip((parameters, others), leaves, strict=True))
        second = other_graph or graph
        self._twin = dict(zip(graph.module.graph.nodes, second.module.graph.nodes, strict=True))
        self._readers: list[tuple[Callable[[fx.Node], fx.Node], Constants, Constants]] = [
            (lambda node: node, Constants(graph, parameters), Constants(graph, parameters, records=True)),
            (self._twin.__getitem__, Constants(second, others), Constants(second, others, records=True)),
        ]

    def parameter(self, name: str) -> Mass:
        first, second = (known.get(name) or self.scaled_of(tensors[name]) for tensors, known in self._sides)
        return self._pair(first, second)

    def scaled_of(self, tensor: Tensor) -> Scaled:
        """A tensor in the type of the pass, of a size whose square is in its range."""
        return scaled(tensor.to(self.device), self.dtype)

    def _pair(self, first: Scaled, second: Scaled) -> Mass:
        values = first[0] * second[0]
        return Mass(values, first[1] + second[1], zero=self.log2_of(values) == NOTHING)

    def fixed(self, weights: Tensor) -> Mass:
        """Edges of the same constant weights in both networks."""
        weight = self.scaled_of(weights.detach())
        return self._pair(weight, weight)

    def is_far(self, shift: int) -> bool:
        return self.records and shift <= -_FAR[self.dtype]

    def at(self, mass: Mass, log2_scale: int) -> Tensor:
        shift = mass.log2_scale - log2_scale
        if mass.values.requires_grad and self.is_far(min(-2 * shift, shift) if mass.zero else shift):
            wider = "use dtype=torch.float64" if self.dtype == torch.float32 else "scale the layers evenly first"
            raise OverflowError(
                f"the path masses in {self.node} are 2**{shift} of what they are added to, beyond the range of "
                f"{self.dtype}: {wider}"
            )
        return super().at(mass, log2_scale)

    def evaluated(self, node: fx.Node) -> Any:
        (find, constants, _), (find_other, other_constants, _) = self._readers
        first, second = constants(find(node)), other_constants(find_other(node))
        return pytree.tree_map(self._product, first, second)

    def _product(self, first: Any, second: Any) -> Any:
        if not isinstance(first, Tensor):
            return first
        if first is second or first.is_complex():
            return self.constant(first)
        first, second = dense(first), dense(second)
        known = (tensor.detach().masked_fill(~tensor.isfinite(), 0.0) for tensor in (first, second))
        return self._pair(*map(self.scaled_of, known))

    def inverse(self, mass: Mass) -> Mass:
        if mass.data or mass.node is None:  # a gate, a number: the same in both networks
            return super().inverse(mass)
        values = (constants(find(mass.node)) for find, constants, _ in self._readers)
        inverses = (1 / value.detach().to(torch.float64) for value in values)
        return self._pair(*(self.scaled_of(inverse.masked_fill(inverse.isinf(), 0.0)) for inverse in inverses))

    def edge(self, parts: Terms) -> Mass:
        first, second = (self.scaled_of(self._value(parts, *reader)) for reader in self._readers)
        return self._pair(first, second)

    def _value(
        self,
        parts: Terms,
        find: Callable[[fx.Node], fx.Node],
        constants: Constants,
        weights: Constants,
    ) -> Tensor:
        """The true weight of edges in one of the networks."""

        def read(source: Constants, mass: Mass) -> Tensor:
            assert mass.node is not None
            value: Tensor = source(find(mass.node))
            return value.to(self.device, torch.float64)

        terms = [
            factor if weight is None else factor * read(weights, weight)
            for coefficient, weight in parts
            for factor in [coefficient(lambda mass: read(constants, mass))]
        ]
        return functools.reduce(torch.add, terms)


def scaled(tensor: Tensor, dtype: torch.dtype) -> Scaled:
    """A copy of a tensor in another type, and the power of two beside it; 0 where its size is even."""
    tensor = tensor if tensor.is_floating_point() else tensor.to(dtype)
    top = MassFlow.log2_of(tensor)
    log2_scale = top if top != NOTHING and abs(top) > _EVEN[dtype] else 0
    wide = tensor.double() if log2_scale else tensor
    return MassFlow.shifted(wide, -log2_scale).to(dtype, copy=not log2_scale), log2_scale
