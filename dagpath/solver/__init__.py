"""Convex balancing problems and their solvers. Numbers only: nothing here knows of models."""

from dagpath.solver.aggregate import MassAggregator
from dagpath.solver.coordinate import solve_coordinate
from dagpath.solver.matrix import Block, GroupMatrix
from dagpath.solver.newton import solve_newton
from dagpath.solver.problem import LogOuter, Outer, Problem, Solution, SumOuter

SOLVERS = {"newton": solve_newton, "coordinate": solve_coordinate}

__all__ = [
    "SOLVERS",
    "Block",
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
