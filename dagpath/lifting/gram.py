"""The path Gram matrix ``G = ∂Φᵀ∂Φ``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dagpath.fetched import device_of
from dagpath.flow.powers import PowerFlow
from dagpath.flow.values import ldexp_
from dagpath.state import plain_computation
from dagpath.trace import TracedModel, require_traced


def visit_gram_diagonal(
    traced: TracedModel,
    visit: Callable[[str, Tensor], None],
    dtype: torch.dtype = torch.float64,
    visit_factors: Callable[[str, Tensor, Tensor], None] | None = None,
) -> int:
    """Hand ``diag(G) / 2**exponent`` to ``visit``, parameter by parameter as the backward pass completes each.

    A parameter that no path meets is not visited. Nothing is kept: the memory of each part is freed after its visit.
    If ``visit_factors`` is given, it gets those of linear layers, as ``left[i] · right[j]`` for the weight (i, j).

    Returns:
        The exponent.
    """
    options = {"on_gradient": visit, "on_factors": visit_factors}
    return _backward(traced.masses(PowerFlow, exponent=2, dtype=dtype, **options))


def _backward(flow: PowerFlow) -> int:
    total = flow.total()
    if total.values.requires_grad:
        torch.autograd.backward(total.values)
    return total.exponent


def collected_gradients(traced: TracedModel, log: bool, kind: type[PowerFlow], **options: Any) -> dict[str, Tensor]:
    """The derivatives of a sum over paths with respect to each parameter's masses, or their natural logarithms."""
    found: dict[str, Tensor] = {}
    exponent = _backward(traced.masses(kind, on_gradient=found.__setitem__, **options))
    result = {}
    device = device_of(traced.values)
    for name, shape in traced.graph.shapes.items():
        values = found.pop(name, None)
        if values is None:
            values = torch.zeros(shape, dtype=options.get("dtype", torch.float64), device=device)
        if log:
            result[name] = values.log_().add_(exponent * math.log(2))
        else:
            result[name] = ldexp_(values, exponent)
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
    return collected_gradients(traced, log, PowerFlow, exponent=2, dtype=dtype)
