"""What to balance: each criterion turns a traced model into a problem of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dagpath.errors import BalanceError
from dagpath.lifting.gram import visit_common_gram_diagonal
from dagpath.solver import LogOuter, MassAggregator, Problem, RangeProblem
from dagpath.trace import TracedModel


class Criterion(Protocol):
    """Anything with a method ``problem``: the model's masses, summed per pair of groups, and a convex function of them.

    A criterion of one's own is a few lines. The values of parameters are in ``traced.values``: in the model they may be
    spread over processes, or absent where they come from files. Here one that minimizes the sum of all absolute
    weights, biases left out:

        >>> import torch, dagpath
        >>> from dagpath.solver import MassAggregator, Problem, SumOuter
        >>> class SumOfWeights:
        ...     def problem(self, traced, bound, device):
        ...         masses = MassAggregator(traced.graph.num_groups, device)
        ...         for name, values in traced.values.items():
        ...             if values.ndim > 1:
        ...                 ends = traced.graph.ends[name]
        ...                 masses.add(values.abs(), ends.dst, ends.src)
        ...         nothing = torch.zeros(traced.graph.num_groups, dtype=torch.float64)
        ...         return Problem(masses.matrix(), SumOuter(), kappa=1.0, linear=nothing, scale=1.0, bound=bound)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)), SumOfWeights())
        >>> "criterion after" in rescaling.summary()
        True
        >>> _ = rescaling.apply_()
        >>> torch.allclose(net[0].weight.abs().sum(1), net[2].weight.abs().sum(0))
        True
    """

    def problem(self, traced: TracedModel, bound: float, device: torch.device) -> Problem | RangeProblem:
        """The model's numbers.

        Args:
            traced: the model, at its current values.
            bound: the largest ``|log λ|`` (natural logarithm), for the problem.
            device: where to put the masses.

        Returns:
            What :func:`dagpath.solver.solve` takes.
        """


@dataclass(frozen=True)
class PathConditioning:
    """Align the path Gram matrix with a multiple of a diagonal reference R, by default the identity.

    In the log-det Bregman divergence, minimized over the multiple too, only the diagonal of G matters::

        F(z) = p log Σ_e g_e exp(−2 (B z)_e) + 2 · 1ᵀ B z,        g_e = G_ee / r_e

    The sums run over the live parameters, those with ``g_e > 0``; p is their number. It is what ``"pathcond"`` means.

    Attributes:
        reference: None for the identity, or {parameter name: positive float or tensor of the parameter's shape}.

    Cost: one forward and one backward pass in float64 at batch 1.

    Source: Lebeurrier, Vayer, Gribonval 2026.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> reference = dict.fromkeys(traced.graph.shapes, 1.0) | {"0.bias": 0.1}  # where G is to be a tenth
        >>> rescaling = dagpath.balance(traced, dagpath.PathConditioning(reference))
        >>> rescaling.objective[1] < rescaling.objective[0]
        True
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

        def check(name: str, gram: Tensor) -> None:
            if not bool(torch.isfinite(gram.sum())):
                raise BalanceError(
                    f"the path masses through {name!r} are not finite, though all weights are: look for a negative "
                    "running variance behind it, or for weights beyond the range of float64 once squared"
                )

        def visit(name: str, gram: Tensor) -> None:
            check(name, gram)
            if reference is not None:
                gram = gram / torch.as_tensor(reference[name], dtype=torch.float64).to(gram)
            masses.add(gram, graph.ends[name].dst, graph.ends[name].src)

        def visit_factors(name: str, left: Tensor, right: Tensor) -> None:
            check(name, left)
            check(name, right)
            masses.add_product(left, right, graph.ends[name].dst, graph.ends[name].src)

        try:
            log2_scale = visit_common_gram_diagonal(traced, visit, None if reference is not None else visit_factors)
        except OverflowError as error:
            raise BalanceError(str(error)) from error
        return Problem.path_conditioning(masses, bound, offset=log2_scale * math.log(2))

    def _checked_reference(self, shapes: Mapping[str, torch.Size]) -> Mapping[str, float | Tensor] | None:
        if self.reference is None:
            return None
        if not isinstance(self.reference, Mapping):
            raise TypeError(f"a reference maps parameter names to values, got {type(self.reference).__name__}")
        missing = [name for name in shapes if name not in self.reference]
        if missing:
            raise ValueError(f"the reference has no entry for {missing[0]!r} ({len(missing)} missing in all)")
        for name, value in self.reference.items():
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if name not in shapes:
                raise ValueError(f"the reference names {name!r}, which is no parameter of the model")
            if tensor.ndim and tensor.shape != shapes[name]:
                raise ValueError(
                    f"the reference of {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(shapes[name])}"
                )
            bad = tensor[~((tensor > 0) & torch.isfinite(tensor))]
            if len(bad):
                raise ValueError(
                    f"the reference of {name!r} must be positive and finite everywhere, got {float(bad[0])}"
                )
        return self.reference


@dataclass(frozen=True)
class EquiNorm:
    """Make the norm of all parameters as small as a rescaling can: incoming and outgoing norms become equal.

    Minimizes ``Σ_e |θ_e|^p exp(p (B z)_e)``, as its logarithm::

        F(z) = log Σ_e |θ_e|^p exp(p (B z)_e)

    whose gradient, ``p`` times (incoming − outgoing) / sum, says the same whatever the scale of the parameters. The
    optimality is the largest ``|incoming − outgoing| / sum`` of a group, p-th powers summed. Biases are incoming.
    Groups that no chain of nonzero parameters joins with a fixed neuron on both sides keep λ = 1: their parameters
    could be shrunk without end. A parameter whose p-th power is less than 1e-308 of that of the largest counts as zero:
    for p of 50 or more :class:`RangeEqualization`, which has no such limit, is the better choice.

    Attributes:
        p: the exponent, at least 1. The default, 2, is weight balancing; it is what ``"equinorm"`` means.

    Raises:
        ValueError: p is below 1 or not finite.

    Cost: one pass over the parameters, whose absolute values are held in float64.

    Source: Stock, Graham, Gribonval, Jégou 2019 (ENorm); Saul 2023 (weight balancing).

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rescaled = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)), dagpath.EquiNorm()).apply_()
        >>> incoming = net[0].weight.square().sum(1) + net[0].bias.square()
        >>> torch.allclose(incoming, net[2].weight.square().sum(0))
        True
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.p < math.inf:
            raise ValueError(f"p must be at least 1 and finite, got {self.p}")

    def problem(self, traced: TracedModel, bound: float, device: torch.device) -> Problem:
        """The criterion at the parameters' current values, as numbers."""
        largest, masses = _magnitudes(traced, device, self.p)
        summed = MassAggregator(traced.graph.num_groups, device)
        for values, dst, src in masses:
            summed.add(values, dst, src)
        return Problem(
            matrix=summed.matrix(),
            outer=LogOuter(1.0),
            kappa=self.p,
            linear=torch.zeros(traced.graph.num_groups, dtype=torch.float64),
            scale=self.p,
            bound=bound,
            offset=self.p * math.log(largest) if summed.num_live else 0.0,
            live=summed.num_live,
            measure="largest |in − out| / sum",
        )


@dataclass(frozen=True)
class RangeEqualization:
    """Make the largest absolute value of every group's incoming and outgoing parameters equal.

    The limit of :class:`EquiNorm` for p → ∞, used before quantization, where the range of a layer's weights sets its
    step. Biases are incoming. Groups that no chain of nonzero parameters joins with a fixed neuron on both sides keep
    λ = 1. The objective is the largest difference ``|log max_in − log max_out|`` of a group, and so is the optimality;
    the part of it that the bound keeps from shrinking does not count in either. It is what ``"range"`` means.

    Cost: one pass over the parameters, whose absolute values are held in float64.

    Source: Nagel, van Baalen, Blankevoort, Welling 2019 (cross-layer equalization).

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rescaled = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)), "range").apply_()
        >>> torch.allclose(net[0].weight.abs().amax(1), net[2].weight.abs().amax(0))
        True
    """

    def problem(self, traced: TracedModel, bound: float, device: torch.device) -> RangeProblem:
        """The criterion at the parameters' current values, as numbers."""
        _, masses = _magnitudes(traced, device)
        largest = MassAggregator(traced.graph.num_groups, device, largest=True)
        for values, dst, src in masses:
            largest.add(values, dst, src)
        return RangeProblem(largest.matrix(), bound, largest.num_live)


def _magnitudes(
    traced: TracedModel, device: torch.device, power: float | None = None
) -> tuple[float, list[tuple[Tensor, Tensor, Tensor]]]:
    """The largest absolute value, and all of them with their groups; divided by it and to a power, if there is one.

    Groups out of reach are fixed: those that no chain of values that are not zero by now joins with a fixed neuron on
    both sides.
    """
    graph = traced.graph
    parameters = {name: value.to(device, torch.float64).abs() for name, value in traced.values.items()}
    largest = max((float(values.max()) for values in parameters.values() if values.numel()), default=0.0)
    unit = largest or 1.0 if power is not None else max(1.0, largest / 2.0**960)  # that sums stay finite
    parameters = {name: (values / unit) ** (power or 1.0) for name, values in parameters.items()}
    ends = {name: (graph.ends[name].dst.to(device), graph.ends[name].src.to(device)) for name in parameters}
    links = [(values > 0, *ends[name]) for name, values in parameters.items()]
    forward = _reached(graph.num_groups, links)
    backward = _reached(graph.num_groups, [(live, src, dst) for live, dst, src in reversed(links)])
    within = forward & backward
    masses = []
    for name, values in parameters.items():
        dst, src = (torch.where(within[end], end, 0) for end in ends[name])
        masses.append((values, dst, src))
    return largest, masses


def _reached(num_groups: int, links: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Which groups a chain of links leads to from group 0; each link is (which elements are there, to, from)."""
    reached = torch.zeros(num_groups + 1, dtype=torch.bool, device=links[0][0].device if links else None)
    reached[0] = True
    count = 0
    while count < int(reached.sum()):
        count = int(reached.sum())
        for live, to, start in links:
            if not bool(reached[to].all()):
                reached[_per_entry(to, live & reached[start])] = True
    return reached


def _per_entry(to: Tensor, hit: Tensor) -> Tensor:
    """The entries of ``to``, which broadcasts to the shape of ``hit``, that meet a hit."""
    to = to.reshape((1,) * (hit.ndim - to.ndim) + to.shape)
    repeated = [dim for dim in range(hit.ndim) if to.shape[dim] == 1]
    return to[hit.any(repeated, keepdim=True) if repeated else hit]


_BY_NAME: dict[str, type[Criterion]] = {
    "pathcond": PathConditioning,
    "equinorm": EquiNorm,
    "range": RangeEqualization,
}


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
