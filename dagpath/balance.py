"""Balancing: from a traced model to the rescaling that minimizes a criterion."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dagpath.apply.multiply import beyond
from dagpath.apply.rescaling import Rescaling, scales_of
from dagpath.criteria import Criterion, criterion_of
from dagpath.errors import BalanceError
from dagpath.runtime.fetched import device_of
from dagpath.runtime.state import plain_computation
from dagpath.solver import SOLVERS, Problem, RangeProblem, Solution, round_to_powers_of_two, solve
from dagpath.solver.checks import check_bound, check_limits
from dagpath.solver.problem import DEFAULT_BOUND
from dagpath.trace import TracedModel, require_traced
from dagpath.words import counted, not_finite

_NEAR = 20 * math.log(2)
"""Largest |log λ| of a group that cannot go where the criterion takes it: a factor of 2**20 up or down."""
_ROUNDS = 3
"""Most times that groups are held group by group; then all that are further out are."""


@dataclass(frozen=True)
class BalanceOptions:
    """The options of :func:`balance`, which says what they mean; bad ones are refused at once."""

    criterion: str | Criterion = "pathcond"
    solver: str = "newton"
    tol: float = 1e-9
    max_iter: int | None = None
    power_of_two: bool = False
    bound: float | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        criterion_of(self.criterion)
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; known are {', '.join(map(repr, SOLVERS))}")
        check_limits(self.tol, self.max_iter)
        if self.bound is not None:
            check_bound(self.bound)

    @plain_computation()
    def minimize(self, traced: TracedModel) -> Rescaling:
        """What :func:`balance` returns, without its warning."""
        require_traced(traced)
        start = time.perf_counter()
        traced.peers.require_same("the options of balancing", self._text())
        with traced.peers.together(gathers=True):
            check_values(traced)
            where = torch.device(self.device) if self.device is not None else _device_of(traced)
            bound = DEFAULT_BOUND if self.bound is None else self.bound
            problem = criterion_of(self.criterion).problem(traced, bound, where)
            posed = time.perf_counter()
            found = self._solved(problem)
            if self.bound is None:
                found = self._within_range(traced, found)
            problem, solution, z, after = found.problem, found.solution, found.z, found.objective
        z = traced.peers.first(z)  # which are the same already where all processors are alike
        end = time.perf_counter()
        return Rescaling(
            traced,
            z,
            self.power_of_two,
            (solution.objective[0], after),
            solution.optimality,
            problem.measure,
            problem.live,
            solution.iterations,
            solution.products,
            solution.converged and not bool(solution.held.any()),
            end - start,
            {"masses": posed - start, "solve": end - posed},
            float(np.max(problem.bound, initial=0.0)),
            after - solution.objective[1] if self.power_of_two else 0.0,
            held=solution.held,
        )

    def _solved(self, problem: Problem | RangeProblem) -> _Found:
        solution = solve(problem, self.solver, self.tol, self.max_iter)
        if not self.power_of_two:
            return _Found(problem, solution, solution.z, solution.objective[1])
        rounded, after = round_to_powers_of_two(problem, solution.z)
        return _Found(problem, solution, torch.from_numpy(rounded), after)

    def _within_range(self, traced: TracedModel, found: _Found) -> _Found:
        """The minimum with the groups held near that have none within reach, or whose parameters' types do not hold it.

        All other groups go where the criterion takes them. Holding some moves others, so this is done in rounds, each
        of which holds one group more at least.
        """
        bounds = np.broadcast_to(np.asarray(found.problem.bound, np.float64), (len(found.z),)).copy()
        for round_ in range(_ROUNDS + 1):
            outside = found.z.abs() > _NEAR * (1 + 1e-12)
            if not bool(outside.any()):
                return found
            stuck = outside & (found.solution.held | _unholdable(traced, found.z, self.power_of_two))
            if not bool(stuck.any()):
                return found
            bounds[(outside if round_ == _ROUNDS else stuck).numpy()] = _NEAR
            found = self._solved(replace(found.problem, bound=bounds.copy()))
        return found

    def _text(self) -> str:
        """The options, in words that are the same in every process."""
        own = self.criterion if isinstance(self.criterion, str) else type(self.criterion).__qualname__
        return f"criterion={own}, solver={self.solver}, tol={self.tol}, max_iter={self.max_iter}, " + (
            f"power_of_two={self.power_of_two}, bound={self.bound}"
        )

    def shortfall(self, rescaling: Rescaling) -> str:
        """Why the rescaling is not the minimum: what the bound holds, or where the solver stopped."""
        if rescaling.num_held:
            nearest = _NEAR if self.bound is None else rescaling.bound
            if self.bound is None:
                why = (
                    "further out, parameters leave the range of their type (convert the model to a wider one), or "
                    "nothing stops the factors"
                )
            else:
                why = "the minimum lies further out: give a larger bound, or none"
            held = counted(rescaling.num_held, "group is", "groups are")
            return (
                f"{held} held by the bound |log λ| ≤ {nearest:.4g}, of "
                f"{len(rescaling.log_scales):,} in all; {why}. The rescaling is valid, but not the minimum of the "
                "criterion, and rescaled copies of the model may come to other values"
            )
        return (
            f"the {self.solver} solver stopped after {counted(rescaling.iterations, 'iteration')} at an optimality of "
            f"{rescaling.optimality:.1e} ({rescaling.measure}), above the tolerance of {self.tol:.1e}; the rescaling "
            "is valid but not optimal"
        )


def balance(
    traced: TracedModel,
    criterion: str | Criterion = BalanceOptions.criterion,
    solver: str = BalanceOptions.solver,
    tol: float = BalanceOptions.tol,
    max_iter: int | None = BalanceOptions.max_iter,
    power_of_two: bool = BalanceOptions.power_of_two,
    bound: float | None = BalanceOptions.bound,
    device: torch.device | str | None = BalanceOptions.device,
) -> Rescaling:
    """Find the rescaling of every free neuron that minimizes a criterion. The model is not touched.

    The problem is convex: the minimum is global, and, where it is unique and no group is held by the bound, the same
    from any rescaled copy of the model. Groups without any live parameter keep λ = 1.

    Args:
        traced: the traced model.
        criterion: ``"pathcond"``, ``"equinorm"``, ``"range"``, an object such as :class:`PathConditioning`, or one of
            your own (:class:`dagpath.criteria.Criterion`).
        solver: ``"newton"``, or ``"coordinate"`` for the published algorithms of path conditioning and of equal norms.
        tol: stop when the optimality is at most this: ``‖∇F‖∞ / p`` for path conditioning, with p live parameters; the
            largest ``|incoming − outgoing| / sum`` for equal norms; the largest ``|log max_in − log max_out|`` for
            equal ranges; ``‖∇F‖∞`` in units of its ``scale`` for a criterion of your own. All count only what the
            bound does not hold.
        max_iter: most iterations of the solver (Newton steps, sweeps of coordinate descent, or policies for equal
            ranges); None for the solver's default.
        power_of_two: round the factors to powers of two, so that the rescaled model computes bitwise the same. The
            objective reached is that of the rounded factors, and never above the one at the start; ``rounding_loss``
            says how much they give away, which is much where the optimal factors are all near one.
        bound: largest ``|log λ|``, cut to 175 for path conditioning, to ``350 / p`` for equal norms. None for no bound
            but these, except for groups that cannot be where the minimum is: a factor leaves the range of a parameter's
            type, or nothing stops it (under a criterion of your own). These are held at ``|log λ| ≤ ln 2**20``. A given
            bound is taken as it is, and what a type does not hold is refused when the rescaling is applied.
            ``held`` of the result says which groups are held, and ``converged`` is False if there are any.
        device: where the masses are held and multiplied; None for the device of the parameters. Vectors over the groups
            are held on the CPU.

    Returns:
        A :class:`Rescaling`; ``apply_()`` applies it.

    Raises:
        ValueError: an unknown criterion or solver, or a bound, tolerance or number of iterations out of range.
        BalanceError: a parameter or buffer holds NaN or Inf; the message names it.

    Warns:
        UserWarning: the bound holds groups, or the solver stopped before it reached ``tol``; the message has the
            numbers.

    Cost: one forward and one backward pass in float64 at batch 1, and 10 to 100 passes over the masses, summed per
    pair of groups. Source: Lebeurrier, Vayer, Gribonval 2026, for the criterion.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)))
        >>> rescaling.converged, rescaling.objective[1] < rescaling.objective[0]
        (True, True)
    """
    options = BalanceOptions(criterion, solver, tol, max_iter, power_of_two, bound, device)
    rescaling = options.minimize(traced)
    if not rescaling.converged:
        warnings.warn(options.shortfall(rescaling), stacklevel=2)
    return rescaling


@plain_computation()
def random_rescaling(
    traced: TracedModel, sigma: float = 1.0, power_of_two: bool = False, generator: torch.Generator | None = None
) -> Rescaling:
    """A random rescaling: ``log λ`` of every free group drawn from a normal distribution of mean 0.

    Args:
        traced: the traced model.
        sigma: standard deviation of log λ (natural logarithm), at least 0.
        power_of_two: round the factors to powers of two; applying it is then bitwise exact.
        generator: source of randomness; None for PyTorch's global one. Processes that share the model have the factors
            of the first.

    Returns:
        A :class:`Rescaling`; ``apply_()`` applies it.

    Raises:
        ValueError: sigma is negative or not finite.

    Cost: one draw per free group.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> before = net(x)
        >>> rescaling = dagpath.random_rescaling(dagpath.trace(net, x), sigma=2.0, power_of_two=True)
        >>> torch.equal(rescaling.apply_()(x), before)
        True
    """
    require_traced(traced)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    z = sigma * torch.randn(traced.graph.num_groups, dtype=torch.float64, generator=generator)
    if power_of_two:
        z = torch.round(z / math.log(2)) * math.log(2)
    return Rescaling(traced, traced.peers.first(z), power_of_two)


@dataclass(frozen=True)
class _Found:
    """A problem, what the solver found, the factors' logarithms (rounded where they should be), the objective there."""

    problem: Problem | RangeProblem
    solution: Solution
    z: Tensor
    objective: float


