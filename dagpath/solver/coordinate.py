"""Cyclic coordinate descent: the published algorithm of path conditioning, the reference for the others."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import torch
from scipy.sparse import coo_array

from dagpath.solver.matrix import GroupMatrix
from dagpath.solver.problem import LogOuter, Problem, Solution


def solve_coordinate(problem: Problem, tol: float = 1e-9, max_iter: int | None = None) -> Solution:
    """Minimize over one group after the other, exactly, in sweeps.

    With all groups but one fixed and ``x = exp(2 z)`` for that one, the objective is
    ``p log(c/x + b x + d) + A log x`` with the in-sum c and out-sum b of the masses without its factor, the rest d and
    A = (live elements in) − (live elements out); its minimum is the positive root of
    ``(p + A) b x² + A d x + (A − p) c = 0``. A group with only in- or only out-elements has its minimum where the
    bound or the quadratic puts it.

    Args:
        problem: a path-conditioning problem (``LogOuter``, κ = −2).
        tol: stop when ``‖∇F‖∞ ≤ tol · scale`` after a sweep.
        max_iter: most sweeps; None for 10,000.

    Source: Lebeurrier, Vayer, Gribonval 2026, Algorithm 1.
    """
    if not isinstance(problem.outer, LogOuter) or problem.kappa != -2:
        raise ValueError("the coordinate solver minimizes the path-conditioning criterion only; use solver='newton'")
    start = time.perf_counter()
    p, half_linear = problem.outer.p, problem.costs / 2
    z = np.zeros(problem.num_groups)
    columns, rows = _entries(problem, by="src"), _entries(problem, by="dst")
    point = problem.at(np.zeros(problem.num_groups))
    before, reached, sweeps = point.value, point.optimality, 0
    while reached > tol and sweeps < (10_000 if max_iter is None else max_iter):
        padded = np.concatenate([[0.0], z])
        total = point.total
        for group in range(1, len(padded)):
            sources, mass_in = rows[group]
            targets, mass_out = columns[group]
            old = math.exp(2 * padded[group])
            inflow = float(mass_in @ np.exp(2 * padded[sources]))
            outflow = float(mass_out @ np.exp(-2 * padded[targets]))
            if inflow == 0 and outflow == 0:
                continue
            rest = max(total - inflow / old - outflow * old, 0.0)
            new = _best_factor(p, half_linear[group - 1], inflow, outflow, rest, problem.bound)
            padded[group] = math.log(new) / 2
            total = inflow / new + outflow * new + rest
        z = padded[1:]
        point = problem.at(z)
        reached, sweeps = point.optimality, sweeps + 1
    return Solution(
        torch.from_numpy(point.z),
        (before, point.value),
        reached,
        sweeps,
        0,
        reached <= tol,
        time.perf_counter() - start,
    )


def _best_factor(p: float, a: float, inflow: float, outflow: float, rest: float, bound: float) -> float:
    """The x > 0 that minimizes ``p log(inflow/x + outflow·x + rest) + a log x``, within the bound on ``log(x)/2``."""
    quadratic, linear, constant = (p + a) * outflow, a * rest, (a - p) * inflow
    low, high = math.exp(-2 * min(bound, 350.0)), math.exp(2 * min(bound, 350.0))
    root = math.sqrt(max(linear * linear - 4 * quadratic * constant, 0.0))
    if linear >= 0:  # the form of the root that does not cancel
        numerator, denominator = -2 * constant, linear + root
    else:
        numerator, denominator = root - linear, 2 * quadratic
    if denominator <= 0:
        return high
    return min(max(numerator / denominator, low), high)


def _entries(problem: Problem, by: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each group, the groups at the other end of its elements and their masses; none inside one group."""
    matrix = problem.matrix
    assert isinstance(matrix, GroupMatrix)
    rows, columns, entries = matrix.layout.rows, matrix.layout.columns, matrix.layout.rows.num_entries
    parts = [(rows.groups[:entries], columns.groups[:entries], matrix.masses.cpu().numpy())]
    row_ends, column_ends = (np.split(side.groups[entries:], side.starts[1:]) for side in (rows, columns))
    for dst, src, block in zip(row_ends, column_ends, matrix.blocks, strict=False):
        parts.append((dst.repeat(len(src)), np.tile(src, len(dst)), block.cpu().numpy().ravel()))
    dst, src, masses = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    between = (dst != src) & (masses > 0)
    first, second = (dst, src) if by == "dst" else (src, dst)
    shape = (matrix.layout.size, matrix.layout.size)
    table = coo_array((masses[between], (first[between], second[between])), shape=shape).tocsr()
    ends = table.indptr
    return [(table.indices[s:e], table.data[s:e]) for s, e in itertools.pairwise(ends)]
