"""The masses: a non-negative matrix over groups, and the separable model of it.

Vectors over the groups are NumPy arrays on the host; only the masses live on a device. A product with a vector
therefore costs one transfer there and one back, whatever the number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from dagpath.solver.checks import checked_groups, checked_masses
from dagpath.solver.parts import Part, Product, Table, log_range, on_host

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """A dense part of the group matrix: ``masses[i, j]`` joins destination group ``dst[i]`` and source ``src[j]``.

    Attributes:
        masses (torch.Tensor): [rows, columns], finite and at least 0; kept in its own type and on its own device.
        dst: int64 [rows], groups, each once; 0 is the fixed one.
        src: int64 [columns], alike.

    Example:
        >>> import torch
        >>> from dagpath.solver import Block, GroupMatrix
        >>> nothing = torch.zeros(0, dtype=torch.int64)
        >>> block = Block(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), dst=torch.tensor([2, 3]), src=torch.tensor([0, 1]))
        >>> GroupMatrix.of(4, [block], nothing, nothing, torch.zeros(0)).to_scipy().toarray().tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]]
    """

    masses: Tensor | Product
    dst: Tensor
    src: Tensor


@dataclass(frozen=True)
class Side:
    """One side of a group matrix, rows or columns, laid out in one array: the single entries, then block after block.

    Attributes:
        groups: the group of each position.
        starts: where each block begins, counted from the first position after the entries.
        lengths: how many positions each block has.
    """

    groups: Index
    starts: Index
    lengths: Index

    @property
    def num_entries(self) -> int:
        return len(self.groups) - int(self.lengths.sum())

    @cached_property
    def block_of(self) -> Index:
        """The block of each position after the entries."""
        return np.arange(len(self.lengths)).repeat(self.lengths)

    def block_sums(self, values: Array) -> Array:
        """Sum of each block's values, given those after the entries."""
        return np.add.reduceat(values, self.starts) if len(self.starts) else np.zeros(0)

    def split(self, values: Any) -> list[Any]:
        """Values at all positions, taken apart: those of the entries, then those of each block."""
        ends = [self.num_entries, *(self.num_entries + self.starts + self.lengths).tolist()]
        return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @staticmethod
    def of(entries: Tensor, blocks: Sequence[Tensor]) -> Side:
        lengths = np.array([len(block) for block in blocks], dtype=np.int64)
        groups = torch.cat([entries, *blocks]).cpu().numpy()
        return Side(groups, lengths.cumsum() - lengths, lengths)


@dataclass(frozen=True)
class Terms:
    """Parts of a group matrix that are modelled as rank one: its blocks, and single entries that form no cycle.

    Attributes:
        rows, columns: positions on the two sides.
        row_groups, column_groups: the group of each of them.
        row_terms, column_terms: the term of each of them.
        number: of terms.
        rest: the entries between two different free groups that are left out.
        row_places, column_places: where the values of the two sides stand in a flat array [2 · number + 1, size] with
            one row for each side of each term, and one more.
    """

    rows: Index
    columns: Index
    row_groups: Index
    column_groups: Index
    row_terms: Index
    column_terms: Index
    number: int
    rest: Index
    row_places: Index
    column_places: Index

    @staticmethod
    def of(rows: Side, columns: Side, size: int) -> Terms:
        entries = rows.num_entries
        dst, src = rows.groups[:entries], columns.groups[:entries]
        between = np.flatnonzero((dst != src) & (dst > 0) & (src > 0))
        links = between[_without_cycles(dst[between], src[between], size)]
        rest = np.setdiff1d(between, links)
        row_positions = np.concatenate([links, np.arange(entries, len(rows.groups))])
        column_positions = np.concatenate([links, np.arange(entries, len(columns.groups))])
        row_groups, column_groups = rows.groups[row_positions], columns.groups[column_positions]
        row_terms = np.concatenate([np.arange(len(links)), len(links) + rows.block_of])
        column_terms = np.concatenate([np.arange(len(links)), len(links) + columns.block_of])
        number = len(links) + len(rows.lengths)
        return Terms(
            row_positions,
            column_positions,
            row_groups,
            column_groups,
            row_terms,
            column_terms,
            number,
            rest,
            row_terms * size + row_groups,
            (number + column_terms) * size + column_groups,
        )


