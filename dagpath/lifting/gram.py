"""The path Gram matrix ``G = ∂Φᵀ∂Φ``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.masses import MassFlow
from dagpath.passes.powers import OnGradient, PowerFlow
from dagpath.passes.values import NOTHING, ldexp_
from dagpath.runtime.fetched import device_of
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced

_LEAST = math.ulp(0.0)


def visit_gram_diagonal(traced: TracedModel, visit: OnGradient) -> int:
    """Hand ``diag(G)`` to ``visit``, parameter by parameter as the backward pass completes each.

    It gets the name, d and k: this part of the diagonal is ``d · 2**(k + log2_scale)``. A parameter that no path meets
    is not visited. Nothing is kept: the memory of each part is freed after its visit.

    Returns:
        The logarithm to base 2 of the scale.

    Raises:
        OverflowError: see :func:`gram_diagonal`.
    """
    flow = traced.masses(PowerFlow, power=2, on_gradient=visit)
    total = flow.total()
    flow.backward(total)
    return total.log2_scale


def visit_common_gram_diagonal(
    traced: TracedModel,
    visit: Callable[[str, Tensor], None],
    visit_factors: Callable[[str, Tensor, Tensor], None] | None = None,
) -> int:
    """The same, all parts at one scale: ``diag(G) / 2**log2_scale``.

    If ``visit_factors`` is given, it gets those of linear layers, as ``left[i] · right[j]`` for the weight (i, j).

    Where a part is so far below the others that it leaves the range of float64 there, its positive elements are the
    smallest positive number: no sum sees it, and they still count.
    """
    bases: dict[str, list[int]] = {}
    top: list[int] = []

    def aligned(name: str, gradient: Tensor, log2_scale: int) -> None:  # must not refer to the flow, which refers to it
        visit(name, _moved(gradient, log2_scale - the_top(), _LEAST))

    def the_top() -> int:
        if not top:
            top.append(max((-base[0] for base in bases.values() if base), default=0))
        return top[0]

    def aligned_factors(name: str, left: Tensor, right: Tensor, log2_scale: int) -> None:
        assert visit_factors is not None
        own = [MassFlow.log2_of(side) for side in (left, right)]
        shift = log2_scale - the_top() + sum(own) if min(own) > NOTHING else 0
        halves = (shift // 2 - own[0], shift - shift // 2 - own[1]) if min(own) > NOTHING else (0, 0)
        visit_factors(name, *(_moved(*side, math.sqrt(_LEAST)) for side in zip((left, right), halves, strict=True)))

    options = {"on_factors": None if visit_factors is None else aligned_factors}
    flow = traced.masses(PowerFlow, power=2, on_gradient=aligned, **options)
    total = flow.total()
    bases.update(flow.bases)
    flow.backward(total)
    return total.log2_scale + (top[0] if top else 0)


def _moved(values: Tensor, shift: int, least: float) -> Tensor:
    """``values * 2**shift``; what is positive stays at least at the least number."""
    moved = MassFlow.shifted(values, shift)
    return torch.where(values > 0, moved.clamp_min(least), moved) if shift else moved


def collected_gradients(traced: TracedModel, log: bool, kind: type[PowerFlow], **options: Any) -> dict[str, Tensor]:
    """The derivatives of a sum over paths with respect to each parameter's masses, or their natural logarithms."""
    found: dict[str, Tensor] = {}
    log2_scales: dict[str, int] = {}

    def visit(name: str, gradient: Tensor, log2_scale: int) -> None:
        found[name], log2_scales[name] = gradient, log2_scale

    flow = traced.masses(kind, on_gradient=visit, **options)
    total = flow.total()
    flow.backward(total)
    result = {}
    device = device_of(traced.values)
    for name, shape in traced.graph.shapes.items():
        values, log2_scale = found.pop(name, None), total.log2_scale + log2_scales.get(name, 0)
        if values is None:
            values = torch.zeros(shape, dtype=options.get("dtype", torch.float64), device=device)
        result[name] = values.log_().add_(log2_scale * math.log(2)) if log else ldexp_(values, log2_scale)
    return result


@plain_computation()
def gram_diagonal(traced: TracedModel, log: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The diagonal of the path Gram matrix, ``G_ee = Σ_{p ∋ e} (Φ_p / θ_e)²``, at the parameters' current values.

    G_ee is the squared mass that arrives at the source of e times the squared mass that leaves its destination, summed
    over the positions where e is used. Under a rescaling by ``exp(z)`` it becomes ``G_ee exp(−2 (B z)_e)``.

    Where a path meets a parameter more than once (a weight shared by layers that follow each other), each meeting is
    counted as an element of its own, and the masses are summed. A weight that is a sum of parameters counts as parallel
    edges, one that is a product of parameters as edges in a row: ``W + B A`` is two branches.

    Args:
        traced: the traced model.
        log: return natural logarithms (-inf for zero), which are finite where G itself leaves the range of its type.
        dtype: of the pass and the result, float64 or float32.

    Returns:
        parameter name -> tensor of its shape, in the order of ``model.named_parameters()``. Zero for
        parameters that no path meets, such as the slope of a PReLU or a layer that eval mode does not use.

    Parameters may be of any size, and layers of any sizes beside each other: each has a scale of its own. Within
    one tensor, of a parameter or an activation, a mass below 1e-308 (1e-38 in float32) of the largest counts as zero.

    Raises:
        OverflowError: the masses through a parameter leave the range of the type beside those of all paths, as in
            perceptrons of a thousand layers whose biases carry more than what comes from below.
        ValueError: another dtype.

    Cost: one forward and one backward pass at batch 1. Source: Lebeurrier, Vayer, Gribonval 2026.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> with torch.no_grad():
        ...     for parameter in net.parameters():
        ...         _ = parameter.fill_(3.0)
        >>> gram = dagpath.gram_diagonal(dagpath.trace(net, torch.zeros(1, 2)))
        >>> {name: values.tolist() for name, values in gram.items()}
        {'0.weight': [[9.0, 9.0]], '2.weight': [[18.0]], '2.bias': [1.0]}
    """
    require_traced(traced)
    return collected_gradients(traced, log, PowerFlow, power=2, dtype=dtype)
