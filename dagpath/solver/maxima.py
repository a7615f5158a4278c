"""Equal maxima on both sides of every group: the limit of balancing sums of ever higher powers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu

from dagpath.solver.matrix import Array, GroupMatrix, Index
from dagpath.solver.newton import solve_newton
from dagpath.solver.problem import DEFAULT_BOUND, LogOuter, Problem, Solution

_POWER = 16.0
"""Exponent of the sums whose balance is the start."""
_ANSWERS = 100
"""Most policies of the second player that are tried against one of the first."""
_SLACK = 1e-13
"""Relative rounding error of z: a smaller gain is none."""
_RIDGE = 1e-10
"""Keeps the linear system of a policy regular where no path leads to the fixed group."""


@dataclass(frozen=True)
class RangeProblem:
    """Find z with ``max_e a_e exp((B z)_e)`` over the elements that enter a group equal to that over those that leave.

    Elements within one group do not count. Groups without an element on both sides must be fixed.

    Attributes:
        matrix: the largest a of every pair of groups.
        bound: largest ``|z|``.
        live: number of live elements, for the report.
    """

    matrix: GroupMatrix
    bound: float = DEFAULT_BOUND
    live: int | None = None

    @cached_property
    def _log_entries(self) -> Array:
        (dst, *_), (src, *_) = self.matrix.layout.groups_by_part
        values: Array = self.matrix.masses.cpu().log().numpy()
        return np.where(dst == src, -np.inf, values)

    @cached_property
    def _log_blocks(self) -> list[tuple[Index, Index, Array]]:
        """Destination groups, source groups and log a of each block; −inf within a group."""
        (_, *dsts), (_, *srcs) = self.matrix.layout.groups_by_part
        return [
            (dst, src, np.where(dst[:, None] == src[None, :], -np.inf, block.cpu().log().numpy()))
            for dst, src, block in zip(dsts, srcs, self.matrix.blocks, strict=True)
        ]

    def largest(self, z: Array) -> tuple[_Largest, _Largest]:
        """At z, [num_groups + 1] with z[0] = 0: of each group the largest element that enters, and that leaves."""
        entering, leaving = _Largest.nothing(len(z)), _Largest.nothing(len(z))
        (dst, *_), (src, *_) = self.matrix.layout.groups_by_part
        scaled = self._log_entries + z[dst] - z[src]
        entering.take(dst, scaled, src, self._log_entries)
        leaving.take(src, scaled, dst, self._log_entries)
        for dst, src, logs in self._log_blocks:
            row, column = np.arange(len(dst)), np.arange(len(src))
            best = (logs - z[src]).argmax(1)
            entering.take(dst, logs[row, best] + z[dst] - z[src[best]], src[best], logs[row, best])
            best = (logs + z[dst][:, None]).argmax(0)
            leaving.take(src, logs[best, column] + z[dst[best]] - z[src], dst[best], logs[best, column])
        return entering, leaving

    def value(self, z: Array) -> float:
        """The largest ``|log max_in − log max_out|`` of a group at z, [num_groups]."""
        return self._imbalance(np.append(0.0, z))

    def solve(self, tol: float, max_iter: int | None) -> Solution:
        """Strategy iteration (Hoffman and Karp 1966).

        Equality says ``2 z = max_out (log a + z_dst) + min_in (z_src − log a)`` for every group: the value of a game in
        which, at every group, a coin decides whether the one player chooses an element that leaves it or the other one
        that enters it. The choice of the first is held, the best answer of the second found by policy iteration (a
        sparse linear system for each policy), and then the first chooses anew. The start is the balance of sums of
        16th powers. Where the bound stops groups, or a step does not halve the largest difference, each group is moved
        half way to equality instead.
        """
        start = time.perf_counter()
        size = self.matrix.layout.size
        nothing = torch.zeros(size - 1, dtype=torch.float64)
        rough = Problem(
            self.matrix.divided(self.matrix.largest).tempered(_POWER),
            LogOuter(1.0),
            _POWER,
            nothing,
            _POWER,
            self.bound,
        )
        z = np.append(0.0, solve_newton(rough, tol=1e-6).z.numpy())
        before, reached = self._imbalance(np.zeros(size)), self._imbalance(z)
        iterations, trial = 0, z
        while reached > tol and iterations < (1_000 if max_iter is None else max_iter):
            trial = self._answer(trial)
            following = trial.clip(-self.bound, self.bound)
            found = self._imbalance(following)
            if not found <= reached / 2:
                following = z + self._pull(z) / 4
                found = self._imbalance(following)
            z, reached, iterations = following, found, iterations + 1
        return Solution(
            torch.from_numpy(z[1:].copy()),
            (before, reached),
            reached,
            iterations,
            0,
            reached <= tol,
            time.perf_counter() - start,
        )

    def _answer(self, z: Array) -> Array:
        """With the largest elements that leave held as they are at z, the z at which all are equal."""
        entering, leaving = self.largest(z)
        for _ in range(_ANSWERS):
            z = self._equal(z, entering, leaving)
            better, _ = self.largest(z)
            with np.errstate(invalid="ignore"):
                gained = better.scaled - (entering.mass + z - z[entering.other])
            improved = gained > _SLACK * (1 + np.abs(z).max())
            if not improved.any():
                break
            entering.other[improved], entering.mass[improved] = better.other[improved], better.mass[improved]
        return z

    def _equal(self, z: Array, entering: _Largest, leaving: _Largest) -> Array:
        """The z at which the two given elements of every group are equal."""
        both = _both(entering, leaving)
        groups, every = np.flatnonzero(both), np.arange(len(z))
        ones = np.ones(len(groups))
        diagonal = np.where(both, _RIDGE, 1.0)
        rows = np.concatenate([groups, groups, groups, every])
        columns = np.concatenate([groups, entering.other[groups], leaving.other[groups], every])
        table = coo_array((np.concatenate([2 * ones, -ones, -ones, diagonal]), (rows, columns)), shape=(len(z),) * 2)
        right = diagonal * z
        right[groups] += leaving.mass[groups] - entering.mass[groups]
        found: Array = splu(table.tocsc()).solve(right)
        return np.where(np.isfinite(found), found, z)

    def _pull(self, z: Array) -> Array:
        """How far the largest that leaves stands above the largest that enters; zero where the bound stops it."""
        entering, leaving = self.largest(z)
        both = _both(entering, leaving)
        pull = np.zeros(len(z))
        pull[both] = leaving.scaled[both] - entering.scaled[both]
        return 2 * ((z + pull / 2).clip(-self.bound, self.bound) - z)

    def _imbalance(self, z: Array) -> float:
        return float(np.abs(self._pull(z)).max())


@dataclass(frozen=True)
class _Largest:
    """Of each group the largest scaled log mass on one side, the group at its other end, and its log mass unscaled."""

    scaled: Array
    other: Index
    mass: Array

    @staticmethod
    def nothing(size: int) -> _Largest:
        return _Largest(np.full(size, -np.inf), np.zeros(size, np.int64), np.full(size, -np.inf))

    def take(self, groups: Index, scaled: Array, other: Index, mass: Array) -> None:
        """Look at more elements."""
        order = np.argsort(scaled, kind="stable")  # of several at one group the last stays: the largest
        better = order[scaled[order] > self.scaled[groups[order]]]
        for mine, theirs in ((self.scaled, scaled), (self.other, other), (self.mass, mass)):
            mine[groups[better]] = theirs[better]


def _both(entering: _Largest, leaving: _Largest) -> Any:
    """The free groups with an element on both sides."""
    both = (entering.mass > -np.inf) & (leaving.mass > -np.inf)
    both[0] = False
    return both
