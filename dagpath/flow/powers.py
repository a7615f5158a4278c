"""Sums of powers of paths: the mass of an edge is the absolute value of its weight to the power q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dagpath.flow.masses import FAST_LAYOUT, Coefficient, MassFlow
from dagpath.flow.values import Mass


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

    def masses_of(self, name: str) -> Tensor:
        """The masses of a parameter's elements, in memory of their own."""
        values: Tensor = self.power(self.parameters[name].detach())
        return values

    def parameter(self, name: str) -> Tensor:
        values = self.masses_of(name)
        visit = self._on_gradient
        if visit is not None:
            values.requires_grad_(True)

            def hand_over(leaf: Tensor) -> None:  # must not refer to the flow: autograd's cycles are never collected
                gradient, leaf.grad = leaf.grad, None
                assert gradient is not None
                visit(name, gradient)

            values.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
        return values

    def power(self, value: Any) -> Any:
        """``|value|^q``."""
        if not isinstance(value, Tensor):
            return abs(value) ** self.q
        value = value.abs() if value.is_complex() else value
        layout = FAST_LAYOUT.get(value.ndim, torch.preserve_format)
        copy = value.detach().to(self.device, self.dtype, copy=True, memory_format=layout)
        return copy.square_() if self.q == 2 else copy.abs_().pow_(self.q)

    def edge(self, parts: Sequence[tuple[Coefficient, Mass | None]]) -> Tensor:
        """``|Σ coefficient · parameter|^q``; its derivative by ``|parameter|^q`` is ``|coefficient|^q``."""
        known = [(coefficient(self.real), weight) for coefficient, weight in parts]
        if len(known) > 1:
            self.mixed |= all(bool(factor.any()) for factor, _ in known)
            terms = (factor if weight is None else factor * self.real(weight) for factor, weight in known)
            mass: Tensor = self.power(sum(terms))
        else:
            mass = self.power(known[0][0])
        for factor, weight in known:
            if weight is not None:
                masses = self.shifted(weight.values, weight.exponent)
                mass = mass + (masses - masses.detach()) * self.power(factor) if len(known) > 1 else mass * masses
        return mass
