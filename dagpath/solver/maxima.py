"""Equal maxima on both sides of every group: the limit of balancing sums of ever higher powers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu
from torch import Tensor

from dagpath.solver.checks import check_bound, check_limits, checked_z
from dagpath.solver.matrix import Array, GroupMatrix, Index
from dagpath.solver.problem import DEFAULT_BOUND, Solution

_SLACK = 1e-13
"""Relative rounding error of z: a smaller gain is none."""
_RIDGE = 1e-10
"""Keeps the linear system of a policy regular where no path leads to the fixed group or to the bound."""


class _Elements(NamedTuple):
    """One element of each of some groups: log a, and the group at its other end."""

    mass: Array
    other: Index

    def at(self, groups: Any) -> _Elements:
        return _Elements(self.mass[groups], self.other[groups])

    def where(self, kept: Any, others: _Elements) -> _Elements:
        return _Elements(np.where(kept, self.mass, others.mass), np.where(kept, self.other, others.other))


@dataclass(frozen=True)
class RangeProblem:
    """Find z with ``max_e a_e exp((B z)_e)`` over the elements that enter a group equal to that over those that leave.

    Elements within one group do not count. Groups without an element on both sides keep ``z = 0``. A group at the bound
    may have the larger maximum on the side that the bound keeps it from making smaller.

    Attributes:
        matrix: the largest a of every pair of groups.
        bound: largest ``|z|``, a number, or a NumPy array [num_groups] with one for each group.
        live: number of live elements, those of positive mass, for the report.
        measure: what the optimality is, in words, for the report.

    Raises:
        TypeError: matrix is something else.
        ValueError: bound is not positive.

    Example:
        >>> import torch
        >>> from dagpath.solver import MassAggregator, RangeProblem, solve
        >>> largest = MassAggregator(num_groups=1, largest=True)
        >>> largest.add(torch.tensor([1.0, 2.0]), dst=torch.tensor(1), src=torch.tensor(0))
        >>> largest.add(torch.tensor([8.0, 3.0]), dst=torch.tensor(0), src=torch.tensor(1))
        >>> solution = solve(RangeProblem(largest.matrix()))
        >>> round(float(solution.z.exp()), 6)  # 2 λ = 8 / λ
        2.0
    """

    matrix: GroupMatrix
    bound: float | Array = DEFAULT_BOUND
    live: int | None = None
    measure: str = "largest |log max in − log max out|"

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, GroupMatrix):
            raise TypeError(f"matrix must be what GroupMatrix.of returns, got {type(self.matrix).__name__}")
        check_bound(self.bound, self.num_groups)

    @property
    def num_groups(self) -> int:
        """The number of variables, one for each free group."""
        return self.matrix.layout.size - 1

    def value(self, z: Array | Tensor) -> float:
        """The largest ``|log max_in − log max_out|`` of a group at z which the bound lets shrink.

        Args:
            z: [num_groups], a NumPy array or a tensor on the CPU.

        Raises:
            ValueError: z has another shape, or is NaN somewhere.
        """
        return self._imbalance(np.append(0.0, checked_z(z, self.num_groups, math.inf)))

    def solve(self, tol: float = 1e-9, max_iter: int | None = None) -> Solution:
        """Strategy iteration (Hoffman and Karp 1966).

        Equality says ``2 z = max_out (log a + z_dst) + min_in (z_src − log a)`` for every group, cut to the bound: the
        value of a game in which, at every group, a coin decides whether the one player chooses an element that leaves
        it or the other one that enters it, and in which the first may stop at −bound, the second at +bound. The choices
        of the first are held while the second finds its best answer by policy iteration (a sparse linear system for
        each change of choices), and then the first chooses anew.

        Args:
            tol: stop when no ``|log max_in − log max_out|`` that the bound lets shrink is larger.
            max_iter: most changes of choices; None for 1,000. Layered graphs take about as many as they
                have layers, whatever their width.

        Returns:
            A :class:`Solution`, whose objective is the largest imbalance, as :meth:`value` gives it.

        Raises:
            ValueError: tol is not positive, or max_iter no integer of at least 0.

        Cost: for every change of choices a pass over the masses and a sparse linear system over the groups, on the CPU.
        """
        check_limits(tol, max_iter)
        start = time.perf_counter()
        play, iterations = _Play(self), 0
        before = self._imbalance(play.z)
        lowest, reached = play.z, before
        while reached > tol and iterations < (1_000 if max_iter is None else max_iter):
            iterations += 1
            play.settle_()
            if play.stop_() or play.answer_():
                continue
            imbalance = self._imbalance(play.z)
            if imbalance < reached:
                lowest, reached = play.z, imbalance
            play.choose_()
        seconds = time.perf_counter() - start
        z = torch.from_numpy(lowest[1:].clip(-self.bound, self.bound))
        held = torch.from_numpy(self._held(np.append(0.0, z.numpy())))
        return Solution(z, (before, reached), reached, iterations, 0, reached <= tol, seconds, held)

    @cached_property
    def _logs(self) -> list[tuple[Index, Index, Array]]:
        """Destination groups, source groups and log a, of the entries [n], then of each block."""
        logs = [masses.cpu().log().numpy() for masses in self.matrix.parts]
        return list(zip(*self.matrix.layout.groups_by_part, logs, strict=True))

    @cached_property
    def groups(self) -> Index:
        """The free groups with an element on both sides."""
        both = np.arange(self.matrix.layout.size) > 0
        for entering in (True, False):
            both &= self._largest(np.zeros(len(both)), entering).mass > -np.inf
        return np.flatnonzero(both)

    @cached_property
    def bounds(self) -> Array:
        """The bound of each of these groups."""
        array: Array = np.broadcast_to(np.asarray(self.bound, dtype=np.float64), (self.num_groups,))[self.groups - 1]
        return array

    def largest(self, z: Array, entering: bool) -> _Elements:
        """Of these groups the elements that are the largest at z of those that enter it, or of those that leave it."""
        return self._largest(z, entering).at(self.groups)

    def _largest(self, z: Array, entering: bool) -> _Elements:
        """Of every group the element that is the largest at z of those that enter it, or of those that leave it."""
        largest, mass, other = np.full(len(z), -np.inf), np.full(len(z), -np.inf), np.zeros(len(z), np.int64)
        for dst, src, logs in self._logs:
            here, there = (dst, src) if entering else (src, dst)
            moved = -z[there] if entering else z[there]
            if logs.ndim == 2:
                table = logs if entering else logs.T
                best = (table + moved).argmax(1)
                logs, moved, there = table[np.arange(len(here)), best], moved[best], there[best]
            values = logs + moved
            order = np.argsort(values, kind="stable")  # of several at one group the last stays: the largest
            better = order[values[order] > largest[here[order]]]
            for mine, theirs in ((largest, values), (mass, logs), (other, there)):
                mine[here[better]] = theirs[better]
        return _Elements(mass, other)

    def _imbalance(self, z: Array) -> float:
        middle = _middle(z, self.largest(z, True), self.largest(z, False))
        away = 2 * (middle.clip(-self.bounds, self.bounds) - z[self.groups])
        return float(np.abs(away).max(initial=0.0))

    def _held(self, z: Array) -> Any:
        """Which groups would be further out, for equal maxima, if the bound did not stop them; bool [num_groups]."""
        middle, here = _middle(z, self.largest(z, True), self.largest(z, False)), z[self.groups]
        beyond = np.abs(middle) - self.bounds > _SLACK * (1 + np.abs(middle))
        held = np.zeros(len(z), dtype=np.bool_)
        held[self.groups] = beyond & (np.abs(here) >= self.bounds) & (middle * here > 0)
        return held[1:]


def _middle(z: Array, entering: _Elements, leaving: _Elements) -> Array:
    """Where each group would have to be for the two elements to be equal, the others staying."""
    middle: Array = (leaving.mass + z[leaving.other] + z[entering.other] - entering.mass) / 2
    return middle


class _Play:
    """The game, with what the players have chosen for each group that has an element on both sides.

    Attributes:
        z: [num_groups + 1], the value of these choices.
        entering, leaving: the elements that the second and the first player chose.
        low, high: where the first and the second player stop.
    """

    def __init__(self, problem: RangeProblem) -> None:
        self.problem = problem
        self.z = np.zeros(problem.matrix.layout.size)
        self.entering, self.leaving = problem.largest(self.z, True), problem.largest(self.z, False)
        self.low = self.high = np.zeros(len(problem.groups), dtype=np.bool_)

    def settle_(self) -> None:
        """Make z the value of the choices: where the two elements of every group are equal, but for those stopped."""
        moving = ~(self.low | self.high)
        entering, leaving = (elements.at(moving) for elements in (self.entering, self.leaving))
        groups, every = self.problem.groups[moving], np.arange(len(self.z))
        bounds, ones, diagonal = self.problem.bounds, np.ones(len(groups)), np.ones(len(self.z))
        right = self.z.copy()
        right[self.problem.groups] = right[self.problem.groups].clip(-bounds, bounds)  # where stopped groups stay
        right[groups] = _RIDGE * right[groups] + leaving.mass - entering.mass
        diagonal[groups] = 2 + _RIDGE
        rows = np.concatenate([every, groups, groups])
        columns = np.concatenate([every, entering.other, leaving.other])
        table = coo_array((np.concatenate([diagonal, -ones, -ones]), (rows, columns)), shape=(len(every), len(every)))
        self.z = splu(table.tocsc()).solve(right)

    def stop_(self) -> bool:
        """Either player stops at its bound where these choices lead beyond it; is there such a group, a new one?"""
        values = self.z[self.problem.groups]
        low, high = (values < -self.problem.bounds) & ~self.low, (values > self.problem.bounds) & ~self.high
        self.low, self.high = self.low | low, self.high | high
        return bool(low.any() or high.any())

    def answer_(self) -> bool:
        """The second player chooses anew where that makes less of z; is there such a group?"""
        values, better = self.z[self.problem.groups], self.problem.largest(self.z, entering=True)
        gained = values - _middle(self.z, better, self.leaving) > _SLACK * (1 + np.abs(values))
        self.high = self.high & ~gained
        self.entering = self.entering.where(~gained, better)
        return bool((gained & ~self.low).any())

    def choose_(self) -> None:
        """The first player chooses anew where that makes more of z."""
        values, better = self.z[self.problem.groups], self.problem.largest(self.z, entering=False)
        gained = _middle(self.z, self.entering, better) - values > _SLACK * (1 + np.abs(values))
        self.low = self.low & ~gained
        self.leaving = self.leaving.where(~gained, better)