def _without_cycles(dst: Index, src: Index, size: int) -> Index:
    """Positions of edges that form a spanning forest of their graph."""
    if not len(dst):
        return np.zeros(0, dtype=np.int64)
    low, high = np.minimum(dst, src), np.maximum(dst, src)
    _, first = np.unique(low * size + high, return_index=True)
    ends = low[first].astype(np.int32), high[first].astype(np.int32)  # SciPy before 1.17 refuses others
    numbered = coo_array((first + 1.0, ends), shape=(size, size))
    return np.sort(minimum_spanning_tree(numbered).data.astype(np.int64) - 1)


@dataclass(frozen=True)
class Layout:
    """Which groups the positions of a matrix belong to: its two sides, and what of it is modelled as rank one."""

    size: int
    rows: Side
    columns: Side
    terms: Terms

    @property
    def groups_by_part(self) -> tuple[list[Index], list[Index]]:
        """Destination groups and source groups of the entries, then of each block."""
        return self.rows.split(self.rows.groups), self.columns.split(self.columns.groups)

    @staticmethod
    def of(size: int, blocks: Sequence[Block], dst: Tensor, src: Tensor) -> Layout:
        rows, columns = Side.of(dst, [block.dst for block in blocks]), Side.of(src, [block.src for block in blocks])
        return Layout(size, rows, columns, Terms.of(rows, columns, size))


class Masses(Protocol):
    """What a :class:`Point` needs of a matrix; dense blocks and their separable model both have it."""

    layout: Layout
    is_separable: bool

    def products(self, r: Array, c: Array) -> tuple[Array, Array]:
        """Per position of the row side its masses times c, per position of the column side its masses times r."""

    def scaled(self, rows: Array, columns: Array, dtype: torch.dtype) -> Masses:
        """``diag(rows) @ A @ diag(columns)``, the stored masses in another type."""


