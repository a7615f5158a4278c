"""The balancing problem as numbers.

Over one variable per group, ``z`` in R^H (and ``z_0 = 0`` for the fixed group 0), minimize

    F(z) = ψ( Σ_e a_e exp(κ (z[dst_e] − z[src_e])) ) + c · z,        |z| ≤ bound

with masses ``a_e ≥ 0`` and a convex increasing ψ. Elements that join the same two groups have the same exponent, so
their masses are summed first: what remains is a non-negative matrix ``A[d, s]`` over groups, here in blocks. With
``r = exp(κz)`` and ``c = 1/r``, the scaled masses are ``W = diag(r) A diag(c)`` and everything needed is a few
matrix–vector products with A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dagpath.errors import BalanceError

DEFAULT_BOUND = 20 * math.log(2)
"""Largest |log λ|: a factor of 2**20 up or down."""


@dataclass(frozen=True)
class Block:
    """A dense part of the group matrix: ``masses[i, j]`` joins destination group ``dst[i]`` and source ``src[j]``."""

    masses: Tensor
    dst: Tensor
    src: Tensor

    @cached_property
    def rows(self) -> Tensor | slice:
        """``dst`` as an index: a slice where its groups follow each other, which spares a copy at every product."""
        return _as_slice(self.dst)

    @cached_property
    def columns(self) -> Tensor | slice:
        """``src``, likewise."""
        return _as_slice(self.src)


def _as_slice(groups: Tensor) -> Tensor | slice:
    first, count = int(groups[0]), len(groups)
    consecutive = torch.equal(groups, torch.arange(first, first + count, device=groups.device))
    return slice(first, first + count) if consecutive else groups


def _add(result: Tensor, index: Tensor | slice, values: Tensor) -> None:
    if isinstance(index, slice):
        result[index] += values
    else:
        result.index_add_(0, index, values)


class GroupMatrix:
    """A non-negative matrix over the groups 0 .. num_groups, as a sum of dense blocks and single entries.

    Attributes:
        size: num_groups + 1.
        blocks: the dense parts; no group occurs twice among a block's rows, nor among its columns.
        dst, src, masses: row, column and value of each single entry; every pair occurs once.
    """

    def __init__(self, size: int, blocks: Sequence[Block], dst: Tensor, src: Tensor, masses: Tensor) -> None:
        self.size = size
        self.blocks = tuple(blocks)
        self.dst, self.src, self.masses = dst, src, masses

    @property
    def device(self) -> torch.device:
        return self.masses.device

    def matvec(self, vector: Tensor) -> Tensor:
        """``A @ vector``."""
        result = vector.new_zeros(self.size).index_add_(0, self.dst, self.masses * vector[self.src])
        for block in self.blocks:
            _add(result, block.rows, block.masses @ vector[block.columns])
        return result

    def rmatvec(self, vector: Tensor) -> Tensor:
        """``A.T @ vector``."""
        result = vector.new_zeros(self.size).index_add_(0, self.src, self.masses * vector[self.dst])
        for block in self.blocks:
            _add(result, block.columns, vector[block.rows] @ block.masses)
        return result

    def diagonal(self) -> Tensor:
        """The masses of elements inside one group, which no rescaling changes."""
        inside = self.dst == self.src
        result = self.masses.new_zeros(self.size).index_add_(0, self.dst[inside], self.masses[inside])
        for block in self.blocks:
            column_of = torch.full((self.size,), -1, device=self.device)
            column_of[block.src] = torch.arange(len(block.src), device=self.device)
            column = column_of[block.dst]
            shared = column >= 0
            result.index_add_(0, block.dst[shared], block.masses[shared, column[shared]])
        return result

    def scaled(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> GroupMatrix:
        """``diag(rows) @ A @ diag(columns)``, in another type."""
        blocks = [
            replace(block, masses=(rows[block.rows, None] * block.masses).mul_(columns[None, block.columns]).to(dtype))
            for block in self.blocks
        ]
        masses = (rows[self.dst] * self.masses * columns[self.src]).to(dtype)
        return GroupMatrix(self.size, blocks, self.dst, self.src, masses)


class MassAggregator:
    """Collects masses element by element and sums those that join the same two groups.

    Attributes:
        num_live: how many elements had a positive mass.
        balance: [num_groups + 1]; per group, the number of live elements that enter it minus those that leave it.
    """

    def __init__(self, num_groups: int, device: torch.device | str = "cpu") -> None:
        self._size = num_groups + 1
        self._device = torch.device(device)
        self._blocks: list[Block] = []
        self._edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_live = 0
        self.balance = torch.zeros(self._size, dtype=torch.float64, device=self._device)

    def add(self, masses: Tensor, dst: Tensor, src: Tensor) -> None:
        """Add elements of any shape; ``dst`` and ``src`` are their groups, broadcastable to that shape."""
        masses = masses.to(self._device, torch.float64)
        if not masses.numel():
            return
        dst, src = (_pad(end.to(self._device), masses.ndim) for end in (dst, src))
        varies = [(dst.shape[dim] > 1, src.shape[dim] > 1) for dim in range(masses.ndim)]
        if any(both == (True, True) for both in varies):
            pairs = [dim for dim in range(masses.ndim) if varies[dim] != (False, False)]
            self._add(_live_sums(masses, [], pairs), dst, src, pairs, None)
        else:
            rows = [dim for dim in range(masses.ndim) if varies[dim][0]]
            columns = [dim for dim in range(masses.ndim) if varies[dim][1]]
            self._add(_live_sums(masses, rows, columns), dst, src, rows, columns)

    def _add(
        self, sums: tuple[Tensor, Tensor, int], dst: Tensor, src: Tensor, rows: list[int], columns: list[int] | None
    ) -> None:
        matrix, live, count = sums
        self.num_live += count
        if columns is None:  # both ends vary together: a list of edges, in one row
            shape = torch.broadcast_shapes(dst.shape, src.shape)  # type: ignore[no-untyped-call]
            dst, src = (_keep(end.expand(shape), rows).reshape(-1) for end in (dst, src))
            self.balance.index_add_(0, dst, live[0]).index_add_(0, src, -live[0])
            self._edges.append((dst, src, matrix[0]))
            return
        dst, src = _keep(dst, rows).reshape(-1), _keep(src, columns).reshape(-1)
        self.balance.index_add_(0, dst, live.sum(1)).index_add_(0, src, -live.sum(0))
        dst, matrix = _merge_rows(dst, matrix)
        src, matrix = _merge_rows(src, matrix.t())
        matrix = matrix.t()
        if len(dst) == 1 or len(src) == 1:
            self._edges.append((dst.repeat_interleave(len(src)), src.repeat(len(dst)), matrix.reshape(-1)))
        else:
            self._blocks.append(Block(matrix.contiguous(), dst, src))

    def matrix(self) -> GroupMatrix:
        nothing = torch.zeros(0, dtype=torch.long, device=self._device)
        edges = self._edges or [(nothing, nothing, nothing.double())]
        dst, src, masses = (torch.cat(parts) for parts in zip(*edges, strict=True))
        keys, inverse = torch.unique(dst * self._size + src, return_inverse=True)
        summed = masses.new_zeros(len(keys)).index_add_(0, inverse, masses)
        return GroupMatrix(self._size, self._blocks, keys // self._size, keys % self._size, summed)


def _pad(end: Tensor, ndim: int) -> Tensor:
    return end.reshape((1,) * (ndim - end.ndim) + tuple(end.shape))


def _keep(end: Tensor, dims: list[int]) -> Tensor:
    """``end`` with only ``dims`` left (the others have size 1)."""
    return end.reshape([end.shape[dim] for dim in dims] or [1])


def _live_sums(masses: Tensor, rows: list[int], columns: list[int]) -> tuple[Tensor, Tensor, int]:
    """Masses summed to a matrix over ``rows`` × ``columns``, the counts of live ones alike, and their number."""
    kept = [*rows, *columns]
    summed = [dim for dim in range(masses.ndim) if dim not in kept]
    live = masses > 0
    total = int(live.sum())
    counts = live.sum(summed) if summed else live
    sums = masses.sum(summed) if summed else masses
    order = sorted(kept)
    shape = (math.prod(masses.shape[dim] for dim in rows), math.prod(masses.shape[dim] for dim in columns))
    to_kept = [order.index(dim) for dim in kept]
    return sums.permute(to_kept).reshape(shape), counts.permute(to_kept).reshape(shape).double(), total


def _merge_rows(groups: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows of a matrix that belong to the same group."""
    unique, inverse = torch.unique(groups, return_inverse=True)
    if len(unique) == 1:
        return unique, matrix.sum(0, keepdim=True)
    if len(unique) == len(groups):
        return groups, matrix
    return unique, matrix.new_zeros(len(unique), matrix.shape[1]).index_add_(0, inverse, matrix)


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
        bound: largest |z|.
        offset: constant added to F.
        live: number of live elements, for the report.
    """

    matrix: GroupMatrix
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
        if not bool(torch.isfinite(self.matrix.matvec(torch.ones_like(self._padded(self.linear)))).all()):
            raise BalanceError("the masses of the problem are not finite")

    @property
    def num_groups(self) -> int:
        return len(self.linear)

    def at(self, z: Tensor) -> Point:
        """The objective and its derivatives at z."""
        return Point(self, z)

    @staticmethod
    def _padded(z: Tensor) -> Tensor:
        return torch.cat([z.new_zeros(1), z])


class Point:
    """Value and gradient of a problem at one z.

    With W the scaled masses, D their row sums plus column sums and m their row sums minus column sums, the gradient is
    ``ψ' κ m + c`` and the Hessian ``κ² (ψ' (D − W − Wᵀ) + ψ'' m mᵀ)``: a graph Laplacian and a rank-one term.

    Cost: two products with A.
    """

    def __init__(self, problem: Problem, z: Tensor) -> None:
        self.problem, self.z = problem, z
        exponent = problem.kappa * problem._padded(z)
        self.r, self.c = exponent.exp(), (-exponent).exp()
        self.rows = self.r * problem.matrix.matvec(self.c)
        self.total = float(self.rows.sum())
        self.value = problem.offset + float(problem.linear @ z)
        if self.total > 0:
            self.value += problem.outer.value(self.total)

    @cached_property
    def columns(self) -> Tensor:
        """Per group, the scaled mass of the elements that leave it; ``rows`` is that of those that enter."""
        return self.c * self.problem.matrix.rmatvec(self.r)

    @cached_property
    def difference(self) -> Tensor:
        """m: per free group, the mass that enters minus the mass that leaves."""
        return (self.rows - self.columns)[1:]

    @cached_property
    def gradient(self) -> Tensor:
        if not self.total > 0:
            return self.problem.linear
        return self.problem.outer.slope(self.total) * self.problem.kappa * self.difference + self.problem.linear


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        z: float64 [num_groups].
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


def projected_gradient(point: Point) -> Tensor:
    """The gradient, zero where the bound stops the descent."""
    gradient, bound = point.gradient, point.problem.bound
    stopped = ((point.z >= bound) & (gradient < 0)) | ((point.z <= -bound) & (gradient > 0))
    return torch.where(stopped, 0.0, gradient)


def optimality(point: Point) -> float:
    gradient = projected_gradient(point)
    return float(gradient.abs().max()) / point.problem.scale if gradient.numel() else 0.0