def _unholdable(traced: TracedModel, z: Tensor, power_of_two: bool) -> Tensor:
    """Which groups' factors make of a parameter what its type does not hold, bool [num_groups]."""
    scales, graph = scales_of(z, power_of_two), traced.graph
    stuck = torch.zeros(graph.num_groups + 1, dtype=torch.bool)
    for name in graph.movable:
        stuck[beyond(traced.values[name], graph.ends[name], scales, power_of_two)] = True
    return stuck[1:]


def check_values(traced: TracedModel) -> None:
    """Raise :class:`BalanceError` if a parameter, or a buffer that is read, has values that are not finite."""
    for kind, tensors in (("parameter", traced.values), ("buffer", traced.buffers)):
        for name, tensor in tensors.items():
            _check_finite(kind, name, tensor)


def _check_finite(kind: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise BalanceError(f"{kind} {name!r} is on the meta device: balancing needs its values; load them first")
    if not tensor.is_floating_point():
        return
    tensor = tensor if tensor.element_size() > 1 else tensor.float()  # there are no sums of 8-bit numbers
    if bool(torch.isfinite(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor) if kind == "parameter" else torch.isnan(tensor)  # masks hold infinities
    if bool(bad.any()):
        first = tuple(torch.nonzero(bad)[0].tolist())
        raise BalanceError(
            f"{kind} {name!r} has {not_finite(int(bad.sum()))}, the first at index {first}: "
            f"{float(tensor[first])}; nothing was changed"
        )


_WITHOUT_FLOAT64 = {"mps"}


def _device_of(traced: TracedModel) -> torch.device:
    device = device_of(traced.values)
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device
