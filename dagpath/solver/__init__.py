"""Convex balancing problems and their solvers. Numbers only: nothing here knows of models."""

from collections.abc import Callable

from dagpath.solver.aggregate import MassAggregator
from dagpath.solver.coordinate import solve_coordinate
from dagpath.solver.matrix import Block, GroupMatrix
from dagpath.solver.maxima import RangeProblem
from dagpath.solver.newton import solve_newton
from dagpath.solver.problem import LogOuter, Outer, Point, Problem, Solution, SumOuter
from dagpath.solver.rounding import round_to_powers_of_two

SOLVERS: dict[str, Callable[[Problem, float, int | None], Solution]] = {
    "newton": solve_newton,
    "coordinate": solve_coordinate,
}
"""Name of a solver, as :func:`dagpath.solver.solve` takes it -> the function ``(problem, tol, max_iter)``."""


def solve(
    problem: Problem | RangeProblem, solver: str = "newton", tol: float = 1e-9, max_iter: int | None = None
) -> Solution:
    """Minimize ``F(z)`` of a problem over ``|z| ≤ bound``, or make the maxima of a problem of ranges equal.

    Args:
        problem: a :class:`Problem`, or a :class:`RangeProblem`, which has a method of its own.
        solver: ``"newton"`` or ``"coordinate"`` (path conditioning and equal norms); leave it at ``"newton"`` for equal
            ranges.
        tol: stop when the optimality is at most this.
        max_iter: most iterations; None for the solver's default.

    Returns:
        A :class:`Solution`, also where the solver stopped short of the tolerance, as ``converged`` tells.

    Raises:
        ValueError: the solver is unknown, or cannot solve this problem; tol is not positive, or max_iter no integer of
            at least 0.
        TypeError: it is no problem.

    Cost: that of :func:`solve_newton`, :func:`solve_coordinate` or :meth:`RangeProblem.solve`.

    Example:
        >>> import torch
        >>> from dagpath.solver import SOLVERS, MassAggregator, Problem, solve
        >>> masses = MassAggregator(num_groups=1)
        >>> masses.add(torch.tensor([1.0, 16.0]), dst=torch.tensor([1, 0]), src=torch.tensor([0, 1]))
        >>> problem = Problem.path_conditioning(masses)
        >>> [round(float(solve(problem, name).z.exp()), 6) for name in SOLVERS]  # exp(−2z) + 16 exp(2z) is the smallest
        [0.5, 0.5]
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known are {', '.join(map(repr, SOLVERS))}")
    if isinstance(problem, RangeProblem):
        if solver != "newton":
            raise ValueError(f"solver={solver!r} cannot solve equal ranges; leave it at 'newton'")
        return problem.solve(tol, max_iter)
    if not isinstance(problem, Problem):
        raise TypeError(f"expected a Problem or a RangeProblem, got {type(problem).__name__}")
    return SOLVERS[solver](problem, tol, max_iter)


__all__ = [
    "SOLVERS",
    "Block",
    "GroupMatrix",
    "LogOuter",
    "MassAggregator",
    "Outer",
    "Point",
    "Problem",
    "RangeProblem",
    "Solution",
    "SumOuter",
    "round_to_powers_of_two",
    "solve",
    "solve_coordinate",
    "solve_newton",
]
