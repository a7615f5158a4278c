"""From masses of single elements to a group matrix: those that join the same two groups are put together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dagpath.solver.checks import checked_groups, checked_masses
from dagpath.solver.matrix import Block, GroupMatrix
from dagpath.solver.parts import Product


class MassAggregator:
    """Collects masses element by element and puts together those that join the same two groups.

    Args:
        num_groups: number of free groups.
        device: where the masses are put.
        largest: keep the largest of those that join the same two groups, instead of their sum.

    Raises:
        ValueError: num_groups is negative.

    Attributes:
        num_live: how many elements had a positive mass.
        balance: [num_groups + 1]; per group, the number of live elements that enter it minus those that leave it.

    Example:
        >>> import torch
        >>> from dagpath.solver import MassAggregator
        >>> masses = MassAggregator(num_groups=2)
        >>> masses.add(torch.ones(2, 4, 3, 3), dst=torch.tensor([1, 2]).reshape(2, 1, 1, 1), src=torch.tensor(0))
        >>> masses.add(torch.tensor([5.0, 0.0]), dst=torch.tensor(0), src=torch.tensor([1, 2]))
        >>> masses.num_live, masses.balance.tolist()
        (73, [-71.0, 35.0, 36.0])
        >>> masses.matrix().to_scipy().toarray().tolist()
        [[0.0, 5.0, 0.0], [36.0, 0.0, 0.0], [36.0, 0.0, 0.0]]
    """

    def __init__(self, num_groups: int, device: torch.device | str = "cpu", largest: bool = False) -> None:
        if num_groups < 0:
            raise ValueError(f"num_groups must be at least 0, got {num_groups}")
        self._size = num_groups + 1
        self._device = torch.device(device)
        self._largest = largest
        self._blocks: list[Block] = []
        self._edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_live = 0
        self.balance = torch.zeros(self._size, dtype=torch.float64, device=self._device)

    def add(self, masses: Tensor, dst: Tensor, src: Tensor) -> None:
        """Add elements of any shape. Masses that need no summing are kept as they are, not copied.

        Args:
            masses: of the elements, finite and at least 0.
            dst: the groups that they enter, int64, broadcastable to the shape of the masses; numbered from 1, 0 for
                what is fixed.
            src: the groups that they leave, alike.

        Raises:
            ValueError: a mass is negative, infinite or NaN, a group is out of range, or shapes do not broadcast.
        """
        masses = checked_masses("", masses.to(self._device))
        if not masses.numel():
            return
        self._check_fits(masses.shape, dst, src)
        dst, src = (
            _pad(checked_groups(name, end, self._size).to(self._device), masses.ndim)
            for name, end in (("dst", dst), ("src", src))
        )
        varies = [(dst.shape[dim] > 1, src.shape[dim] > 1) for dim in range(masses.ndim)]
        if any(both == (True, True) for both in varies):
            pairs = [dim for dim in range(masses.ndim) if varies[dim] != (False, False)]
            self._add(self._reduced(masses, [], pairs), dst, src, pairs, None)
        else:
            rows = [dim for dim in range(masses.ndim) if varies[dim][0]]
            columns = [dim for dim in range(masses.ndim) if varies[dim][1]]
            self._add(self._reduced(masses, rows, columns), dst, src, rows, columns)

    @staticmethod
    def _check_fits(shape: torch.Size, dst: Tensor, src: Tensor) -> None:
        for name, end in (("dst", dst), ("src", src)):
            sizes = zip(reversed(end.shape), reversed(shape), strict=False)
            if end.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
                raise ValueError(f"{name} of shape {tuple(end.shape)} does not broadcast to {tuple(shape)}")

    def add_product(self, left: Tensor, right: Tensor, dst: Tensor, src: Tensor) -> None:
        """Add the elements of a matrix, whose masses are ``left[i] · right[j]``: as :meth:`add` does with that matrix.

        Where all of a row enter one group, and all of a column leave one, the matrix is not made.

        Args:
            left: [rows], finite and at least 0.
            right: [columns], alike.
            dst: as in :meth:`add`, broadcastable to [rows, columns].
            src: alike.

        Raises:
            ValueError: as :meth:`add`.
        """
        left, right = (checked_masses("", side.to(self._device)) for side in (left, right))
        self._check_fits(torch.Size((len(left), len(right))), dst, src)
        rows, columns = _pad(dst, 2), _pad(src, 2)
        if self._largest or rows.shape[1] > 1 or columns.shape[0] > 1 or not (len(left) and len(right)):
            self.add(left[:, None] * right[None, :], dst, src)
            return
        dst = checked_groups("dst", rows[:, 0].expand(len(left)), self._size).to(self._device)
        src = checked_groups("src", columns[0].expand(len(right)), self._size).to(self._device)
        live = [(side > 0).double() for side in (left, right)]
        counts = [int(side.sum()) for side in live]
        self.num_live += counts[0] * counts[1]
        self.balance.index_add_(0, dst, live[0] * counts[1]).index_add_(0, src, -live[1] * counts[0])
        dst, left = self._merge_rows(dst, left)
        src, right = self._merge_rows(src, right)
        if len(dst) == 1 or len(src) == 1:
            self._edges.append(
                (dst.repeat_interleave(len(src)), src.repeat(len(dst)), (left[:, None] * right).view(-1))
            )
        else:
            self._blocks.append(Block(Product(left, right), dst, src))

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
        dst, matrix = self._merge_rows(dst, matrix)
        src, matrix = self._merge_rows(src, matrix.t())
        matrix = matrix.t()
        if len(dst) == 1 or len(src) == 1:
            self._edges.append((dst.repeat_interleave(len(src)), src.repeat(len(dst)), matrix.reshape(-1)))
        else:
            self._blocks.append(Block(matrix.contiguous(), dst, src))

    def matrix(self) -> GroupMatrix:
        """What was collected, as a :class:`GroupMatrix` [num_groups + 1, num_groups + 1]."""
        nothing = torch.zeros(0, dtype=torch.long, device=self._device)
        edges = self._edges or [(nothing, nothing, nothing.double())]
        dst, src, masses = (torch.cat(parts) for parts in zip(*edges, strict=True))
        keys, inverse = torch.unique(dst * self._size + src, return_inverse=True)
        together = self._joined(masses, inverse, len(keys))
        return GroupMatrix.without_loops(self._size, self._blocks, keys // self._size, keys % self._size, together)

    def _reduced(self, masses: Tensor, rows: list[int], columns: list[int]) -> tuple[Tensor, Tensor, int]:
        """Masses put together to a matrix over ``rows`` × ``columns``, counts of live ones alike, and their number."""
        kept = [*rows, *columns]
        others = [dim for dim in range(masses.ndim) if dim not in kept]
        shape = (math.prod(masses.shape[dim] for dim in rows), math.prod(masses.shape[dim] for dim in columns))
        live = masses > 0
        counts = live.sum(others) if others else live
        if others:
            masses = masses.amax(others) if self._largest else masses.sum(others)
        order = sorted(kept)
        to_kept = [order.index(dim) for dim in kept]
        return (
            masses.permute(to_kept).reshape(shape),
            counts.permute(to_kept).reshape(shape).double(),
            int(live.sum()),
        )

    def _merge_rows(self, groups: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Put together the rows of a matrix that belong to the same group."""
        unique, inverse = torch.unique(groups, return_inverse=True)
        if len(unique) == len(groups):
            return groups, matrix
        return unique, self._joined(matrix, inverse, len(unique))

    def _joined(self, values: Tensor, index: Tensor, size: int) -> Tensor:
        """``values`` added, or their maximum taken, at the given indices along the first dimension."""
        result = values.new_zeros((size, *values.shape[1:]))
        if self._largest:
            everywhere = index.reshape(-1, *[1] * (values.ndim - 1)).expand(values.shape)
            return result.scatter_reduce_(0, everywhere, values, "amax")
        return values.sum(0, keepdim=True) if size == 1 else result.index_add_(0, index, values)


def _pad(end: Tensor, ndim: int) -> Tensor:
    return end.reshape((1,) * (ndim - end.ndim) + tuple(end.shape))


def _keep(end: Tensor, dims: list[int]) -> Tensor:
    """``end`` with only ``dims`` left (the others have size 1)."""
    return end.reshape([end.shape[dim] for dim in dims] or [1])