class GroupMatrix:
    """A non-negative matrix over the groups 0 .. num_groups, as a sum of dense blocks and single entries.

    No z moves a mass within a group. All such masses stand at (0, 0), as if their group were fixed.

    Attributes:
        blocks: the dense parts; no group occurs twice among a block's rows, nor among its columns.
        masses: the single entries; every pair of groups occurs once.
        layout: the groups of all of them.

    Example:
        >>> import torch
        >>> from dagpath.solver import GroupMatrix
        >>> # a mass of 1 enters group 1 from what is fixed, 5 leads from there to group 2, 7 stays within group 2
        >>> dst, src = torch.tensor([1, 2, 2]), torch.tensor([0, 1, 2])
        >>> GroupMatrix.of(3, [], dst, src, torch.tensor([1.0, 5.0, 7.0])).to_scipy().toarray().tolist()
        [[7.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 5.0, 0.0]]
    """

    def __init__(self, layout: Layout, blocks: Sequence[Part], masses: Tensor) -> None:
        self.layout, self.blocks, self.masses = layout, tuple(blocks), masses
        self.is_separable = not blocks
        self._entries: Any = on_host(masses)

    @staticmethod
    def of(size: int, blocks: Sequence[Block], dst: Tensor, src: Tensor, masses: Tensor) -> GroupMatrix:
        """From dense blocks, and the row, column and value of each single entry, all checked.

        Args:
            size: number of groups, the fixed group 0 among them.
            blocks: dense parts; pairs of groups that several of them name are summed.
            dst, src, masses: of the single entries, each [n].

        Returns:
            The matrix.

        Raises:
            ValueError: a mass is negative or not finite, a group is out of range or repeated, or shapes do not fit.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, the fixed group, got {size}")
        fits = masses.ndim == 1 and dst.shape == src.shape == masses.shape
        entries = _checked("the entries", Block(masses, dst, src), size, fits)
        if len(torch.unique(entries.dst * size + entries.src)) < len(entries.dst):
            raise ValueError("the entries name a pair of groups twice; sum them first")
        masses = checked_masses("the entries: ", masses)
        dense = []
        for index, block in enumerate(blocks):
            name, fits = f"block {index}", block.masses.shape == (*block.dst.shape, *block.src.shape)
            dense.append(_checked(name, block, size, fits and len(block.masses.shape) == 2))
            if (
                not len(block.dst)
                or not len(block.src)
                or any(len(torch.unique(end)) < len(end) for end in (block.dst, block.src))
            ):
                raise ValueError(f"{name} is empty, or names a group twice among its rows or its columns")
        return GroupMatrix.without_loops(size, dense, entries.dst, entries.src, masses)

    @staticmethod
    def without_loops(size: int, blocks: Sequence[Block], dst: Tensor, src: Tensor, masses: Tensor) -> GroupMatrix:
        """The same, not checked: only masses within a group are moved to (0, 0)."""
        within, found = dst == src, list[Part]()
        loops = [masses[within]]
        for block in blocks:
            part = block.masses if isinstance(block.masses, Product) else Table(block.masses)
            _, *places = np.intersect1d(block.dst.cpu(), block.src.cpu(), assume_unique=True, return_indices=True)
            if len(places[0]):
                values = part.table()
                row, column = (torch.from_numpy(place).to(values.device) for place in places)
                loops.append(values[row, column])
                part = Table(values.index_put((row, column), values.new_zeros(())))
            found.append(part)
        dst, src = (torch.cat([end[~within], end.new_zeros(1)]) for end in (dst, src))
        layout = Layout.of(size, blocks, dst, src)
        return GroupMatrix(layout, found, torch.cat([masses[~within], torch.cat(loops).sum(0, keepdim=True)]))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The masses, those of the single entries first, then those of each block."""
        return (self.masses, *(block.table() for block in self.blocks))

    @property
    def device(self) -> torch.device:
        """Where the masses are."""
        return self.masses.device

    def products(self, r: Array, c: Array) -> tuple[Array, Array]:
        """Per position of the row side its masses times c, per position of the column side its masses times r.

        Args:
            r, c: float64 [num_groups + 1].

        Cost: reads each mass once or twice.
        """
        (x_entries, *xs), (y_entries, *ys) = self._at(r, c)
        into, out_of = [self._entries * y_entries], [x_entries * self._entries]
        for block, x, y in zip(self.blocks, xs, ys, strict=True):
            rows, columns = block.products(x, y)
            into.append(rows)
            out_of.append(columns)
        parts = [*into, *out_of]
        joined = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts).cpu().numpy()
        rows, columns = np.split(joined.astype(np.float64, copy=False), [len(self.layout.rows.groups)])
        return rows, columns

    def scaled(self, rows: Array, columns: Array, dtype: torch.dtype) -> GroupMatrix:
        """``diag(rows) @ A @ diag(columns)``, stored in another type."""
        (x_entries, *xs), (y_entries, *ys) = (
            [torch.as_tensor(part, device=self.device) for part in parts] for parts in self._at(rows, columns)
        )
        blocks = [block.scaled(x, y, dtype) for block, x, y in zip(self.blocks, xs, ys, strict=True)]
        return GroupMatrix(self.layout, blocks, (x_entries * self.masses * y_entries).to(dtype))

    def to_scipy(self) -> Any:
        """The matrix as a ``scipy.sparse.csr_array`` [num_groups + 1, num_groups + 1], on the host."""
        (entry_dst, *dsts), (entry_src, *srcs) = self.layout.groups_by_part
        parts = [(entry_dst, entry_src, self.masses.cpu().numpy())]
        for dst, src, block in zip(dsts, srcs, self.blocks, strict=True):
            parts.append((dst.repeat(len(src)), np.tile(src, len(dst)), block.table().cpu().numpy().ravel()))
        dst, src, masses = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return coo_array((masses, (dst, src)), shape=(self.layout.size, self.layout.size)).tocsr()

    @cached_property
    def largest(self) -> float:
        """The largest mass; 1 if there is none."""
        high = max(high for _, high in self._log_ranges)
        return math.exp(high) if high > -math.inf else 1.0

    def divided(self, number: float) -> GroupMatrix:
        """Every mass divided by a number."""
        return GroupMatrix(self.layout, [block.divided(number) for block in self.blocks], self.masses / number)

    def tempered(self, power: float) -> GroupMatrix:
        """Every mass to a power."""
        return GroupMatrix(self.layout, [block.tempered(power) for block in self.blocks], self.masses**power)

    @cached_property
    def log_spread(self) -> float:
        """Logarithm of the ratio of the largest mass to the smallest that is not zero."""
        low, high = min(low for low, _ in self._log_ranges), max(high for _, high in self._log_ranges)
        return high - low if high > -math.inf else 0.0

    @cached_property
    def _log_ranges(self) -> list[tuple[float, float]]:
        return [log_range(self.masses), *(block.log_range() for block in self.blocks)]

    def _at(self, r: Array, c: Array) -> tuple[list[Any], list[Any]]:
        """r over the row side and c over the column side, where the masses are: at the entries, then at each block."""
        rows, columns = self.layout.rows, self.layout.columns
        vector = np.concatenate([r[rows.groups], c[columns.groups]])
        values: Any = torch.from_numpy(vector).to(self.device, self.masses.dtype)  # one transfer
        if isinstance(self._entries, np.ndarray):
            values = values.numpy()
        sides = values[: len(rows.groups)], values[len(rows.groups) :]
        return rows.split(sides[0]), columns.split(sides[1])


