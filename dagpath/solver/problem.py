"""The balancing problem as numbers.

Over one variable per group, ``z`` in R^H (and ``z_0 = 0`` for the fixed group 0), minimize

    F(z) = ψ( Σ_e a_e exp(κ (z[dst_e] − z[src_e])) ) + c · z,        |z| ≤ bound

with masses ``a_e ≥ 0`` and a convex increasing ψ. Elements that join the same two groups have the same exponent, so
their masses are summed first: what remains is a non-negative matrix ``A[d, s]`` over groups, here in blocks. With
``r = exp(κz)`` and ``c = 1/r``, the scaled masses are ``W = diag(r) A diag(c)`` and everything needed is a few
matrix–vector products with A.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from dagpath.solver.matrix import Array, Masses, SeparableMatrix

DEFAULT_BOUND = 20 * math.log(2)
"""Largest |log λ|: a factor of 2**20 up or down."""
_LARGEST_EXPONENT = 350.0


class Outer(Protocol):
    """A convex increasing function ψ of the total mass S, with its derivatives."""

    def value(self, total: float) -> float: ...

    def slope(self, total: float) -> float: ...

    def curvature(self, total: float) -> float: ...


@dataclass(frozen=True)
class LogOuter:
    """``ψ(S) = p log S``: the path-conditioning criterion, where the best multiple was minimized out.

    Convex in z (the sum of exponentials inside is log-convex), though not in S.
    """

    p: float

    def value(self, total: float) -> float:
        return self.p * math.log(total)

    def slope(self, total: float) -> float:
        return self.p / total

    def curvature(self, total: float) -> float:
        return -self.p / total**2


@dataclass(frozen=True)
class SumOuter:
    """``ψ(S) = S``."""

    def value(self, total: float) -> float:
        return total

    def slope(self, total: float) -> float:
        return 1.0

    def curvature(self, total: float) -> float:
        return 0.0


@dataclass(frozen=True)
class Problem:
    """A balancing problem; see the module's first lines for the formula.

    Attributes:
        matrix: the masses A, summed per pair of groups.
        outer: ψ.
        kappa: κ.
        linear: c, float64 [num_groups].
        scale: what the gradient is measured against: ``optimality = ‖∇F‖∞ / scale``.
        bound: largest |z|; cut to 350 / |κ|, beyond which ``exp(κ z)`` leaves the range of float64.
        offset: constant added to F.
        live: number of live elements, for the report.
    """

    matrix: Masses
    outer: Outer
    kappa: float
    linear: Tensor
    scale: float
    bound: float = DEFAULT_BOUND
    offset: float = 0.0
    live: int | None = None

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")
        object.__setattr__(self, "bound", min(self.bound, _LARGEST_EXPONENT / abs(self.kappa)))

    @cached_property
    def costs(self) -> Array:
        """c on the host."""
        array: Array = self.linear.double().cpu().numpy()
        return array

    @property
    def num_groups(self) -> int:
        return len(self.linear)

    def at(self, z: Array | Tensor) -> Point:
        """The objective and its derivatives at z."""
        return Point(self, np.asarray(z, dtype=np.float64))


class Point:
    """Value and gradient of a problem at one z.

    Attributes:
        row_sums, column_sums: scaled mass at each position of the row side and of the column side.
        rows, columns: per group, the scaled mass of the elements that enter it, and of those that leave it.
        total: S.

    With W the scaled masses, D their row sums plus column sums and m their row sums minus column sums, the gradient is
    ``ψ' κ m + c`` and the Hessian ``κ² (ψ' (D − W − Wᵀ) + ψ'' m mᵀ)``: a graph Laplacian and a rank-one term.

    Cost: two products with A.
    """

    def __init__(self, problem: Problem, z: Array) -> None:
        self.problem, self.z = problem, z
        exponent = problem.kappa * np.concatenate([[0.0], z])
        self.r, self.c = np.exp(exponent), np.exp(-exponent)
        layout = problem.matrix.layout
        self._products = problem.matrix.products(self.r, self.c)
        self.row_sums = self._products[0] * self.r[layout.rows.groups]
        self.column_sums = self._products[1] * self.c[layout.columns.groups]
        self.rows = np.bincount(layout.rows.groups, self.row_sums, layout.size)
        self.columns = np.bincount(layout.columns.groups, self.column_sums, layout.size)
        self.total = float(self.rows.sum())
        self.value = problem.offset + float(problem.costs @ z)
        if self.total > 0:
            self.value += problem.outer.value(self.total)

    @cached_property
    def difference(self) -> Array:
        """m: per free group, the mass that enters minus the mass that leaves."""
        return np.subtract(self.rows, self.columns)[1:]

    @cached_property
    def gradient(self) -> Array:
        if not self.total > 0:
            return self.problem.costs
        return self.problem.outer.slope(self.total) * self.problem.kappa * self.difference + self.problem.costs

    @cached_property
    def projected_gradient(self) -> Array:
        """The gradient, zero where the bound stops the descent."""
        bound = self.problem.bound
        if not len(self.z) or np.abs(self.z).max() < bound:
            return self.gradient
        stopped = ((self.z >= bound) & (self.gradient < 0)) | ((self.z <= -bound) & (self.gradient > 0))
        return np.where(stopped, 0.0, self.gradient)

    @cached_property
    def optimality(self) -> float:
        """``‖∇F‖∞ / scale``, over the directions that the bound leaves open."""
        gradient = self.projected_gradient
        return float(np.abs(gradient).max()) / self.problem.scale if len(gradient) else 0.0

    def separable(self) -> Point:
        """This point of the problem whose blocks are replaced by their separable model here: same numbers."""
        model = copy.copy(self)
        matrix = SeparableMatrix.of(self.problem.matrix.layout, self.r, self.c, *self._products)
        model.problem = replace(self.problem, matrix=matrix)
        return model


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        z: float64 [num_groups], on the CPU.
        objective: F at zero and at z.
        optimality: ``‖∇F‖∞ / scale`` at z, over the directions that the bound leaves open.
        iterations: outer iterations (Newton steps, or sweeps).
        products: Hessian products.
        converged: is ``optimality`` at most the tolerance?
        seconds: time taken.
    """

    z: Tensor
    objective: tuple[float, float]
    optimality: float
    iterations: int
    products: int
    converged: bool
    seconds: float
