"""Balancing: from a traced model to the rescaling that minimizes a criterion."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from dagpath.criteria import Criterion, criterion_of
from dagpath.errors import BalanceError
from dagpath.fetched import device_of
from dagpath.rescaling import Rescaling
from dagpath.solver import SOLVERS, round_to_powers_of_two, solve
from dagpath.solver.checks import check_bound, check_limits
from dagpath.solver.problem import DEFAULT_BOUND
from dagpath.state import plain_computation
from dagpath.trace import TracedModel, require_traced


@dataclass(frozen=True)
class BalanceOptions:
    """The options of :func:`balance`, which says what they mean; bad ones are refused at once."""

    criterion: str | Criterion = "pathcond"
    solver: str = "newton"
    tol: float = 1e-9
    max_iter: int | None = None
    power_of_two: bool = False
    bound: float = DEFAULT_BOUND
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        criterion_of(self.criterion)
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; known are {', '.join(map(repr, SOLVERS))}")
        check_limits(self.tol, self.max_iter)
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
            problem = criterion_of(self.criterion).problem(traced, self.bound, where)
            posed = time.perf_counter()
            solution = solve(problem, self.solver, self.tol, self.max_iter)
            z, after = solution.z, solution.objective[1]
            if self.power_of_two:
                rounded, after = round_to_powers_of_two(problem, z)
                z = torch.from_numpy(rounded)
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
            solution.converged,
            end - start,
            {"masses": posed - start, "solve": end - posed},
            problem.bound,
            after - solution.objective[1] if self.power_of_two else 0.0,
        )

    def _text(self) -> str:
        """The options, in words that are the same in every process."""
        own = self.criterion if isinstance(self.criterion, str) else type(self.criterion).__qualname__
        return f"criterion={own}, solver={self.solver}, tol={self.tol}, max_iter={self.max_iter}, " + (
            f"power_of_two={self.power_of_two}, bound={self.bound}"
        )

    def shortfall(self, rescaling: Rescaling) -> str:
        """Where the solver stopped, if that was short of the tolerance."""
        return (
            f"the {self.solver} solver stopped after {rescaling.iterations} iterations at an optimality of "
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
    bound: float = BalanceOptions.bound,
    device: torch.device | str | None = BalanceOptions.device,
) -> Rescaling:
    """Find the rescaling of every free neuron that minimizes a criterion. The model is not touched.

    The problem is convex: the minimum is global, and, where it is unique and within the bound, the same from any
    rescaled copy of the model. Groups without any live parameter keep λ = 1.

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
        bound: largest ``|log λ|``, by default ln 2**20; cut to 175 for path conditioning, to ``350 / p`` for equal
            norms.
        device: where the masses are held and multiplied; None for the device of the parameters. Vectors over the groups
            are held on the CPU.

    Returns:
        A :class:`Rescaling`; ``apply_()`` applies it.

    Raises:
        ValueError: an unknown criterion or solver, or a bound, tolerance or number of iterations out of range.
        BalanceError: a parameter or buffer holds NaN or Inf; the message names it.

    Warns:
        UserWarning: the solver stopped before it reached ``tol``; the message has the numbers.

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


def check_values(traced: TracedModel) -> None:
    """Raise :class:`BalanceError` if a parameter, or a buffer that is read, has values that are not finite."""
    for kind, tensors in (("parameter", traced.values), ("buffer", traced.buffers)):
        for name, tensor in tensors.items():
            _check_finite(kind, name, tensor)


def _check_finite(kind: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise BalanceError(f"{kind} {name!r} is on the meta device: balancing needs its values; load them first")
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor) if kind == "parameter" else torch.isnan(tensor)  # masks hold infinities
    if bool(bad.any()):
        first = tuple(torch.nonzero(bad)[0].tolist())
        raise BalanceError(
            f"{kind} {name!r} has {int(bad.sum())} values that are not finite, the first at index {first}: "
            f"{float(tensor[first])}; nothing was changed"
        )


_WITHOUT_FLOAT64 = {"mps"}


def _device_of(traced: TracedModel) -> torch.device:
    device = device_of(traced.values)
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device
