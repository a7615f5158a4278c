"""From masses of single elements to a group matrix: elements that join the same two groups are summed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dagpath.solver.matrix import Block, GroupMatrix


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
        """Add elements of any shape; ``dst`` and ``src`` are their groups, broadcastable to that shape.

        Raises:
            ValueError: a mass is negative, infinite or NaN.
        """
        masses = masses.to(self._device, torch.float64)
        if not masses.numel():
            return
        if not bool(masses.min() >= 0) or not bool(torch.isfinite(masses.sum())):
            bad = masses[~((masses >= 0) & torch.isfinite(masses))]
            value = float(bad[0]) if len(bad) else float("inf")
            raise ValueError(f"masses must be finite and at least 0, and so must their sum; got {value}")
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
        return GroupMatrix.of(self._size, self._blocks, keys // self._size, keys % self._size, summed)


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
