"""Sums of powers of paths: the mass of an edge is the absolute value of its weight to the power q."""

from __future__ import annotations

import functools
import math
import numbers
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.masses import MassFlow
from dagpath.passes.paths import Terms
from dagpath.passes.scratch import Scratch
from dagpath.passes.values import NOTHING, Mass, Watched, is_fetched, ldexp_, uses

_SAFE = {torch.float64: 2.0**300, torch.float32: 2.0**32}
"""Sums of masses up to here, and down to its inverse, leave room in the range of the type: for terms that are smaller,
for products with masses, and for derivatives."""
_TINY = {torch.float64: 2.0**-970, torch.float32: 2.0**-90}
"""Derivatives that are all smaller are about to leave the range of the type."""
_FAR = {torch.float64: 500, torch.float32: 50}
"""Derivatives of what is added to masses this many powers of two larger are carried at a scale of their own."""

OnGradient = Callable[[str, Tensor, int], None]
OnFactors = Callable[[str, Tensor, Tensor, int], None]


def checked_power(p: Any) -> float:
    """p as a float.

    Raises:
        ValueError: it makes no norm.
    """
    if not (isinstance(p, numbers.Real) and 1 <= float(p) < math.inf):
        raise ValueError(f"p must be a finite number of at least 1, got {p!r}")
    return float(p)