def _checked(name: str, block: Block, size: int, fits: bool) -> Block:
    if not fits:
        ends = f"{tuple(block.dst.shape)} and {tuple(block.src.shape)}"
        raise ValueError(f"{name}: masses of shape {tuple(block.masses.shape)} do not fit groups of shapes {ends}")
    dst, src = (checked_groups(f"{name}: {end}", getattr(block, end), size) for end in ("dst", "src"))
    if isinstance(block.masses, Product):
        sides = (checked_masses(f"{name}: ", side) for side in (block.masses.left, block.masses.right))
        return Block(Product(*sides), dst, src)
    return Block(checked_masses(f"{name}: ", block.masses), dst, src)


class SeparableMatrix:
    """A group matrix whose every block is replaced by the rank-one matrix with the same row and column sums.

    The sums are those of the masses scaled at some point, ``W = diag(r) A diag(c)``: there the model has the same
    objective and the same gradient as the matrix itself, and away from it they stay close as far as each block's masses
    are a product of what arrives and what leaves, which path masses of a linear layer are. Products cost a few
    operations per group, not per mass.
    """

    is_separable = True

    def __init__(self, layout: Layout, masses: Array, left: Array, right: Array) -> None:
        self.layout, self._masses, self._left, self._right = layout, masses, left, right
        self._dst, self._row_groups = np.split(layout.rows.groups, [len(masses)])
        self._src, self._column_groups = np.split(layout.columns.groups, [len(masses)])

    @staticmethod
    def of(layout: Layout, r: Array, c: Array, row_products: Array, column_products: Array) -> SeparableMatrix:
        """The model at a point, from ``products(r, c)`` there."""
        rows, columns, entries = layout.rows, layout.columns, layout.rows.num_entries
        left, right = row_products[entries:], column_products[entries:]
        totals = rows.block_sums(left * r[rows.groups[entries:]])
        right = right / np.where(totals > 0, totals, 1.0)[columns.block_of]
        return SeparableMatrix(layout, row_products[:entries] / c[columns.groups[:entries]], left, right)

    def products(self, r: Array, c: Array) -> tuple[Array, Array]:
        rows, columns = self.layout.rows, self.layout.columns
        into = columns.block_sums(self._right * c[self._column_groups])
        out_of = rows.block_sums(self._left * r[self._row_groups])
        return (
            np.concatenate([self._masses * c[self._src], self._left * into[rows.block_of]]),
            np.concatenate([self._masses * r[self._dst], self._right * out_of[columns.block_of]]),
        )

    def scaled(self, rows: Array, columns: Array, dtype: torch.dtype) -> SeparableMatrix:
        del dtype  # the products are cheap: they stay in double precision
        return SeparableMatrix(
            self.layout,
            rows[self._dst] * self._masses * columns[self._src],
            rows[self._row_groups] * self._left,
            columns[self._column_groups] * self._right,
        )
