"""Which elements lie on paths, whatever their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.passes.constants import Constants
from dagpath.passes.powers import PowerFlow
from dagpath.passes.structure import Structure
from dagpath.passes.values import Call
from dagpath.trace import TracedModel


def masses_with(traced: TracedModel, values: Mapping[str, Tensor], dtype: torch.dtype, **options: Any) -> PowerFlow:
    """A pass of power 1 over the eval graph in which some parameters have other values."""
    parameters = {**traced.values, **values}
    return traced.masses(PowerFlow, power=1, dtype=dtype, parameters=parameters, **options)


def alive_elements(traced: TracedModel, structure: Structure) -> dict[str, Tensor]:
    """parameter name -> boolean tensor of its shape: which elements some path crosses, whatever their values.

    Those that none crosses belong to layers that nothing reads, or stand in kernels where they meet only padding.

    Cost: one forward and one backward pass in float64, with positive parameters of a size that keeps the masses even.
    """
    parameters = dict(traced.values)
    names = {edges.parameter: None for edges in structure.edges}
    even = {name: torch.full_like(parameters[name], 1 / max(parameters[name].shape[1:].numel(), 1)) for name in names}
    found = {name: torch.zeros(parameters[name].shape, dtype=torch.bool) for name in names}

    def visit(name: str, gradient: Tensor, log2_scale: int) -> None:
        found[name] = gradient.cpu() > 0

    flow = masses_with(traced, even, torch.float64, on_gradient=visit)
    flow.real_node = Constants(traced.captured.eval, {**parameters, **even}, known=_no_means(traced))
    flow.backward(flow.total())
    return {name: found[name] for name in names}


def _no_means(traced: TracedModel) -> dict[fx.Node, Tensor]:
    """Zeros for the stored means of normalizations: what a gain multiplies there is a constant, and no path."""
    found = {}
    for node in traced.fx.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            mean = Call(node.target, node.args, dict(node.kwargs), node).get("running_mean")
            if isinstance(mean, fx.Node):
                found[mean] = torch.zeros(mean.meta["val"].shape)
    return found
