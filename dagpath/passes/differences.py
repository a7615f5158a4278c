"""Sums over the differences of the paths of two networks, without the loss of digits that a difference of sums has.

On the way from one network to the other, every edge moves on a straight line. What a sum over paths gains on the way is
the integral of its derivative, which vanishes with the difference of the edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.passes.pairs import PairFlow, Scaled
from dagpath.passes.values import NOTHING, Mass


class DifferenceFlow(PairFlow):
    """``Σ Φ(s) Φ(t)`` over all paths, with edges ``w' + s (w − w')`` in one factor, ``w' + t (w − w')`` in the other.

    Its mixed derivative by s and t is ``Σ (dΦ/ds) (dΦ/dt)``, and the integral of that over both from 0 to 1 is
    ``Σ (Φ(θ) − Φ(θ'))²``.

    Args:
        graph, parameters, rule, cut, kept, others, other_graph, dtype: see :class:`~dagpath.passes.pairs.PairFlow`.
        places: s and t, two numbers.
    """

    def __init__(self, *graph: Any, places: tuple[float, float], **options: Any) -> None:
        super().__init__(*graph, **options)
        self.records = True
        s, t = (torch.tensor(place, dtype=self.dtype, device=self.device, requires_grad=True) for place in places)
        self._places = s, t

    def _pair(self, first: Scaled, second: Scaled) -> Mass:
        (one, other), log2_scale = self._aligned(first, second)
        s, t = self._places
        values = (other + s * (one - other)) * (other + t * (one - other))
        return Mass(values, 2 * log2_scale, zero=self.log2_of(values) == NOTHING)

    def _aligned(self, first: Scaled, second: Scaled) -> tuple[tuple[Tensor, Tensor], int]:
        log2_scale = max(first[1], second[1])
        one, other = (self.shifted(values, power - log2_scale) for values, power in (first, second))
        return (one, other), log2_scale

    def derivative(self) -> Mass:
        """The mixed derivative by s and t of the sum over all paths, as a mass of one entry, of any sign."""
        total = self.total()
        s, t = self._places
        gained = torch.zeros_like(total.values)
        if total.values.requires_grad:
            (slope,) = torch.autograd.grad(total.values, s, create_graph=True, materialize_grads=True)
            if slope.requires_grad:
                (gained,) = torch.autograd.grad(slope, t, materialize_grads=True)
        return Mass(gained.detach(), total.log2_scale, zero=not bool(gained))


class GapFlow(DifferenceFlow):
    """``Σ |Φ|`` over all paths, with edges that lie at t between ``min(|w|, |w'|)`` and ``max(|w|, |w'|)``.

    Attributes:
        signs_agree: has no edge another sign in the other network?
        first_is_above, second_is_above: are its edges nowhere smaller than those of the other, in absolute value?
    """

    def __init__(self, *graph: Any, place: float, **options: Any) -> None:
        super().__init__(*graph, places=(place, place), **options)
        self.signs_agree = self.first_is_above = self.second_is_above = True

    def _pair(self, first: Scaled, second: Scaled) -> Mass:
        (one, other), log2_scale = self._aligned(first, second)
        self.signs_agree = self.signs_agree and bool((one.sign() * other.sign() >= 0).all())
        one, other = one.abs(), other.abs()
        self.first_is_above = self.first_is_above and bool((one >= other).all())
        self.second_is_above = self.second_is_above and bool((other >= one).all())
        low = torch.minimum(one, other)
        values = low + self._places[1] * (torch.maximum(one, other) - low)
        return Mass(values, log2_scale, zero=self.log2_of(values) == NOTHING)

    def derivative(self) -> Mass:
        """The derivative by t of the sum over all paths."""
        total = self.total()
        gained = torch.zeros_like(total.values)
        if total.values.requires_grad:
            (gained,) = torch.autograd.grad(total.values, self._places[1], materialize_grads=True)
        return Mass(gained.detach(), total.log2_scale, zero=not bool(gained))
