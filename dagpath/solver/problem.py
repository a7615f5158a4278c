"""The balancing problem as numbers.

Over one variable per group, ``z`` in R^H (and ``z_0 = 0`` for the fixed group 0), minimize

    F(z) = ψ( Σ_e a_e exp(κ (z[dst_e] − z[src_e])) ) + c · z,        |z| ≤ bound

with masses ``a_e ≥ 0`` and an increasing ψ that keeps a sum of exponentials convex: the logarithm, or any convex one.
Elements that join the same two groups have the same exponent, so their masses are summed first: what remains is a
non-negative matrix ``A[d, s]`` over groups, here in blocks. With ``r = exp(κz)`` and ``c = 1/r``, the scaled masses are
``W = diag(r) A diag(c)`` and everything needed is a few matrix–vector products with A.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from dagpath.solver.aggregate import MassAggregator
from dagpath.solver.checks import check_bound, checked_z
from dagpath.solver.matrix import Array, GroupMatrix, Masses, SeparableMatrix

_LARGEST_EXPONENT = 350.0
DEFAULT_BOUND = _LARGEST_EXPONENT
"""Largest |log λ|: beyond it float64 does not hold the ratio of two factors."""
_SMALL = 1e-100
"""Masses that are all smaller than this, or a mass larger than its inverse, are divided by the largest: the squares of
their sum would leave the range of float64."""


class Outer(Protocol):
    """An increasing function ψ of the total mass S > 0, such that ψ of a sum of exponentials is convex.

    Anything with these three methods is one; any convex increasing ψ is right, and so is the logarithm.

    Example:
        >>> import torch
        >>> from dagpath.solver import GroupMatrix, Problem, solve
        >>> class Square:
        ...     def value(self, total): return total * total
        ...     def slope(self, total): return 2 * total
        ...     def curvature(self, total): return 2.0
        >>> matrix = GroupMatrix.of(2, [], torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 16.0]))
        >>> solution = solve(Problem(matrix, Square(), kappa=1.0, linear=torch.zeros(1), scale=1.0))
        >>> round(float(solution.z.exp()), 6)  # where λ + 16 / λ is the smallest, its square is
        4.0
    """

    def value(self, total: float) -> float:
        """ψ(S) of a total mass above 0; an OverflowError counts as infinity."""

    def slope(self, total: float) -> float:
        """ψ'(S), positive."""

    def curvature(self, total: float) -> float:
        """ψ''(S), which may be negative, as it is for the logarithm."""


