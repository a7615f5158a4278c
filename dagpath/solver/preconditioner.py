"""The Hessian of the separable model, inverted directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu

from dagpath.solver.matrix import Array, Terms
from dagpath.solver.problem import Point

_DENSE = 2**19
"""Largest number of entries of U that is kept as a dense array."""
_GROUND = 1e-12
"""Relative addition to the diagonal, so that groups linked to each other alone do not make the Hessian singular."""


LONGEST = 4.0
"""Largest change of a group in one step: far from the minimum the quadratic model says little of exponentials."""
_NEAR = 0.1
"""Groups this near to the bound may be held there, so that none goes to and fro."""


class SeparableHessian:
    """The Hessian at a point, every block W replaced by ``u vᵀ / T`` with its row sums u, column sums v and total T.

    Scaled to unit diagonal and divided by ``κ² ψ'``, it is ``I − U K Uᵀ``, positive semi-definite like the Hessian
    itself (a graph Laplacian with the same degrees, and the same rank-one term). U has two columns for each block and
    for each single entry, and one for the rank-one term. Single entries that would close a cycle are left out; twice
    their mass on the diagonal keeps the rest above the Hessian. By the Woodbury formula the inverse is

        I + U (K⁻¹ − Uᵀ U)⁻¹ Uᵀ

    Cost: a few operations per group, and a factorization of a small matrix that is sparse where there are many blocks.

    Attributes:
        scale: [num_groups + 1], inverse square roots of the diagonal; zero for the groups that take no part, which have
            no mass or are held at the bound.
        damping: [num_groups + 1], what is added to the diagonal, divided by ``κ² ψ'``, so that no group's own step is
            longer than ``LONGEST``. At the minimum nothing is.
        held: [num_groups], the steps of the groups that are held: theirs alone, without a thought of the others.
        point: where.
        factor: ψ'' / ψ' there.
        exact: is it the Hessian itself? So it is for a separable problem whose single entries form no cycle.
    """

    def __init__(self, point: Point) -> None:
        problem, matrix = point.problem, point.matrix
        layout, terms = matrix.layout, matrix.layout.terms
        degree: Array = np.add(point.rows, point.columns)
        for side in (layout.rows, layout.columns):
            degree = degree + np.bincount(side.groups[terms.rest], point.row_sums[terms.rest], layout.size)
        slope = problem.outer.slope(point.total) if point.total > 0 else 1.0
        self.point = point
        self.factor = problem.outer.curvature(point.total) / slope if point.total > 0 else 0.0
        self.exact = matrix.is_separable and not len(terms.rest)
        self._steepness = problem.kappa**2 * slope

        live = degree > 0
        floor = np.append(0.0, np.abs(point.gradient) / (self._steepness * LONGEST))
        self.damping = np.maximum(floor - degree, 0.0) * live
        degree = degree + self.damping
        alone = -point.gradient / (self._steepness * np.where(live, degree, 1.0)[1:])
        self.held = np.where(_held(point, alone), alone, 0.0)
        free = live & np.append(False, (self.held == 0) & (point.gradient != 0))
        self.scale = np.zeros(layout.size)
        self.scale[free] = (degree[free] * (1 + _GROUND)) ** -0.5
        self._columns = self._low_rank(terms)
        self._inverse = self._factorized(terms.number)

    def solve(self, right: Array) -> Array:
        """``H d = right`` on the groups that take part, zero elsewhere; both [num_groups]."""
        return self.unscaled(self.precondition(self.scale * np.concatenate([[0.0], right])))

    def unscaled(self, solution: Array) -> Array:
        """From a solution of the scaled system, [num_groups + 1], to one in z, [num_groups]."""
        return (self.scale * solution)[1:] / self._steepness

    def precondition(self, right: Array) -> Array:
        """The inverse of the scaled Hessian times a vector; both [num_groups + 1]."""
        result: Array = right + self._columns @ self._inverse(self._columns.T @ right)
        return result

    def _low_rank(self, terms: Terms) -> Any:
        """U."""
        point = self.point
        row_sums, column_sums = point.row_sums[terms.rows], point.column_sums[terms.columns]
        totals = np.bincount(terms.row_terms, row_sums, terms.number)
        weight = np.where(totals > 0, totals, 1.0) ** -0.5
        size, last = len(self.scale), 2 * terms.number
        u = row_sums * self.scale[terms.row_groups] * weight[terms.row_terms]
        v = column_sums * self.scale[terms.column_groups] * weight[terms.column_terms]
        m = self.scale[1:] * point.difference * abs(self.factor) ** 0.5
        if size * (last + 1) <= _DENSE:
            dense = np.zeros((last + 1, size))
            dense.ravel()[terms.row_places] = u
            dense.ravel()[terms.column_places] = v
            dense[last, 1:] = m
            return dense.T
        places = np.concatenate([terms.row_places, terms.column_places, last * size + np.arange(1, size)])
        return coo_array((np.concatenate([u, v, m]), np.divmod(places, size)), shape=(last + 1, size)).T.tocsr()

    def _factorized(self, number: int) -> Callable[[Array], Array]:
        """Multiplication by ``(K⁻¹ − Uᵀ U)⁻¹``; by zero, which leaves the diagonal alone, if that is singular."""
        products = self._columns.T @ self._columns
        first, second = np.arange(number), number + np.arange(number)
        rows = np.concatenate([first, second, [2 * number]])
        columns = np.concatenate([second, first, [2 * number]])
        values = np.append(np.ones(2 * number), -1.0 if self.factor > 0 else 1.0)
        try:
            if isinstance(products, np.ndarray):
                products[rows, columns] -= values
                inverse = np.linalg.inv(-products)
                return lambda y: inverse @ y
            inner = coo_array((values, (rows, columns)), shape=products.shape) - products
            solve: Callable[[Array], Array] = splu(inner.tocsc()).solve
            return solve
        except (np.linalg.LinAlgError, RuntimeError):
            self.exact = False
            return np.zeros_like


def _held(point: Point, alone: Array) -> Any:
    """The groups at the bound, or so near that their own step takes them there (Bertsekas 1982)."""
    bound = point.problem.bound
    if (np.abs(point.z) < bound - _NEAR).all():
        return False
    near = min(_NEAR, float(np.abs((point.z + alone).clip(-bound, bound) - point.z).max()))
    return ((point.z >= bound - near) & (alone > 0)) | ((point.z <= near - bound) & (alone < 0))
