"""How much of the path mass goes through each neuron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.errors import UnsupportedOpError
from dagpath.lifting.repeated import used_repeatedly
from dagpath.passes.powers import PowerFlow, checked_power
from dagpath.passes.values import Mass, leaves
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced


class NeuronMassFlow(PowerFlow):
    """``Σ |Φ|^q`` over the paths through each neuron.

    Args:
        graph, parameters, rule, cut, kept, dtype, power: see :class:`~dagpath.passes.powers.PowerFlow`.
        places: nodes -> which neuron stands in each entry of the output, -1 for none.
        fed: parameter name -> which neuron each element leads into, -1 for one that has a place.
        num_neurons: how many neurons there are.
    """

    def __init__(
        self,
        *graph: Any,
        places: Mapping[fx.Node, Tensor],
        fed: Mapping[str, Tensor],
        num_neurons: int,
        **options: Any,
    ) -> None:
        super().__init__(*graph, **options)
        self.records = True
        self._places = places
        self._fed = fed
        self.sums = torch.zeros(num_neurons + 1, dtype=self.dtype, device=self.device)  # the last one for no neuron

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._places:
            _watch(leaves(result, Mass)[0].values, self._places[n], self.sums)
        return result

    def parameter(self, name: str) -> Mass:
        mass = super().parameter(name)
        if name in self._fed:
            _watch(mass.values, self._fed[name], self.sums)
        return mass


def _watch(masses: Tensor, neurons: Tensor, sums: Tensor) -> None:
    """In the backward pass, add ``masses`` times their derivatives to the sums of the neurons that stand there."""
    whole = neurons.reshape((1,) * (masses.ndim - neurons.ndim) + neurons.shape).to(masses.device)
    shared = [dim for dim, size in enumerate(whole.shape) if size == 1]
    slots = whole.reshape(-1).remainder(len(sums))
    values = masses.detach()

    def add(gradient: Tensor) -> None:
        through = values * gradient
        sums.index_add_(0, slots, (through.sum(shared) if shared else through).reshape(-1))

    masses.requires_grad_(True).register_hook(add)  # type: ignore[no-untyped-call]


@plain_computation()
def path_mass(traced: TracedModel, p: float = 2) -> Tensor:
    """The share of ``Σ |Φ|^p`` that goes through each neuron, at the parameters' current values.

    A channel's positions are added up. Shares are unchanged by any rescaling; over the neurons of a layer that every
    path crosses they add up to 1.

    Args:
        traced: the traced model.
        p: at least 1, and finite.

    Returns:
        float64 tensor [num_neurons], in the order of ``traced.graph.group_of``; ``graph.sites[graph.maker_of[n]]``
        tells where neuron n is. Zero everywhere where the sum is zero.

    Raises:
        ValueError: p is below 1 or not finite.
        UnsupportedOpError: a parameter that is used more than once leads into neurons without a place of their own,
            such as those between the factors of a weight.

    Cost: one forward and one backward pass in float64 at batch 1.

    Source: Gonon et al., ICLR 2024, for the paths.

    Example:
        >>> import torch, dagpath
        >>> layers = torch.nn.Linear(1, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False)
        >>> net = torch.nn.Sequential(*layers)
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = net[2].weight.copy_(torch.tensor([[2.0, 2.0]]))
        >>> dagpath.path_mass(dagpath.trace(net, torch.zeros(1, 1)))  # paths of value 2 and 4
        tensor([0.2000, 0.8000, 1.0000], dtype=torch.float64)
    """
    require_traced(traced)
    graph = traced.graph
    repeated = sorted(used_repeatedly(traced).intersection(graph.fed))
    if repeated:
        raise UnsupportedOpError(
            f"the parameter {repeated[0]!r} leads into neurons between the factors of a weight, or that stand for its "
            "own elements, and is used more than once: the paths through them are not told apart by their use"
        )
    options = {"places": graph.places, "fed": graph.fed, "num_neurons": graph.num_neurons}
    flow = traced.masses(NeuronMassFlow, power=checked_power(p), **options)
    total = flow.total()
    if total.values.requires_grad and not total.zero:
        torch.autograd.backward(total.values)
        flow.sums /= total.values.detach()
    return flow.sums[:-1]