@dataclass(frozen=True)
class LogOuter:
    """``ψ(S) = p log S``, as in path conditioning, where the best multiple of the reference was minimized out.

    Convex in z (a sum of exponentials is log-convex), though not in S.

    Attributes:
        p: factor, positive; for path conditioning, the number of live elements.

    Raises:
        ValueError: p is not positive and finite.

    Example:
        >>> from dagpath.solver import LogOuter
        >>> outer = LogOuter(3.0)
        >>> outer.value(1.0), outer.slope(2.0), outer.curvature(2.0)
        (0.0, 1.5, -0.75)
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p < math.inf:
            raise ValueError(f"p must be positive and finite, got {self.p}")

    def value(self, total: float) -> float:
        """``p log S``."""
        return self.p * math.log(total)

    def slope(self, total: float) -> float:
        """``p / S``."""
        return self.p / total

    def curvature(self, total: float) -> float:
        """``−p / S²``."""
        return -self.p / total / total


@dataclass(frozen=True)
class SumOuter:
    """``ψ(S) = S``, the sum of all scaled masses itself.

    Example:
        >>> from dagpath.solver import SumOuter
        >>> SumOuter().value(5.0), SumOuter().slope(5.0), SumOuter().curvature(5.0)
        (5.0, 1.0, 0.0)
    """

    def value(self, total: float) -> float:
        """The total S itself."""
        return total

    def slope(self, total: float) -> float:
        """One everywhere."""
        return 1.0

    def curvature(self, total: float) -> float:
        """Zero everywhere."""
        return 0.0


@dataclass(frozen=True)
class Problem:
    """Minimize ``F(z) = ψ(Σ_e a_e exp(κ (z[dst_e] − z[src_e]))) + c · z`` over ``|z| ≤ bound``, with ``z_0 = 0``.

    Attributes:
        matrix: the masses A, summed per pair of groups. Under a logarithm, if all are tiny or one is huge, they are
            divided by the largest, and the offset says so.
        outer: ψ.
        kappa: κ, not zero; under a rescaling ``λ = exp(z)`` a mass is multiplied by ``(λ_dst / λ_src)**κ``.
        linear: c, [num_groups]; kept in float64.
        scale: what the gradient is divided by: ``optimality = ‖∇F‖∞ / scale``.
        bound: largest ``|z|``, a number, or a NumPy array [num_groups] with one for each group; cut to ``350 / |κ|``,
            beyond which ``exp(κ z)`` leaves the range of float64.
        offset: constant added to F.
        live: number of live elements, those of positive mass, for the report.
        measure: what the optimality is, in words, for the report.

    Raises:
        ValueError: kappa is zero, bound or scale is not positive, linear has another shape, or one is not finite.
        TypeError: matrix or outer is something else.

    Example:
        >>> import torch
        >>> from dagpath.solver import GroupMatrix, Problem, SumOuter, solve_newton
        >>> # one element of mass 1 enters group 1, one of mass 16 leaves it: λ + 16 / λ is the smallest at λ = 4
        >>> matrix = GroupMatrix.of(2, [], torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 16.0]))
        >>> solution = solve_newton(Problem(matrix, SumOuter(), kappa=1.0, linear=torch.zeros(1), scale=1.0))
        >>> round(float(solution.z.exp()), 9), round(solution.objective[1], 9)
        (4.0, 8.0)
    """

    matrix: GroupMatrix
    outer: Outer
    kappa: float
    linear: Tensor
    scale: float
    bound: float | Array = DEFAULT_BOUND
    offset: float = 0.0
    live: int | None = None
    measure: str = "largest |∇F| / scale"

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, GroupMatrix):
            raise TypeError(f"matrix must be what GroupMatrix.of returns, got {type(self.matrix).__name__}")
        if isinstance(self.outer, type):
            raise TypeError(f"outer is an instance: pass {self.outer.__name__}(), not {self.outer.__name__}")
        missing = [name for name in ("value", "slope", "curvature") if not hasattr(self.outer, name)]
        if missing:
            raise TypeError(f"outer must have methods value, slope and curvature; {self.outer!r} has no {missing[0]}")
        object.__setattr__(self, "linear", torch.as_tensor(self.linear, dtype=torch.float64).detach())
        if self.linear.shape != (self.matrix.layout.size - 1,):
            groups = self.matrix.layout.size - 1
            raise ValueError(f"linear must have shape ({groups},), one for each group, got {tuple(self.linear.shape)}")
        check_bound(self.bound, len(self.linear))
        if not bool(torch.isfinite(self.linear).all()):
            raise ValueError("linear must be finite")
        if not (math.isfinite(self.kappa) and self.kappa):
            raise ValueError(f"kappa must be finite and not zero, got {self.kappa}")
        if not math.isfinite(self.offset):
            raise ValueError(f"offset must be finite, got {self.offset}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        widest = _LARGEST_EXPONENT / abs(self.kappa)
        one = not isinstance(self.bound, np.ndarray)
        object.__setattr__(self, "bound", min(self.bound, widest) if one else np.minimum(self.bound, widest))
        if isinstance(self.outer, LogOuter) and not _SMALL < self.matrix.largest < 1 / _SMALL:
            object.__setattr__(self, "offset", self.offset + self.outer.value(self.matrix.largest))
            object.__setattr__(self, "matrix", self.matrix.divided(self.matrix.largest))

    @cached_property
    def costs(self) -> Array:
        """c on the host."""
        array: Array = self.linear.cpu().numpy()
        return array

    @property
    def num_groups(self) -> int:
        """The number of variables, one for each free group."""
        return len(self.linear)

    def mass_term(self, total: float) -> float:
        """ψ of a total mass: 0 where there is none, infinite beyond the range of float64."""
        try:
            return self.outer.value(total) if total > 0 else 0.0
        except OverflowError:  # what math.exp and powers raise; a step that leads there is too long, not an error
            return math.inf

    @staticmethod
    def path_conditioning(masses: MassAggregator, bound: float = DEFAULT_BOUND, offset: float = 0.0) -> Problem:
        """``F(z) = p log Σ_e a_e exp(−2 (B z)_e) + 2 · 1ᵀ B z`` over the live elements, those with ``a_e > 0``.

        p is their number; the offset is added once for each of them, as the logarithm of a common factor of the masses.

        Args:
            masses: the Gram entries ``g_e`` of all elements, over a reference where there is one.
            bound: largest ``|z|``.
            offset: the logarithm (natural) of what the masses were divided by.

        Raises:
            ValueError: the bound is not positive, or one of the two is not finite.

        Source: Lebeurrier, Vayer, Gribonval 2026.
        """
        p = masses.num_live
        return Problem(
            masses.matrix(),
            LogOuter(max(p, 1)),
            kappa=-2.0,
            linear=2 * masses.balance[1:],
            scale=max(p, 1),
            bound=bound,
            offset=p * offset if p else 0.0,
            live=p,
            measure="largest |∇F| / p",
        )

    @staticmethod
    def from_incidence(
        incidence: Any,
        masses: Tensor | Array,
        outer: Outer | None = None,
        kappa: float = -2.0,
        linear: Tensor | Array | None = None,
        bound: float = DEFAULT_BOUND,
        scale: float | None = None,
    ) -> Problem:
        """A problem over any sparse graph, which need not come from a model.

        Args:
            incidence: B, a sparse CSR tensor or SciPy array [num_elements, num_groups]: +1 at the group that an element
                enters, −1 at the one that it leaves; an end that has no entry is fixed.
            masses: a, [num_elements], a tensor or NumPy array, finite and at least 0.
            outer: ψ; None for path conditioning, ``p log S`` with p the number of positive masses.
            kappa: κ.
            linear: c, [num_groups], a tensor or NumPy array; None for ``−κ Bᵀ1`` over the elements of positive mass, if
                ``outer`` is None, else 0.
            bound: largest ``|z|``.
            scale: what the gradient is measured against; None for the number of positive masses.

        Returns:
            The :class:`Problem`.

        Raises:
            ValueError: shapes that do not fit, entries other than one +1 and one −1 in a row, masses that are negative
                or not finite.

        Example:
            >>> import torch, dagpath
            >>> from dagpath.solver import Problem, solve_newton
            >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1, bias=False))
            >>> incidence = dagpath.trace(net, torch.zeros(1, 1)).graph.incidence()
            >>> solution = solve_newton(Problem.from_incidence(incidence, torch.tensor([1.0, 3.0, 64.0])))
            >>> solution.converged, round(float(solution.z.exp()), 6)
            (True, 0.420448)
        """
        masses = torch.as_tensor(masses)
        dst, src = _ends(incidence, masses)
        aggregator = MassAggregator(incidence.shape[1], masses.device)
        aggregator.add(masses, dst, src)
        p = aggregator.num_live
        default = -kappa * aggregator.balance[1:] * (outer is None)
        linear = default if linear is None else torch.as_tensor(linear)
        outer = LogOuter(max(p, 1)) if outer is None else outer
        scale = max(p, 1) if scale is None else scale
        return Problem(aggregator.matrix(), outer, kappa, linear, scale, bound, live=p)

    def to_scipy(self) -> tuple[Any, Array]:
        """B and a of the summed masses, one row for each pair of groups with a mass.

        :meth:`from_incidence` takes both back, with the outer function, κ, the linear term, the bound and the scale of
        this problem; the offset, a constant, is left out.

        Returns:
            B, a ``scipy.sparse.csr_array`` [n, num_groups], and a, float64 [n].
        """
        matrix = self.matrix.to_scipy()
        matrix.eliminate_zeros()
        masses = matrix.tocoo()
        rows = np.arange(masses.nnz)
        dst, src = masses.row, masses.col
        ends = [(rows[dst > 0], dst[dst > 0] - 1, 1.0), (rows[src > 0], src[src > 0] - 1, -1.0)]
        shape = (masses.nnz, self.num_groups)
        entering, leaving = (coo_array((np.full(len(r), v), (r, c)), shape=shape) for r, c, v in ends)
        incidence = csr_array(entering + leaving)
        incidence.eliminate_zeros()
        return incidence, masses.data

    def at(self, z: Array | Tensor) -> Point:
        """The objective and its gradient at z.

        Args:
            z: [num_groups], a NumPy array or a tensor on the CPU.

        Returns:
            A :class:`Point`.

        Raises:
            ValueError: z has another shape, or ``exp(κ z)`` leaves the range of float64 (``|κ z| > 350``).
        """
        return Point(self, self.matrix, checked_z(z, self.num_groups, _LARGEST_EXPONENT / abs(self.kappa)))


def _ends(incidence: Any, masses: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that each element enters and leaves, 0 where that end is fixed."""
    parts: tuple[Tensor, ...]
    if isinstance(incidence, Tensor) and incidence.ndim == 2 and incidence.layout == torch.sparse_csr:
        parts = (incidence.crow_indices(), incidence.col_indices(), incidence.values())
    elif getattr(incidence, "format", None) == "csr":
        parts = tuple(torch.from_numpy(part) for part in (incidence.indptr, incidence.indices, incidence.data))
    else:
        kind = incidence.layout if isinstance(incidence, Tensor) else type(incidence).__name__
        raise ValueError(
            f"the incidence matrix must be 2-D sparse CSR, a tensor or a SciPy array, got {kind}; convert it"
        )
    if tuple(masses.shape) != tuple(incidence.shape[:1]):
        raise ValueError(f"masses must have shape ({incidence.shape[0]},), one per row, got {tuple(masses.shape)}")
    crow, column, value = (part.to(masses.device) for part in parts)
    row = torch.repeat_interleave(torch.arange(len(masses), device=masses.device), crow.diff())
    repeated = [torch.bincount(row[value == sign]) > 1 for sign in (1, -1)]
    bad = torch.cat([row[(value.abs() != 1) & (value != 0)], *(rows.nonzero()[:, 0] for rows in repeated)])
    if len(bad):
        raise ValueError(f"row {int(bad[0])} of the incidence matrix must have at most one +1 and one -1, nothing else")
    ends = torch.zeros(2, len(masses), dtype=torch.long, device=masses.device)
    for end, sign in zip(ends, (1, -1), strict=True):
        end[row[value == sign]] = column[value == sign].long() + 1
    return ends[0], ends[1]


