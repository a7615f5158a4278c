"""What gradient flow conserves."""

from __future__ import annotations

import torch
from torch import Tensor

from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced


@plain_computation()
def conserved_quantities(traced: TracedModel) -> Tensor:
    """``Σ_in θ² − Σ_out θ²`` for each free scale group, which gradient flow conserves.

    The sums run over the parameter elements that lead into the group from elsewhere (biases among them) and those that
    lead out of it. A loss that depends on the network's function alone does not change under a rescaling, so that
    ``Σ_in θ ∂L/∂θ = Σ_out θ ∂L/∂θ`` at every group: along the gradient flow ``dθ/dt = −∂L/∂θ`` the quantities stay as
    they are at initialization. Gradient descent with step size η keeps them up to O(η).

    Args:
        traced: the traced model.

    Returns:
        float64 tensor [num_groups]; entry j belongs to free group j + 1.

    Cost: one pass over the parameters. Source: Marcotte, Gribonval, Peyré, NeurIPS 2023; Saul, TMLR 2023.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(3.0), net[0].bias.fill_(1.0), net[2].weight.fill_(2.0)
        >>> dagpath.conserved_quantities(dagpath.trace(net, torch.zeros(1, 1))).tolist()
        [6.0, 6.0]
    """
    require_traced(traced)
    found = torch.zeros(traced.graph.num_groups + 1, dtype=torch.float64)
    for name, parameter in traced.values.items():
        squares = parameter.to("cpu", torch.float64).square()
        ends = traced.graph.ends[name]
        for end, sign in ((ends.dst, 1.0), (ends.src, -1.0)):
            found.index_add_(0, end.reshape(-1), squares.sum_to_size(end.shape).reshape(-1), alpha=sign)
    return found[1:]
