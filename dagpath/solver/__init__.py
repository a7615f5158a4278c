"""Convex balancing problems and their solvers. Numbers only: nothing here knows of models."""

from dagpath.solver.coordinate import solve_coordinate
from dagpath.solver.newton import solve_newton
from dagpath.solver.problem import GroupMatrix, LogOuter, MassAggregator, Outer, Problem, Solution, SumOuter

SOLVERS = {"newton": solve_newton, "coordinate": solve_coordinate}

__all__ = [
    "SOLVERS",
    "GroupMatrix",
    "LogOuter",
    "MassAggregator",
    "Outer",
    "Problem",
    "Solution",
    "SumOuter",
    "solve_coordinate",
    "solve_newton",
]
