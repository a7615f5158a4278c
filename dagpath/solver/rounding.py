"""Factors that are powers of two: the best found near the minimum."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from dagpath.solver.checks import checked_z
from dagpath.solver.matrix import Array
from dagpath.solver.maxima import RangeProblem
from dagpath.solver.problem import Point, Problem

_UNIT = math.log(2)
_ROUNDS = 200
"""Most rounds of improvement."""


def round_to_powers_of_two(problem: Problem | RangeProblem, z: Array | Tensor) -> tuple[Array, float]:
    """A z near the one given whose every ``z / log 2`` is an integer, with an objective as low as was found.

    Finding the best is an integer program. This takes the lower of two local minima, that from the nearest integers and
    that from zero (no rescaling at all): there no single group can be doubled or halved to advantage. For equal ranges
    it takes the better of those two starts.

    Args:
        problem: which.
        z: [num_groups], a NumPy array or a tensor on the CPU; the minimum, or anything near it.

    Returns:
        z, float64 [num_groups], and the objective there.

    Raises:
        ValueError: z has another shape, or is NaN somewhere.

    Cost: two passes over the masses for each round of improvement, of which there are few.

    Example:
        >>> import math, torch
        >>> from dagpath.solver import MassAggregator, Problem, round_to_powers_of_two, solve
        >>> masses = MassAggregator(num_groups=1)
        >>> masses.add(torch.tensor([1.0, 30.0]), dst=torch.tensor([1, 0]), src=torch.tensor([0, 1]))
        >>> problem = Problem.path_conditioning(masses)
        >>> solution = solve(problem)
        >>> z, objective = round_to_powers_of_two(problem, solution.z)
        >>> round(float(solution.z.exp()), 4), (z / math.log(2)).tolist(), objective > solution.objective[1]
        (0.4273, [-1.0], True)
    """
    most, z = np.floor(problem.bound / _UNIT), checked_z(z, problem.num_groups, math.inf)
    starts = np.rint(z / _UNIT).clip(-most, most) * _UNIT, np.zeros_like(z)
    if isinstance(problem, RangeProblem):
        return min(((start, problem.value(start)) for start in starts), key=lambda pair: pair[1])
    with np.errstate(all="ignore"):
        points = [_improve(problem.at(start), most) for start in starts]
    return min(((point.z, point.value) for point in points), key=lambda pair: pair[1])


def _improve(point: Point, most: float | Array) -> Point:
    """Double or halve groups, none more than ``most`` times in all, as long as the objective falls."""
    for _ in range(_ROUNDS):
        change, sign = _best_changes(point, most)
        order = np.argsort(change, kind="stable")
        order = order[change[order] < 0]
        lower = None
        while lower is None and len(order):  # all at once, or those with the most to gain
            step = np.zeros_like(point.z)
            step[order] = sign[order]
            following = point.at((np.rint(point.z / _UNIT) + step) * _UNIT)
            lower = following if following.value < point.value else None
            order = order[: len(order) // 2]
        if lower is None:
            return point
        point = lower
    return point


def _best_changes(point: Point, most: float | Array) -> tuple[Array, Array]:
    """For each group the change of the objective if it alone is doubled or halved, whichever is better, and which."""
    problem = point.problem
    changes = []
    for sign in (1.0, -1.0):
        factor = math.exp(sign * problem.kappa * _UNIT)
        totals = point.total + point.rows[1:] * (factor - 1) + point.columns[1:] * (1 / factor - 1)
        values = np.array([problem.mass_term(total) for total in totals.tolist()])
        change = values - problem.mass_term(point.total) + sign * _UNIT * problem.costs
        changes.append(np.where(np.abs(np.rint(point.z / _UNIT) + sign) <= most, change, np.inf))
    up, down = changes
    return np.minimum(up, down), np.where(up <= down, 1.0, -1.0)
