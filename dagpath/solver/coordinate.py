"""Cyclic coordinate descent: the published algorithms of path conditioning and of equal norms."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from dagpath.solver.checks import check_limits
from dagpath.solver.matrix import Array, GroupMatrix
from dagpath.solver.problem import LogOuter, Problem, Solution


def solve_coordinate(problem: Problem, tol: float = 1e-9, max_iter: int | None = None) -> Solution:
    """Minimize over one group after the other, exactly, in sweeps.

    With all groups but one fixed and ``x = exp(−κ z)`` for that one, the objective is
    ``p log(c/x + b x + d) + A log x`` with the in-sum c and out-sum b of the masses without its factor, the rest d and
    ``A = −(linear cost) / κ``, for path conditioning (live elements in) − (live elements out); its minimum is the
    positive root of ``(p + A) b x² + A d x + (A − p) c = 0``. Without a linear cost that is ``x² = c/b``: what enters
    the group becomes equal to what leaves it. A group with only in- or only out-elements has its minimum where the
    bound or the quadratic puts it.

    Groups that follow each other and share no element do not meet in each other's sums b and c, which are therefore
    taken at once; only the total, one number, goes from one to the next. The iterates are those of one group at a time.

    Args:
        problem: one with a logarithm outside (``LogOuter``): path conditioning (κ = −2) or equal norms (κ = p).
        tol: stop when ``‖∇F‖∞ ≤ tol · scale`` after a sweep.
        max_iter: most sweeps; None for 10,000.

    Returns:
        A :class:`Solution`, also where it stopped short of the tolerance; its iterations are sweeps.

    Raises:
        ValueError: it is another problem, tol is not positive, or max_iter no integer of at least 0.

    Cost: each sweep reads every mass a few times, on the CPU; a loop over the groups.

    Source: Lebeurrier, Vayer, Gribonval 2026, Algorithm 1; Stock, Graham, Gribonval, Jégou 2019, Algorithm 1, for equal
    norms.

    Example:
        >>> import torch
        >>> from dagpath.solver import MassAggregator, Problem, solve_coordinate, solve_newton
        >>> masses = MassAggregator(num_groups=2)
        >>> masses.add(torch.tensor([1.0, 4.0, 9.0]), dst=torch.tensor([1, 2, 0]), src=torch.tensor([0, 1, 2]))
        >>> problem = Problem.path_conditioning(masses)
        >>> torch.allclose(solve_coordinate(problem).z, solve_newton(problem).z)
        True
    """
    check_limits(tol, max_iter)
    if not isinstance(problem.outer, LogOuter):
        raise ValueError(
            f"the coordinate solver minimizes logarithms of sums only, not {type(problem.outer).__name__}; use "
            "solver='newton'"
        )
    start = time.perf_counter()
    kappa, bound = problem.kappa, problem.bound
    limits = np.broadcast_to(np.asarray(bound, dtype=np.float64), problem.costs.shape)
    largest = np.exp(abs(kappa) * limits) * (1 + 1e-12)  # a little above, so that what is at the bound is cut to it
    surplus = -problem.costs / kappa
    batches = list(_batches(problem.matrix))
    first = problem.at(np.zeros(problem.num_groups))
    point, sweeps = first.without_idle(), 0
    while point.optimality > tol and sweeps < (10_000 if max_iter is None else max_iter):
        z = np.append(0.0, point.z)
        total = point.total
        for batch in batches:
            inflow, outflow = batch.into @ np.exp(-kappa * z), batch.out_of @ np.exp(kappa * z)
            part = slice(batch.first, batch.first + len(inflow))
            x, total = _minimize_in_turn(
                problem.outer.p,
                total,
                np.exp(-kappa * z[part]),
                inflow,
                outflow,
                surplus[batch.first - 1 :],
                largest[batch.first - 1 :],
            )
            here = limits[batch.first - 1 :][: len(x)]
            z[part] = np.clip(-np.log(x) / kappa, -here, here)
        point, sweeps = problem.at(z[1:]), sweeps + 1
    reached, seconds = point.optimality, time.perf_counter() - start
    found, held = torch.from_numpy(point.z), torch.from_numpy(point.held)
    return Solution(found, (first.value, point.value), reached, sweeps, 0, reached <= tol, seconds, held)


def _minimize_in_turn(
    p: float, total: float, x: Array, inflow: Array, outflow: Array, surplus: Array, largest: Array
) -> tuple[Array, float]:
    """Minimize over groups that share no element; their new x, and the new total."""
    found = x.copy()
    for index, (old, mass_in, mass_out, a, most) in enumerate(
        zip(x.tolist(), inflow.tolist(), outflow.tolist(), surplus.tolist(), largest.tolist(), strict=False)
    ):
        if mass_in == 0 and mass_out == 0:
            continue
        rest = max(total - mass_in / old - mass_out * old, 0.0)
        best = found[index] = _best_factor(p, a, mass_in, mass_out, rest, most)
        total = mass_in / best + mass_out * best + rest
    return found, total


def _best_factor(p: float, a: float, inflow: float, outflow: float, rest: float, largest: float) -> float:
    """The x that minimizes ``p log(inflow/x + outflow·x + rest) + a log x``, between 1/largest and largest."""
    quadratic, linear, constant = (p + a) * outflow, a * rest, (a - p) * inflow
    root = math.sqrt(max(linear * linear - 4 * quadratic * constant, 0.0))
    if linear >= 0:  # the form of the root that does not cancel
        numerator, denominator = -2 * constant, linear + root
    else:
        numerator, denominator = root - linear, 2 * quadratic
    if denominator <= 0:  # the derivative, whose sign is that of the quadratic, has no zero at a positive x
        return 1 / largest if quadratic + linear + constant > 0 else largest
    return min(max(numerator / denominator, 1 / largest), largest)


@dataclass(frozen=True)
class _Batch:
    """Groups ``first``, ``first + 1``, … that share no element: the masses that enter them, and those that leave."""

    first: int
    into: Any
    out_of: Any


def _batches(matrix: GroupMatrix) -> Iterator[_Batch]:
    masses = matrix.to_scipy()
    masses.eliminate_zeros()
    into, out_of = csr_array(masses), csr_array(masses.T)
    linked = csr_array(into + out_of)
    linked.sort_indices()
    first = 1
    for group in range(1, matrix.layout.size + 1):
        if group < matrix.layout.size:
            others = linked.indices[linked.indptr[group] : linked.indptr[group + 1]]
            if np.searchsorted(others, first) == np.searchsorted(others, group):  # none in the batch so far
                continue
        yield _Batch(first, into[first:group], out_of[first:group])
        first = group