class Backward:
    """A backward pass whose derivatives may be further apart than the range of their type.

    Where a mass is added to a far larger one, the pass stops, and is resumed from there once it is over, at a scale
    of its own.

    Args:
        visit: called with the name of each parameter, d and k: its derivatives are ``d · 2**k``.
        visit_factors: called where they are a product, see :class:`PowerFlow`.
        dtype: of the derivatives.
    """

    def __init__(self, visit: OnGradient | None, visit_factors: OnFactors | None, dtype: torch.dtype) -> None:
        self._visit = visit
        self._visit_factors = visit_factors
        self._dtype = dtype
        self._log2_scale = 0
        self._resumes = False
        self._waiting: list[tuple[Tensor, Tensor, int]] = []
        self._parts: dict[str, list[tuple[Tensor, int]]] = {}
        self._lost: list[str] = []

    def resumed(self, values: Tensor, moved: Tensor, shift: int) -> Tensor:
        """``moved``, which is ``values · 2**shift``: their derivatives are found later."""
        self._resumes = True

        def wait(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            self._waiting.append((values, gradient, self._log2_scale + shift))

        moved.requires_grad_(True).register_post_accumulate_grad_hook(wait)  # type: ignore[no-untyped-call]
        return moved

    def hand_over(self, name: str, gradient: Tensor, log2_scale: int) -> None:
        """Take the derivatives of a parameter."""
        if self._is_lost(gradient):
            self._lost.append(name)
        if self._resumes:
            self._parts.setdefault(name, []).append((gradient, log2_scale + self._log2_scale))
        elif self._visit is not None:
            self._visit(name, gradient, log2_scale)

    def hand_over_factors(self, name: str, left: Tensor, right: Tensor, log2_scale: int) -> None:
        """Take the derivatives of a parameter, ``left[i] · right[j] · 2**log2_scale``."""
        if self._resumes or self._visit_factors is None:
            self.hand_over(name, left[:, None] * right, log2_scale)
            return
        if self._is_lost(left):
            self._lost.append(name)
        self._visit_factors(name, left, right, log2_scale)

    def _is_lost(self, gradient: Tensor) -> bool:
        largest = float(gradient.amax()) if gradient.numel() else 0.0
        return 0 < largest < _TINY[self._dtype] or math.isinf(largest)

    def run(self, total: Tensor) -> None:
        """The derivatives of a total, see :meth:`PowerFlow.backward`."""
        torch.autograd.backward(total, retain_graph=self._resumes)
        while self._waiting:
            values, gradient, log2_scale = self._waiting.pop()
            top = MassFlow.log2_of(gradient)
            if top != NOTHING:
                self._log2_scale = log2_scale + top
                torch.autograd.backward(values, MassFlow.shifted(gradient, -top), retain_graph=True)
        for name in list(self._parts):
            whole = self._together(name, self._parts.pop(name))
            if self._visit is not None:
                self._visit(name, *whole)
        if self._lost and bool(torch.isfinite(total)):
            wider = "use dtype=torch.float64" if self._dtype == torch.float32 else "scale its layers evenly first"
            raise OverflowError(
                f"the path masses through {self._lost[0]!r} leave the range of {self._dtype} beside those of all "
                f"paths: {wider}"
            )

    def _together(self, name: str, parts: list[tuple[Tensor, int]]) -> tuple[Tensor, int]:
        log2_scale = max(own + MassFlow.log2_of(gradient) for gradient, own in parts)
        if log2_scale < NOTHING // 2:  # all are zero
            return parts[0]
        moved = [MassFlow.shifted(gradient, own - log2_scale) for gradient, own in parts]
        whole = functools.reduce(torch.add, moved)
        if any(bool(((gradient > 0) & (whole == 0)).any()) for gradient, _ in parts):
            self._lost.append(name)
        return whole, log2_scale


class PowerFlow(MassFlow):
    """``Σ |Φ|^q`` over all paths, and its derivatives with respect to ``|θ|^q``.

    Args:
        graph, parameters, rule, cut, kept, dtype: see :class:`~dagpath.passes.masses.MassFlow`.
        power: q.
        on_gradient: if given, :meth:`backward` calls it with the name of each parameter, d and k, as soon as they are
            complete: ``d · 2**k`` is the derivative of the total's values with respect to ``|θ|^q``. Then d is freed.
        on_factors: if given too, it is called where a weight's derivatives are a product, with the name, both sides, k:
            ``left[i] · right[j] · 2**k`` is the derivative for the weight (i, j) of a linear layer.

    Attributes:
        mixed: was there an edge whose weight depends on several parameters?
        bases: parameter name -> the log2_scale of the masses that its derivatives belong to, see :class:`Watched`.
    """

    def __init__(
        self,
        *graph: Any,
        power: float,
        on_gradient: OnGradient | None = None,
        on_factors: OnFactors | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*graph, **options)
        self.records = on_gradient is not None
        self.power = power
        self.mixed = False
        self.bases: dict[str, list[int]] = {}
        places = (node for node in self.graph_inputs.module.graph.nodes if node.name in self.graph_inputs.parameters)
        largest = max((place.meta["val"].numel() for place in places), default=0)
        self._scratch = Scratch(largest * self.dtype.itemsize)
        self._on_gradient = on_gradient
        self._on_factors = on_factors
        self._backward = Backward(on_gradient, on_factors, self.dtype)

    @cached_property
    def _uses(self) -> Counter[str]:
        """How often calls read each parameter."""
        found: Counter[str] = Counter()
        for node in self.graph_inputs.module.graph.nodes:
            if node.name in self.graph_inputs.parameters:
                found[self.graph_inputs.parameters[node.name]] += uses(node)
        return found

    def parameter(self, name: str) -> Mass:
        return self._watched(name, self.fixed(self.parameters[name]))

    def factors_of(self, weight: Mass, x: Mass) -> Callable[[Mass], None] | None:
        """A linear layer whose inputs have the same masses at all positions: ``∂ total / ∂ mass = out · in``."""
        visit = self._on_factors
        if visit is None or not is_fetched(weight) or weight.values.ndim != 2:
            return None
        if not weight.values.numel() or not x.values.numel():
            return None
        rows = x.values.detach().reshape(-1, x.values.shape[-1])
        if not torch.allclose(rows, rows[:1], rtol=8 * torch.finfo(self.dtype).eps, atol=0):  # up to rounding
            return None
        assert weight.node is not None
        name, right, log2_scale = self.graph_inputs.parameters[weight.node.name], rows[0], x.log2_scale
        backward = self._backward

        def watch(result: Mass) -> None:
            shift = log2_scale - result.log2_scale

            def hand_over(gradient: Tensor) -> None:  # must not refer to the flow
                backward.hand_over_factors(name, gradient.reshape(-1, gradient.shape[-1]).sum(0), right, shift)

            result.values.requires_grad_(True).register_hook(hand_over)  # type: ignore[no-untyped-call]

        return watch

    def _watched(self, name: str, mass: Mass) -> Mass:
        if self._on_gradient is None:
            return mass
        base = self.bases[name] = [] if mass.zero and self._uses.get(name) == 1 else [mass.log2_scale]
        backward = self._backward

        def hand_over(leaf: Tensor) -> None:  # must not refer to the flow: autograd's cycles are never collected
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            backward.hand_over(name, gradient, -base[0] if base else 0)

        values = mass.values.requires_grad_(True)
        values.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
        return Watched(values, mass.log2_scale, mass.zero, params=True, base=base)

    def at(self, mass: Mass, log2_scale: int) -> Tensor:
        found = mass.made
        if isinstance(found, Watched) and found.zero:
            if not found.base:
                found.base.append(log2_scale)
            return self.shifted(found.values, found.base[0] - log2_scale)
        values, shift = found.values, found.log2_scale - log2_scale
        if found.zero or not self.is_far(shift) or not values.requires_grad:
            return super().at(mass, log2_scale)
        self.resumptions += 1
        return self._backward.resumed(values, self.shifted(values.detach(), shift), shift)

    def is_far(self, shift: int) -> bool:
        return self._on_gradient is not None and shift <= -_FAR[self.dtype]

    def backward(self, total: Mass) -> None:
        """Hand over the derivatives of the total.

        Raises:
            OverflowError: some of them leave the range of the type.
        """
        if total.values.requires_grad:
            self._backward.run(total.values)

    def fixed(self, weights: Tensor) -> Mass:
        """``|weights|^q``, in memory of its own. Where that leaves the floating-point range, with a power of two."""
        masses = self._magnitudes(weights)
        powers = masses if self.power == 1 else masses.pow_(self.power)
        if 1 / _SAFE[self.dtype] <= float(powers.sum()) <= _SAFE[self.dtype]:
            return Mass(powers)
        wide = weights.detach().to(self.device, torch.float64, copy=True).abs_()
        largest = float(wide.amax()) if wide.numel() else 0.0
        if largest == 0 or not math.isfinite(largest):
            return Mass(wide.pow_(self.power).to(self.dtype), zero=largest == 0)
        mantissa, log2_largest = math.frexp(largest)
        of_mantissa = self.power * math.log2(mantissa)
        log2_scale = math.floor(self.power * log2_largest + of_mantissa)
        wide = ldexp_(wide, -log2_largest).div_(mantissa).pow_(self.power)  # at most 1
        return Mass(wide.mul_(2.0 ** (self.power * log2_largest - log2_scale + of_mantissa)).to(self.dtype), log2_scale)

    def _magnitudes(self, weights: Tensor) -> Tensor:
        """``|weights|`` in the type of the pass, in memory of its own."""
        weights = weights.detach()
        lent = self._scratch.like(weights, self.dtype) if self.device.type == "cpu" else None
        if lent is None:
            wide = weights.to(self.device, self.dtype)
            return torch.abs(weights) if wide is weights else wide.abs_()
        return torch.abs(weights, out=lent) if weights.dtype == self.dtype else lent.copy_(weights).abs_()

    def edge(self, parts: Terms) -> Mass:
        """``|Σ coefficient · parameter|^q``; its derivative by ``|parameter|^q`` is ``|coefficient|^q``."""
        known = [(coefficient(self.real), weight) for coefficient, weight in parts]
        self.mixed = self.mixed or (len(known) > 1 and all(bool(factor.any()) for factor, _ in known))
        terms = (factor if weight is None else factor * self.real(weight) for factor, weight in known)
        whole = self.fixed(functools.reduce(torch.add, terms))
        values = whole.values
        for factor, weight in known:
            if weight is not None and self.records:
                slope = self.fixed(factor)
                moved = self.at(weight, whole.log2_scale - slope.log2_scale)
                values = values + (moved - moved.detach()) * slope.values
        return Mass(values, whole.log2_scale, whole.zero)
