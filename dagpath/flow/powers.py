"""Sums of powers of paths: the mass of an edge is the absolute value of its weight to the power q."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dagpath.flow.masses import FAST_LAYOUT, Coefficient, MassFlow
from dagpath.flow.values import NOTHING, Mass, broadcast

_SAFE = {torch.float64: 1000, torch.float32: 120}
"""Powers of two up to here, and down to their inverses, are in the range of the type."""


class PowerFlow(MassFlow):
    """``Σ |Φ|^q`` over all paths, and its derivatives with respect to ``|θ|^q``.

    Args:
        graph, parameters, rule, cut, kept, dtype: see :class:`~dagpath.flow.masses.MassFlow`.
        exponent: q.
        on_gradient: if given, ``total().backward()`` calls it with the name of each parameter and the derivative of
            the total with respect to ``|θ|^q``, as soon as it is complete, and then frees it.

    Attributes:
        mixed: was there an edge whose weight depends on several parameters?
    """

    def __init__(
        self, *graph: Any, exponent: float, on_gradient: Callable[[str, Tensor], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*graph, **options)
        self.records = on_gradient is not None
        self.q = exponent
        self.mixed = False
        self._on_gradient = on_gradient

    def parameter(self, name: str) -> tuple[Tensor, int]:
        values, exponent = self.fixed(self.parameters[name].detach())
        return self._watched(name, values, exponent), exponent

    def _watched(self, name: str, values: Tensor, exponent: int) -> Tensor:
        visit = self._on_gradient
        if visit is not None:
            values.requires_grad_(True)

            def hand_over(leaf: Tensor) -> None:  # must not refer to the flow: autograd's cycles are never collected
                gradient, leaf.grad = leaf.grad, None
                assert gradient is not None
                visit(name, MassFlow.shifted(gradient, -exponent))

            values.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
        return values

    def fixed(self, weights: Tensor) -> tuple[Tensor, int]:
        """``|weights|^q``, in memory of its own. Where that leaves the floating-point range, with a power of two."""
        layout = FAST_LAYOUT.get(weights.ndim, torch.preserve_format)
        copy = weights.detach().to(self.device, self.dtype, copy=True, memory_format=layout)
        top = self.exponent_of(copy)
        if top == NOTHING or abs(top * self.q) <= _SAFE[self.dtype]:
            return (copy.square_() if self.q == 2 else copy.abs_().pow_(self.q)), 0
        largest = float(copy.abs_().amax())
        exponent = math.floor(math.log2(largest) * self.q)
        return copy.div_(largest).pow_(self.q).mul_(2.0 ** (math.log2(largest) * self.q - exponent)), exponent

    def edge(self, parts: Sequence[tuple[Coefficient, Mass | None]]) -> Mass:
        """``|Σ coefficient · parameter|^q``; its derivative by ``|parameter|^q`` is ``|coefficient|^q``."""
        known = [(coefficient(self.real), weight) for coefficient, weight in parts]
        if len(known) == 1:
            (factor, weight), (values, exponent) = known[0], self.fixed(known[0][0])
            if weight is not None:
                values, exponent = values * weight.values, exponent + weight.exponent
        else:
            self.mixed |= all(bool(factor.any()) for factor, _ in known)
            values, exponent = self.fixed(_sum(factor if w is None else factor * self.real(w) for factor, w in known))
            for factor, weight in known:
                if weight is not None and self.records:
                    slope, other = self.fixed(factor)
                    moved = (weight.values - weight.values.detach()) * slope
                    values = values + self.shifted(moved, weight.exponent + other - exponent)
        return Mass(values, exponent, zero=self.exponent_of(values) == NOTHING)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(broadcast(*terms)).sum(0)