class Point:
    """Value and gradient of a problem at one z. Made by :meth:`Problem.at`; all arrays are NumPy's, in float64.

    Attributes:
        problem: which problem.
        z: where, float64 [num_groups].
        matrix: the masses of the problem, or a model of them.
        value: F(z).
        total: the total mass S.
        rows: [num_groups + 1], per group the scaled mass of the elements that enter it; the fixed group is the first.
        columns: the same of those that leave it.
        row_sums: scaled mass at each position of the row side of the matrix.
        column_sums: the same of the column side.

    With W the scaled masses, D their row sums plus column sums and m their row sums minus column sums, the gradient is
    ``ψ' κ m + c`` and the Hessian ``κ² (ψ' (D − W − Wᵀ) + ψ'' m mᵀ)``: a graph Laplacian and a rank-one term.

    Cost: two products with A.

    Example:
        >>> import numpy as np, torch
        >>> from dagpath.solver import GroupMatrix, Problem, SumOuter
        >>> matrix = GroupMatrix.of(2, [], torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 16.0]))
        >>> problem = Problem(matrix, SumOuter(), kappa=1.0, linear=torch.zeros(1), scale=2.0)
        >>> start = problem.at(np.zeros(1))
        >>> start.value, start.gradient.tolist(), start.optimality  # λ + 16 / λ at λ = 1
        (17.0, [-15.0], 7.5)
    """

    def __init__(self, problem: Problem, matrix: Masses, z: Array) -> None:
        self.problem, self.matrix, self.z = problem, matrix, z
        exponent = problem.kappa * np.concatenate([[0.0], z])
        self.r, self.c = np.exp(exponent), np.exp(-exponent)
        layout = matrix.layout
        self._products = matrix.products(self.r, self.c)
        self.row_sums = self._products[0] * self.r[layout.rows.groups]
        self.column_sums = self._products[1] * self.c[layout.columns.groups]
        self.rows = np.bincount(layout.rows.groups, self.row_sums, layout.size)
        self.columns = np.bincount(layout.columns.groups, self.column_sums, layout.size)
        self.total = float(self.rows.sum())
        self.value = problem.offset + float(problem.costs @ z) + problem.mass_term(self.total)

    @cached_property
    def difference(self) -> Array:
        """Per free group the mass that enters minus the mass that leaves, m in the formulas; float64 [num_groups]."""
        return np.subtract(self.rows, self.columns)[1:]

    @cached_property
    def gradient(self) -> Array:
        """∇F, float64 [num_groups]."""
        if not self.total > 0:
            return self.problem.costs
        return self.problem.outer.slope(self.total) * self.problem.kappa * self.difference + self.problem.costs

    @cached_property
    def projected_gradient(self) -> Array:
        """∇F, but zero where the bound stops the descent; float64 [num_groups]."""
        return np.where(self.held, 0.0, self.gradient)

    @cached_property
    def held(self) -> Any:
        """A boolean for each group that the bound stops, beyond which the objective still falls."""
        bound = self.problem.bound
        if (np.abs(self.z) < bound).all():
            return np.zeros(len(self.z), dtype=np.bool_)
        return ((self.z >= bound) & (self.gradient < 0)) | ((self.z <= -bound) & (self.gradient > 0))

    @cached_property
    def optimality(self) -> float:
        """``‖∇F‖∞ / scale``, over the directions that the bound leaves open."""
        gradient = self.projected_gradient
        return float(np.abs(gradient).max()) / self.problem.scale if len(gradient) else 0.0

    def at(self, z: Array) -> Point:
        """The same function elsewhere."""
        return Point(self.problem, self.matrix, z)

    def separable(self) -> Point:
        """This point of the function whose blocks are replaced by their separable model here: same numbers."""
        model = copy.copy(self)
        model.matrix = SeparableMatrix.of(self.matrix.layout, self.r, self.c, *self._products)
        return model

    def without_idle(self) -> Point:
        """This point, but groups that no mass holds are where the linear term takes them, at the bound."""
        costs = self.problem.costs
        idle = ((self.rows + self.columns)[1:] == 0) & (costs != 0)
        return self.at(np.where(idle, -np.sign(costs) * self.problem.bound, self.z)) if idle.any() else self


@dataclass(frozen=True)
class Solution:
    """What a solver found; :func:`dagpath.solver.solve` returns it.

    Attributes:
        z: float64 [num_groups], on the CPU.
        objective: F at zero and at z.
        optimality: ``‖∇F‖∞ / scale`` at z, over the directions that the bound leaves open.
        iterations: outer iterations (Newton steps, or sweeps).
        products: Hessian products.
        converged: is ``optimality`` at most the tolerance?
        seconds: time taken.
        held: bool [num_groups], which groups the bound stops; with them further out the objective would be lower.

    Example:
        >>> import torch
        >>> from dagpath.solver import GroupMatrix, LogOuter, Problem, solve
        >>> matrix = GroupMatrix.of(2, [], torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 16.0]))
        >>> solution = solve(Problem(matrix, LogOuter(1.0), kappa=1.0, linear=torch.zeros(1), scale=1.0))
        >>> solution.converged, [round(value, 4) for value in solution.objective]  # log 17 and log 8
        (True, [2.8332, 2.0794])
    """

    z: Tensor
    objective: tuple[float, float]
    optimality: float
    iterations: int
    products: int
    converged: bool
    seconds: float
    held: Tensor
