"""Path-norms."""

from __future__ import annotations

import math

from dagpath.state import plain_computation
from dagpath.trace import TracedModel, require_traced


@plain_computation()
def path_norm(traced: TracedModel, p: float = 1, log: bool = False) -> float:
    """The path-norm ``(Σ |Φ|^p)^(1/p)`` over all paths of the network, at the parameters' current values.

    It is unchanged by any rescaling. A path goes from an input or a bias to an output; its value Φ is the product of
    the weights on it. An operation that is not positively homogeneous cuts paths: what enters it counts as an output,
    what leaves it as an input.

    Args:
        traced: the traced model.
        p: at least 1, and finite.
        log: return the natural logarithm, which is finite where the norm itself leaves float64.

    Returns:
        The norm, or its logarithm; -inf is the logarithm of a norm of zero, inf a norm above the float64 range.

    Raises:
        ValueError: p is below 1 or not finite.

    Cost: one forward pass at batch 1, in float64. Source: Gonon et al., ICLR 2024, definition of the path-lifting.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     for parameter in net.parameters():
        ...         _ = parameter.fill_(2.0)
        >>> dagpath.path_norm(dagpath.trace(net, torch.zeros(1, 2)))  # 4 paths of value 4, one bias of value 2
        18.0
    """
    require_traced(traced)
    if not (isinstance(p, (int, float)) and 1 <= p < math.inf):
        raise ValueError(f"p must be a finite number of at least 1, got {p!r}")
    total = traced.masses(p).total()
    value = float(total.values)
    if log and value > 0:
        return (math.log(value) + total.exponent * math.log(2)) / p
    if log:
        return -math.inf if value == 0 else value
    try:
        return float(value ** (1 / p) * 2.0 ** (total.exponent / p))
    except OverflowError:
        return math.inf
