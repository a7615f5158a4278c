"""Sums of powers of paths: the mass of an edge is the absolute value of its weight to the power q."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dagpath.flow.masses import Coefficient, MassFlow
from dagpath.flow.scratch import Scratch
from dagpath.flow.values import Mass, is_fetched

_SAFE = {torch.float64: 2.0**960, torch.float32: 2.0**96}
"""Sums of masses up to here, and down to its inverse, are far inside the range of the type; so are their terms."""


def checked_power(p: Any) -> float:
    """p as a float.

    Raises:
        ValueError: it makes no norm.
    """
    if not (isinstance(p, numbers.Real) and 1 <= float(p) < math.inf):
        raise ValueError(f"p must be a finite number of at least 1, got {p!r}")
    return float(p)


class PowerFlow(MassFlow):
    """``Σ |Φ|^q`` over all paths, and its derivatives with respect to ``|θ|^q``.

    Args:
        graph, parameters, rule, cut, kept, dtype: see :class:`~dagpath.flow.masses.MassFlow`.
        exponent: q.
        on_factors: if given too, it is called in place of ``on_gradient`` where a weight's derivatives are a product,
            with its name and the two sides: ``left[i] · right[j]`` for the mass that leads from j to i.
        on_gradient: if given, ``total().backward()`` calls it with the name of each parameter and the derivative of
            the total with respect to ``|θ|^q``, as soon as it is complete, and then frees it.

    Attributes:
        mixed: was there an edge whose weight depends on several parameters?
    """

    def __init__(
        self,
        *graph: Any,
        exponent: float,
        on_gradient: Callable[[str, Tensor], None] | None = None,
        on_factors: Callable[[str, Tensor, Tensor], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*graph, **options)
        self.records = on_gradient is not None
        self.q = exponent
        self.mixed = False
        places = (node for node in self.graph_inputs.module.graph.nodes if node.name in self.graph_inputs.parameters)
        largest = max((place.meta["val"].numel() for place in places), default=0)
        self._scratch = Scratch(largest * self.dtype.itemsize)
        self._on_gradient = on_gradient
        self._on_factors = on_factors

    def parameter(self, name: str) -> Mass:
        return self._watched(name, self.fixed(self.parameters[name]))

    def factors_of(self, weight: Mass, x: Mass) -> Callable[[Mass], None] | None:
        """A linear layer whose inputs have the same masses at all positions: ``∂ total / ∂ mass = out · in``."""
        visit = self._on_factors
        if visit is None or not is_fetched(weight) or weight.values.ndim != 2:
            return None
        rows = x.values.detach().reshape(-1, x.values.shape[-1])
        if not len(rows) or not bool((rows == rows[0]).all()):
            return None
        assert weight.node is not None
        name, right, exponent = self.graph_inputs.parameters[weight.node.name], rows[0], x.exponent

        def watch(result: Mass) -> None:
            shift = exponent - result.exponent

            def hand_over(gradient: Tensor) -> None:  # must not refer to the flow
                left = gradient.reshape(-1, gradient.shape[-1]).sum(0)
                powers = [MassFlow.exponent_of(side) for side in (left, right)]
                half = (sum(powers) + shift) // 2
                halves = half, sum(powers) + shift - half
                sides = (
                    MassFlow.shifted(MassFlow.shifted(side, -power), whole)
                    for side, power, whole in zip((left, right), powers, halves, strict=True)
                )
                visit(name, *sides)

            result.values.requires_grad_(True).register_hook(hand_over)  # type: ignore[no-untyped-call]

        return watch

    def _watched(self, name: str, mass: Mass) -> Mass:
        visit, values, exponent = self._on_gradient, mass.values, mass.exponent
        if visit is not None:
            values.requires_grad_(True)

            def hand_over(leaf: Tensor) -> None:  # must not refer to the flow: autograd's cycles are never collected
                gradient, leaf.grad = leaf.grad, None
                assert gradient is not None
                visit(name, MassFlow.shifted(gradient, -exponent))

            values.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
        return mass

    def fixed(self, weights: Tensor) -> Mass:
        """``|weights|^q``, in memory of its own. Where that leaves the floating-point range, with a power of two."""
        masses = self._magnitudes(weights)
        powers = masses if self.q == 1 else masses.pow_(self.q)
        if 1 / _SAFE[self.dtype] <= float(powers.sum()) <= _SAFE[self.dtype]:
            return Mass(powers)
        masses = masses if self.q == 1 else self._magnitudes(weights)
        largest = float(masses.amax()) if masses.numel() else 0.0
        if largest == 0 or not math.isfinite(largest):
            return Mass(masses.pow_(self.q), zero=largest == 0)
        exponent = math.floor(math.log2(largest) * self.q)
        return Mass(masses.div_(largest).pow_(self.q).mul_(2.0 ** (math.log2(largest) * self.q - exponent)), exponent)

    def _magnitudes(self, weights: Tensor) -> Tensor:
        """``|weights|`` in the type of the pass, in memory of its own."""
        weights = weights.detach()
        lent = self._scratch.like(weights, self.dtype) if self.device.type == "cpu" else None
        if lent is None:
            wide = weights.to(self.device, self.dtype)
            return torch.abs(weights) if wide is weights else wide.abs_()
        return torch.abs(weights, out=lent) if weights.dtype == self.dtype else lent.copy_(weights).abs_()

    def edge(self, parts: Sequence[tuple[Coefficient, Mass | None]]) -> Mass:
        """``|Σ coefficient · parameter|^q``; its derivative by ``|parameter|^q`` is ``|coefficient|^q``."""
        known = [(coefficient(self.real), weight) for coefficient, weight in parts]
        self.mixed = self.mixed or (len(known) > 1 and all(bool(factor.any()) for factor, _ in known))
        terms = (factor if weight is None else factor * self.real(weight) for factor, weight in known)
        whole = self.fixed(functools.reduce(torch.add, terms))
        values = whole.values
        for factor, weight in known:
            if weight is not None and self.records:
                slope = self.fixed(factor)
                moved = (weight.values - weight.values.detach()) * slope.values
                values = values + self.shifted(moved, weight.exponent + slope.exponent - whole.exponent)
        return Mass(values, whole.exponent, whole.zero)
