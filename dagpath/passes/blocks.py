"""Edges between numbered nodes, collected stage by stage and put together as one sparse matrix ordered by level.

Numbers only: nothing here knows of operations or models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.sparse import SparseRows

_INT32 = torch.iinfo(torch.int32).max
_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Edges:
    """A list of edges.

    Attributes:
        dst: node numbers, int64 [edges].
        src: node numbers, int64 [edges].
        values: weights, float64 [edges].
        elements: int64 [edges, F]: which parameter elements a weight depends on, counted from 1; 0 for none.
        slopes: float64 [edges, F]: its derivatives with respect to them.
        slots: int64 [edges]: which gate the edge has, counted from 1; 0 for none.
    """

    dst: Tensor
    src: Tensor
    values: Tensor
    elements: Tensor
    slopes: Tensor
    slots: Tensor

    @classmethod
    def plain(cls, dst: Tensor, src: Tensor) -> Edges:
        """Edges of weight one."""
        none = torch.zeros(len(dst), 0)
        return cls(dst, src, torch.ones(len(dst)).double(), none.long(), none.double(), torch.zeros_like(dst))

    @classmethod
    def joined(cls, parts: Sequence[Edges]) -> Edges:
        """All edges of the parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        parts = parts or [cls.plain(_NONE, _NONE)]
        width = max(part.elements.shape[1] for part in parts)

        def wide(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

        parts = [replace(part, elements=wide(part.elements), slopes=wide(part.slopes)) for part in parts]
        return cls(*(torch.cat(columns) for columns in zip(*(part._columns() for part in parts), strict=True)))

    def at(self, index: Tensor) -> Edges:
        return Edges(*(column[index] for column in self._columns()))

    def _columns(self) -> tuple[Tensor, ...]:
        return self.dst, self.src, self.values, self.elements, self.slopes, self.slots

    def ordered(self) -> Edges:
        """The edges by destination, then source."""
        order = _order(self.dst, self.src)
        return self if order is None else self.at(order)


def _order(rows: Tensor, columns: Tensor) -> Tensor | None:
    """The stable order by row, then column; None where it is there already."""
    keys = rows * (columns.max() + 1 if len(columns) else 1) + columns
    return None if bool((keys.diff() > 0).all()) else keys.argsort(stable=True)


@dataclass(frozen=True)
class Block:
    """Nodes of one level and the edges into them.

    Attributes:
        level: the number of edges of the longest path that leads there.
        nodes: their numbers, increasing.
        lengths: edges into each node. The edges follow by destination, then source.
        src, values, elements, slopes, slots: as in :class:`Edges`; ``slots`` is None where no edge has a gate.
    """

    level: int
    nodes: Tensor
    lengths: Tensor
    src: Tensor
    values: Tensor
    elements: Tensor
    slopes: Tensor
    slots: Tensor | None


@dataclass(frozen=True)
class Assembled:
    """A finished graph. Nodes are numbered anew from 0: level by level, and in the order they were made in each.

    Attributes:
        adjacency: weights [nodes, nodes]; an edge's number is that of its entry.
        derivative: of each edge's weight with respect to every parameter element, [edges, elements].
        gated: the edges that have a gate, increasing.
        slots: the gate of each of those, counted from 0.
        levels: where the nodes of each level start, and where the last ends.
        numbers: the number by which each node was made, counted from 1.
        ids: the inverse: node of each number; -1 at 0.
    """

    adjacency: SparseRows
    derivative: SparseRows
    gated: Tensor
    slots: Tensor
    levels: list[int]
    numbers: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Run:
    """Nodes that were made together: their first number, how many, and what they are to the caller (None: copies)."""

    first: int
    count: int
    label: Any


class Blocks:
    """Collects nodes and edges in topological order. Nodes are numbered from 1.

    All edges into nodes that were made by one call of :meth:`new` have to come before the next.
    """

    def __init__(self, num_elements: int) -> None:
        self._num_elements = num_elements
        self.num_nodes = 0
        self.runs: list[Run] = []
        self._settled = 0
        self._pending: list[Edges] = []
        self._blocks: list[Block] = []
        self._levels = torch.zeros(1, dtype=torch.int64)

    def new(self, count: int, label: Any) -> Tensor:
        """Numbers of new nodes."""
        self._settle()
        return self._new(count, label)

    def _new(self, count: int, label: Any) -> Tensor:
        self.runs.append(Run(self.num_nodes + 1, count, label))
        self.num_nodes += count
        return torch.arange(self.num_nodes - count + 1, self.num_nodes + 1)

    def connect(self, edges: Edges) -> None:
        """Edges into the nodes that were made last."""
        self._pending.append(edges)

    def _settle(self) -> None:
        """Close the nodes that were made last: order the edges into them, and find their levels."""
        edges, copies = self._without_parallels(Edges.joined(self._pending).ordered())
        self._pending = []
        levels = torch.nn.functional.pad(self._levels, (0, self.num_nodes + 1 - len(self._levels)))
        levels[copies.dst] = levels[copies.src] + 1
        levels.scatter_reduce_(0, edges.dst, levels[edges.src] + 1, "amax")
        self._levels = levels
        if len(copies.dst):
            edges = Edges.joined([edges, copies])
        nodes = torch.arange(self._settled + 1, self.num_nodes + 1)
        lengths = torch.bincount(edges.dst - self._settled - 1, minlength=len(nodes))
        self._settled = self.num_nodes
        found = sorted(set(levels[nodes].tolist()))
        for level in found:
            if len(found) == 1:
                self._store(level, nodes, lengths, edges)
            else:
                rows = levels[nodes] == level
                self._store(level, nodes[rows], lengths[rows], edges.at(rows.repeat_interleave(lengths)))

    def _store(self, level: int, nodes: Tensor, lengths: Tensor, edges: Edges) -> None:
        slots = edges.slots if bool(edges.slots.any()) else None
        src, elements = _narrow(edges.src, self.num_nodes), _narrow(edges.elements, self._num_elements)
        self._blocks.append(Block(level, nodes, lengths, src, edges.values, elements, edges.slopes, slots))

    def _without_parallels(self, edges: Edges) -> tuple[Edges, Edges]:
        """Of parallel edges each but the first goes through a copy of its source; also the edges into the copies."""
        repeats = (edges.dst.diff() == 0) & (edges.src.diff() == 0)
        if not bool(repeats.any()):
            return edges, Edges.plain(_NONE, _NONE)
        repeats = torch.nn.functional.pad(repeats, (1, 0))
        places = torch.arange(len(repeats))
        rank = places - places.masked_fill(repeats, 0).cummax(0).values
        bound = self.num_nodes + 1
        pairs, inverse = torch.unique(rank[repeats] * bound + edges.src[repeats], return_inverse=True)
        copies = self._new(len(pairs), None)
        src = edges.src.masked_scatter(repeats, copies[inverse])
        return replace(edges, src=src).ordered(), Edges.plain(copies, pairs % bound)

    def assembled(self) -> Assembled:
        """The finished graph; what was collected is freed on the way."""
        self._settle()
        blocks = deque(sorted(self._blocks, key=lambda block: block.level))
        self._blocks = []
        levels = torch.tensor([block.level for block in blocks])
        sizes = torch.bincount(levels, torch.tensor([float(len(block.nodes)) for block in blocks])).long()
        numbers = torch.cat([block.nodes for block in blocks])
        ids = torch.full((len(numbers) + 1,), -1)
        ids[numbers] = torch.arange(len(numbers))
        total = sum(len(block.values) for block in blocks)
        entries = sum(int(torch.count_nonzero(block.elements)) for block in blocks)
        kind = torch.int32 if max(total, entries, len(ids), self._num_elements) <= _INT32 else torch.int64
        starts = torch.nn.functional.pad(torch.cat([block.lengths for block in blocks]).cumsum(0), (1, 0)).to(kind)
        columns, values = torch.empty(total, dtype=kind), torch.empty(total, dtype=torch.float64)
        counts = torch.zeros(total + 1, dtype=kind)
        elements, slopes = torch.empty(entries, dtype=kind), torch.empty(entries, dtype=torch.float64)
        gated, slots = [_NONE], [_NONE]
        at = entry = 0
        while blocks:
            block = blocks.popleft()
            src, block_slots = ids[block.src.long()], block.slots
            order = _order(torch.arange(len(block.nodes)).repeat_interleave(block.lengths), src)
            parts = [src, block.values, block.elements, block.slopes]
            if order is not None:
                parts = [part[order] for part in parts]
                block_slots = None if block_slots is None else block_slots[order]
            end = at + len(src)
            columns[at:end], values[at:end] = parts[:2]
            used = parts[2] > 0
            counts[at + 1 : end + 1] = used.sum(1)
            more = entry + int(torch.count_nonzero(used))
            elements[entry:more], slopes[entry:more] = parts[2][used] - 1, parts[3][used]
            if block_slots is not None:
                places = block_slots.nonzero()[:, 0]
                gated.append(places + at)
                slots.append(block_slots[places] - 1)
            at, entry = end, more
        return Assembled(
            SparseRows(starts, columns, values, len(numbers)),
            SparseRows(counts.cumsum_(0), elements, slopes, self._num_elements),
            torch.cat(gated),
            torch.cat(slots),
            [0, *sizes.cumsum(0).tolist()],
            numbers,
            ids,
        )


def _narrow(numbers: Tensor, largest: int) -> Tensor:
    return numbers.int() if largest <= _INT32 else numbers
