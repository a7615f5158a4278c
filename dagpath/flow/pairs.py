"""Sums of products of the paths of two networks of one architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture import CapturedGraph
from dagpath.flow.constants import Constants
from dagpath.flow.masses import Coefficient, MassFlow
from dagpath.flow.values import NOTHING, Mass


class PairFlow(MassFlow):
    """``Σ Φ(θ) Φ(θ')`` over all paths, signs included. Both networks' parameters may require gradients.

    Args:
        graph, parameters, rule, cut, kept, dtype: see :class:`~dagpath.flow.masses.MassFlow`.
        others: the parameters θ' by name.
        other_graph: the graph of the other network, which has the same calls in the same order; its constants are used.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        *decided: Any,
        others: Mapping[str, Tensor],
        other_graph: CapturedGraph | None = None,
        **options: Any,
    ) -> None:
        super().__init__(graph, parameters, *decided, **options)
        self.records = any(tensor.requires_grad for tensor in (*parameters.values(), *others.values()))
        self._others = others
        second = other_graph or graph
        self._twin = dict(zip(graph.module.graph.nodes, second.module.graph.nodes, strict=True))
        self._readers: list[tuple[Callable[[fx.Node], fx.Node], Constants, Constants]] = [
            (lambda node: node, Constants(graph, parameters), Constants(graph, parameters, records=True)),
            (self._twin.__getitem__, Constants(second, others), Constants(second, others, records=True)),
        ]

    def parameter(self, name: str) -> Mass:
        first, second = (tensors[name].to(self.device, self.dtype) for tensors in (self.parameters, self._others))
        return self._mass(first * second)

    def _mass(self, values: Tensor) -> Mass:
        return Mass(values, zero=self.exponent_of(values) == NOTHING)

    def fixed(self, weights: Tensor) -> Mass:
        """Edges of the same constant weights in both networks."""
        return self._mass(weights.detach().to(self.device, self.dtype).square())

    def evaluated(self, node: fx.Node) -> Any:
        (find, constants, _), (find_other, other_constants, _) = self._readers
        first, second = constants(find(node)), other_constants(find_other(node))
        return pytree.tree_map(self._product, first, second)

    def _product(self, first: Any, second: Any) -> Any:
        if not isinstance(first, Tensor):
            return first
        if first is second or first.is_complex():
            return self.constant(first)
        values = first.detach().to(self.device, self.dtype) * second.detach().to(self.device, self.dtype)
        return self._mass(values.masked_fill(~values.isfinite(), 0.0))

    def edge(self, parts: Sequence[tuple[Coefficient, Mass | None]]) -> Mass:
        first, second = (self._value(parts, *reader) for reader in self._readers)
        return self._mass(first * second)

    def _value(
        self,
        parts: Sequence[tuple[Coefficient, Mass | None]],
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
        return functools.reduce(torch.add, terms).to(self.dtype)
