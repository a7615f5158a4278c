"""Cyclic coordinate descent: the published algorithm of path conditioning, the reference for the others."""

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

    With all groups but one fixed and ``x = exp(2 z)`` for that one, the objective is
    ``p log(c/x + b x + d) + A log x`` with the in-sum c and out-sum b of the masses without its factor, the rest d and
    A = (live elements in) − (live elements out); its minimum is the positive root of
    ``(p + A) b x² + A d x + (A − p) c = 0``. A group with only in- or only out-elements has its minimum where the
    bound or the quadratic puts it.

    Groups that follow each other and share no element do not meet in each other's sums b and c, which are therefore
    taken at once; only the total, one number, goes from one to the next. The iterates are those of one group at a time.

    Args:
        problem: a path-conditioning problem (``LogOuter``, κ = −2).
        tol: stop when ``‖∇F‖∞ ≤ tol · scale`` after a sweep.
        max_iter: most sweeps; None for 10,000.

    Raises:
        ValueError: it is another problem, tol is not positive, or max_iter no integer of at least 0.

    Source: Lebeurrier, Vayer, Gribonval 2026, Algorithm 1.
    """
    check_limits(tol, max_iter)
    if not isinstance(problem.outer, LogOuter) or problem.kappa != -2:
        raise ValueError("the coordinate solver minimizes the path-conditioning criterion only; use solver='newton'")
    start = time.perf_counter()
    surplus = problem.costs / 2
    batches = list(_batches(problem.matrix))
    first = problem.at(np.zeros(problem.num_groups))
    point, sweeps = first.without_idle(), 0
    while point.optimality > tol and sweeps < (10_000 if max_iter is None else max_iter):
        z = np.append(0.0, point.z)
        total = point.total
        for batch in batches:
            inflow, outflow = batch.into @ np.exp(2 * z), batch.out_of @ np.exp(-2 * z)
            part = slice(batch.first, batch.first + len(inflow))
            z[part], total = _minimize_in_turn(
                problem.outer.p, total, z[part], inflow, outflow, surplus[batch.first - 1 :], problem.bound
            )
        point, sweeps = problem.at(z[1:]), sweeps + 1
    reached, seconds = point.optimality, time.perf_counter() - start
    return Solution(torch.from_numpy(point.z), (first.value, point.value), reached, sweeps, 0, reached <= tol, seconds)


def _minimize_in_turn(
    p: float, total: float, z: Array, inflow: Array, outflow: Array, surplus: Array, bound: float
) -> tuple[Array, float]:
    """Minimize over groups that share no element; their new z, and the new total."""
    found = z.copy()
    for index, (old, mass_in, mass_out, a) in enumerate(
        zip(np.exp(2 * z).tolist(), inflow.tolist(), outflow.tolist(), surplus.tolist(), strict=False)
    ):
        if mass_in == 0 and mass_out == 0:
            continue
        rest = max(total - mass_in / old - mass_out * old, 0.0)
        x = _best_factor(p, a, mass_in, mass_out, rest, bound)
        found[index] = math.log(x) / 2
        total = mass_in / x + mass_out * x + rest
    return found, total


def _best_factor(p: float, a: float, inflow: float, outflow: float, rest: float, bound: float) -> float:
    """The x > 0 that minimizes ``p log(inflow/x + outflow·x + rest) + a log x``, within the bound on ``log(x)/2``."""
    quadratic, linear, constant = (p + a) * outflow, a * rest, (a - p) * inflow
    low, high = math.exp(-2 * bound), math.exp(2 * bound)
    root = math.sqrt(max(linear * linear - 4 * quadratic * constant, 0.0))
    if linear >= 0:  # the form of the root that does not cancel
        numerator, denominator = -2 * constant, linear + root
    else:
        numerator, denominator = root - linear, 2 * quadratic
    if denominator <= 0:  # the derivative, whose sign is that of the quadratic, has no zero at a positive x
        return low if quadratic + linear + constant > 0 else high
    return min(max(numerator / denominator, low), high)


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
