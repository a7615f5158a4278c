"""What to balance: each criterion turns a traced model into a problem of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dagpath.errors import BalanceError
from dagpath.lifting.gram import visit_gram_diagonal
from dagpath.solver import LogOuter, MassAggregator, Problem
from dagpath.trace import TracedModel


class Criterion(Protocol):
    """Anything with a :meth:`problem`: the model's masses, summed per pair of groups, and a convex function of them."""

    def problem(self, traced: TracedModel, bound: float, device: torch.device) -> Problem: ...


@dataclass(frozen=True)
class PathConditioning:
    """Align the path Gram matrix with a multiple of a diagonal reference R, by default the identity.

    In the log-det Bregman divergence, minimized over the multiple too, only the diagonal of G matters:

        F(z) = p log Σ_e g_e exp(−2 (B z)_e) + 2 · 1ᵀ B z,        g_e = G_ee / r_e

    The sums run over the live parameters, those with ``g_e > 0``; p is their number.

    Attributes:
        reference: None for the identity, or {parameter name: positive float or tensor of the parameter's shape}.

    Source: Lebeurrier, Vayer, Gribonval 2026.
    """

    reference: Mapping[str, float | Tensor] | None = None

    def problem(self, traced: TracedModel, bound: float, device: torch.device) -> Problem:
        """The criterion at the parameters' current values, as numbers.

        Raises:
            ValueError: the reference lacks a parameter, names another, or is not positive and finite.
            BalanceError: path masses leave the range of float64.
        """
        graph = traced.graph
        reference = self._checked_reference(graph.shapes)
        masses = MassAggregator(graph.num_groups, device)

        def visit(name: str, gram: Tensor) -> None:
            if not bool(torch.isfinite(gram.sum())):
                raise BalanceError(
                    f"the path masses through {name!r} are not finite, though all weights are: look for a negative "
                    "running variance behind it, or for weights beyond the range of float64 once squared"
                )
            if reference is not None:
                gram = gram / torch.as_tensor(reference[name]).to(gram)
            masses.add(gram, graph.ends[name].dst, graph.ends[name].src)

        exponent = visit_gram_diagonal(traced, visit)
        p = masses.num_live
        return Problem(
            matrix=masses.matrix(),
            outer=LogOuter(p),
            kappa=-2.0,
            linear=2 * masses.balance[1:],
            scale=max(p, 1),
            bound=bound,
            offset=p * exponent * math.log(2) if p else 0.0,
            live=p,
        )

    def _checked_reference(self, shapes: Mapping[str, torch.Size]) -> Mapping[str, float | Tensor] | None:
        if self.reference is None:
            return None
        if not isinstance(self.reference, Mapping):
            raise TypeError(f"a reference maps parameter names to values, got {type(self.reference).__name__}")
        missing = [name for name in shapes if name not in self.reference]
        if missing:
            raise ValueError(f"the reference has no entry for {missing[0]!r} ({len(missing)} missing in all)")
        for name, value in self.reference.items():
            tensor = torch.as_tensor(value)
            if name not in shapes:
                raise ValueError(f"the reference names {name!r}, which is no parameter of the model")
            if tensor.ndim and tensor.shape != shapes[name]:
                raise ValueError(
                    f"the reference of {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(shapes[name])}"
                )
            if not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
                raise ValueError(f"the reference of {name!r} must be positive and finite everywhere")
        return self.reference


_BY_NAME: dict[str, type[Criterion]] = {"pathcond": PathConditioning}


def criterion_of(criterion: str | Criterion) -> Criterion:
    """A criterion by its name, or the criterion itself."""
    if isinstance(criterion, str):
        if criterion not in _BY_NAME:
            raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(map(repr, _BY_NAME))}")
        return _BY_NAME[criterion]()
    if isinstance(criterion, type):
        raise TypeError(f"a criterion is an instance: pass {criterion.__name__}(), not {criterion.__name__}")
    if not hasattr(criterion, "problem"):
        raise TypeError(f"a criterion is a name or has a method problem(), got {type(criterion).__name__}")
    return criterion
