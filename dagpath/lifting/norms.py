"""Path-norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.powers import PowerFlow, checked_power
from dagpath.passes.values import Mass, ldexp_
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced


@plain_computation()
def path_norm(
    traced: TracedModel,
    p: float = 1,
    log: bool = False,
    per_output: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """The path-norm ``(Σ |Φ|^p)^(1/p)`` over all paths of the network, at the parameters' current values.

    It is unchanged by any rescaling. A path goes from an input or a bias to an output; its value Φ is the product of
    the weights on it. An operation that is not positively homogeneous cuts paths: what enters it counts as an output,
    what leaves it as an input.

    Args:
        traced: the traced model.
        p: at least 1, and finite. Up to about 100 in float64: of masses that are added up, those below 1e-308 of the
            largest are lost, which for larger p are paths whose weights are not much smaller.
        log: return the natural logarithm, which is finite where the norm itself leaves float64.
        per_output: return the norm of the paths that end in each entry of the model's output.
        dtype: of the pass, float64 or float32.

    Returns:
        The norm, or its logarithm, as a float; -inf is the logarithm of a norm of zero, inf a norm above the float64
        range. With ``per_output``, a float64 tensor of the shape of the output for one example (a batch of 1), or a
        tuple of them where the model has several outputs.

    Raises:
        ValueError: p is below 1 or not finite, or another dtype.

    Cost: one forward pass at batch 1. Source: Gonon et al., ICLR 2024, definition of the path-lifting.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     for parameter in net.parameters():
        ...         _ = parameter.fill_(2.0)
        >>> traced = dagpath.trace(net, torch.zeros(1, 2))
        >>> dagpath.path_norm(traced)  # 4 paths of value 4, one bias of value 2
        18.0
        >>> dagpath.path_norm(traced, per_output=True)
        tensor([[18.]], dtype=torch.float64)
    """
    require_traced(traced)
    p = checked_power(p)
    flow = traced.masses(PowerFlow, power=p, dtype=dtype)
    total = flow.total()
    if not per_output:
        return float(_norm(total, p, log))
    norms = tuple(_norm(mass, p, log) for mass in flow.outputs)
    return norms[0] if len(norms) == 1 else norms


def _norm(mass: Mass, p: float, log: bool) -> Tensor:
    values = mass.values.double()
    if log:
        return (values.log() + mass.log2_scale * math.log(2)) / p
    whole, rest = divmod(mass.log2_scale / p, 1)
    return ldexp_(values ** (1 / p) * 2.0**rest, int(whole))
