"""The path Gram matrix that an initialization leads one to expect."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dagpath.lifting.gram import collected_gradients
from dagpath.passes.paths import Terms
from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import NOTHING, Mass, ldexp_
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced


class MomentFlow(PowerFlow):
    """``E Σ Φ²`` over all paths, for independent parameters of given second moments."""

    def __init__(self, *graph: Any, moments: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__(*graph, power=2, **options)
        self._moments = moments

    def parameter(self, name: str) -> Mass:
        moments = self._moments[name].to(self.device, self.dtype, copy=True)
        top = self.log2_of(moments)
        log2_scale = top if top != NOTHING and abs(top) > 300 else 0
        return self._watched(name, Mass(ldexp_(moments, -log2_scale), log2_scale, zero=top == NOTHING))

    def edge(self, parts: Terms) -> Mass:
        """``Σ coefficient² · E parameter²``: parameters of mean zero, so that mixed terms vanish."""
        one = self.number(1.0)
        terms = [(self.fixed(coefficient(self.real)), weight or one) for coefficient, weight in parts]
        log2_scales = [
            square.log2_scale + weight.log2_scale for square, weight in terms if not (square.zero or weight.zero)
        ]
        log2_scale = max(log2_scales, default=0)
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for square, weight in terms:
            total = total + square.values * self.at(weight, log2_scale - square.log2_scale)
        return Mass(total, log2_scale, zero=not log2_scales)


@plain_computation()
def expected_gram_diagonal(
    traced: TracedModel, second_moments: Mapping[str, float | Tensor], log: bool = False
) -> dict[str, Tensor]:
    """``E[diag(G)]`` over independent random parameters, exactly and without sampling.

    ``G_ee`` sums products of squares of distinct parameters, so the expectation passes inside: it is the pass of
    :func:`gram_diagonal` with ``θ_e²`` replaced by ``E[θ_e²]``, the variance plus the squared mean. For a batch norm at
    its initialization that is 1 for γ and 0 for β.

    Args:
        traced: the traced model.
        second_moments: parameter name -> ``E[θ_e²]``, a number or a tensor of the parameter's shape.
        log: return natural logarithms, which are finite where G itself leaves float64.

    Returns:
        As :func:`gram_diagonal`.

    Where a path meets a parameter twice (shared weights), the parameters on a path are not distinct, and each meeting
    counts as an element of its own. A batch norm's running mean, which is zero at initialization, adds
    ``mean² γ² / σ²`` to its bias edge: exact for β of mean zero.

    Raises:
        ValueError: a parameter has no moment, one that is unknown has, or moments are negative, not finite or of
            another shape.
        TypeError: a moment is neither a number nor a tensor.

    Cost: one forward and one backward pass in float64 at batch 1.

    Example:
        >>> import torch, dagpath
        >>> layers = torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False)
        >>> traced = dagpath.trace(torch.nn.Sequential(*layers), torch.zeros(1, 4))
        >>> expected = dagpath.expected_gram_diagonal(traced, {"0.weight": 1 / 4, "2.weight": 1 / 8})
        >>> {name: float(values.mean()) for name, values in expected.items()}  # 2 outputs · 1/8, and 4 inputs · 1/4
        {'0.weight': 0.25, '2.weight': 1.0}
    """
    require_traced(traced)
    moments = {name: _checked(traced, second_moments, name) for name in traced.graph.shapes}
    unknown = [name for name in second_moments if name not in moments]
    if unknown:
        raise ValueError(f"second_moments names {unknown[0]!r}, which is no parameter of the model")
    return collected_gradients(traced, log, MomentFlow, moments=moments)


def _checked(traced: TracedModel, second_moments: Mapping[str, float | Tensor], name: str) -> Tensor:
    if name not in second_moments:
        raise ValueError(f"second_moments has no entry for {name!r}")
    given = second_moments[name]
    if not isinstance(given, (Tensor, numbers.Real)):
        raise TypeError(f"the moments of {name!r} must be a number or a Tensor, got {type(given).__name__}")
    moment = torch.as_tensor(given, dtype=torch.float64)
    shape = traced.graph.shapes[name]
    if moment.ndim and moment.shape != shape:
        raise ValueError(f"the moments of {name!r} have shape {tuple(moment.shape)}, the parameter {tuple(shape)}")
    bad = moment[~((moment >= 0) & moment.isfinite())]
    if len(bad):
        raise ValueError(f"the moments of {name!r} must be finite and not negative, got {float(bad[0])}")
    return moment.expand(shape)
