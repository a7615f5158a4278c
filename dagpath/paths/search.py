"""The heaviest paths of a structure, in order: dynamic programming forward, best first search backward."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dagpath.passes.structure import Edges, Links, Structure
from dagpath.passes.values import broadcast

_SOURCES = ("constant", "input", "barrier")


@dataclass(frozen=True)
class Step:
    """One edge of a path.

    Attributes:
        dst, src: the nodes at its ends.
        parameter: whose element the edge is; empty for an edge without one.
        element: flat position in the parameter, -1 without one.
        log_value: natural logarithm of what it multiplies by.
        record: tells apart edges through one element between the same nodes, of a weight that has it in two terms.
    """

    dst: int
    src: int
    parameter: str
    element: int
    log_value: float
    record: int


@dataclass(frozen=True)
class _Candidates:
    """Ways into one node, heaviest first; ``log_total`` is that of the heaviest path from a source through each."""

    record: list[int]
    dst: list[int]
    element: list[int]
    src: list[int]
    log_value: list[float]
    log_total: list[float]


class Search:
    """Paths of a structure, heaviest first.

    Args:
        structure: nodes and edges.
        alive: parameter name -> boolean tensor of its shape, elements that some path uses; all, where there is none.
    """

    def __init__(self, structure: Structure, alive: Mapping[str, Tensor] | None = None) -> None:
        self._structure = structure
        self._alive = alive or {}
        records: list[Edges | Links] = [*structure.links, *structure.edges]  # links first among equals
        self._records = sorted(records, key=lambda record: record.order)
        self._known: dict[int, _Candidates] = {}
        self._sources = torch.zeros(structure.num_nodes, dtype=torch.bool)
        for segment in structure.segments:
            if segment.role in _SOURCES:
                self._sources[segment.start : segment.start + segment.count] = True

    def _log_values(self, record: Edges | Links) -> Tensor:
        if isinstance(record, Links):
            return record.factor.log()
        logs = record.values.detach().to("cpu", torch.float64).abs().log()
        alive = self._alive.get(record.parameter)
        if alive is None:
            return logs
        alive = alive if record.index is None else alive.reshape(-1)[record.index]
        return logs.masked_fill(~alive, -torch.inf)

    @cached_property
    def _best(self) -> Tensor:
        """float64 [nodes]: logarithm of the heaviest path from a source to each node; -inf where none arrives."""
        best = torch.full((self._structure.num_nodes + 1,), -torch.inf, dtype=torch.float64)  # -1: no node
        best[:-1][self._sources] = 0.0
        for record in self._records:
            totals = self._log_values(record) + best[record.src]
            dst = record.dst.reshape((1,) * (totals.ndim - record.dst.ndim) + tuple(record.dst.shape))
            shared = [dim for dim, size in enumerate(dst.shape) if size == 1 and totals.shape[dim] > 1]
            totals = totals.amax(shared, keepdim=True) if shared else totals
            if totals.numel():
                best.scatter_reduce_(0, dst.reshape(-1) % len(best), totals.reshape(-1), "amax")
            best[-1] = -torch.inf
        return best

    @cached_property
    def _readers(self) -> tuple[Tensor, Tensor]:
        """(nodes, records that lead to each), sorted by node."""
        nodes = [torch.unique(record.dst) for record in self._records]
        counts = torch.tensor([len(found) for found in nodes])
        owners = torch.repeat_interleave(torch.arange(len(nodes)), counts)
        found = torch.cat([torch.zeros(0, dtype=torch.long), *nodes])
        order = torch.argsort(found, stable=True)
        return found[order], owners[order]

    def _candidates(self, node: int) -> _Candidates:
        if node not in self._known:
            nodes, owners = self._readers
            low, high = torch.searchsorted(nodes, torch.tensor([node, node + 1])).tolist()
            self._known[node] = self._sorted(
                [(index, self._records[index]) for index in owners[low:high].tolist()], node
            )
        return self._known[node]

    def _sorted(self, records: Sequence[tuple[int, Edges | Links]], node: int | None) -> _Candidates:
        """The ways through some records into a node (into any, for None), heaviest first."""
        parts = [(torch.tensor([index]), *ways) for index, record in records for ways in self._ways(record, node)]
        if not parts:
            return _Candidates([], [], [], [], [], [])
        record, dst, element, src, log_value = (
            torch.cat(column) for column in zip(*(broadcast(*part) for part in parts), strict=True)
        )
        total = log_value + self._best[src]
        kept = torch.nonzero(total > -torch.inf)[:, 0]
        order = kept[torch.argsort(total[kept], descending=True, stable=True)]
        return _Candidates(*(column[order].tolist() for column in (record, dst, element, src, log_value, total)))

    def _ways(self, record: Edges | Links, node: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(destinations, elements, sources, logarithms of the values) of the edges into a node."""
        if isinstance(record, Links):
            chosen = torch.arange(len(record.dst)) if node is None else torch.nonzero(record.dst == node)[:, 0]
            yield record.dst[chosen], torch.tensor([-1]), record.src[chosen], record.factor[chosen].log()
            return
        shape = record.values.shape
        dst, src = (end.reshape((1,) * (len(shape) - end.ndim) + tuple(end.shape)) for end in (record.dst, record.src))
        alive = self._alive.get(record.parameter)
        for place in torch.nonzero(dst == torch.tensor(node)).tolist():
            row = tuple(slice(None) if dst.shape[dim] == 1 else slice(at, at + 1) for dim, at in enumerate(place))
            ranges = [np.arange(size)[part] for size, part in zip(shape, row, strict=True)]
            at = (
                torch.from_numpy(np.ravel_multi_index(np.ix_(*ranges), tuple(shape)).reshape(-1))
                if row
                else torch.tensor([0])
            )
            element = at if record.index is None else record.index[at]
            logs = record.values.detach()[row].reshape(-1).to("cpu", torch.float64).abs().log()
            if alive is not None:
                logs = logs.masked_fill(~alive.reshape(-1)[element], -torch.inf)
            yield torch.tensor([node]), element, src.expand(shape)[row].reshape(-1), logs

    def __iter__(self) -> Iterator[list[Step]]:
        """All paths, from source to end, heaviest first.

        An unfinished path is a suffix that ends in an output. It waits at the value of its best completion, which is
        known exactly, so that whatever is finished first is the heaviest of all that remain.
        """
        ends = self._sorted(list(enumerate(self._structure.ends)), None)
        ticket = itertools.count()
        heap: list[tuple[float, int, _Candidates, int, tuple[Step, Any] | None, float]] = []

        def wait(ways: _Candidates, rank: int, suffix: tuple[Step, Any] | None, log_suffix: float) -> None:
            if rank < len(ways.src):
                heapq.heappush(
                    heap, (-(ways.log_total[rank] + log_suffix), next(ticket), ways, rank, suffix, log_suffix)
                )

        wait(ends, 0, None, 0.0)
        while heap:
            _, _, ways, rank, suffix, log_suffix = heapq.heappop(heap)
            wait(ways, rank + 1, suffix, log_suffix)
            record = None if suffix is None else self._records[ways.record[rank]]
            parameter = record.parameter if isinstance(record, Edges) else ""
            src, log_value = ways.src[rank], ways.log_value[rank]
            step = Step(ways.dst[rank], src, parameter, ways.element[rank], log_value, ways.record[rank])
            longer = (step, suffix)
            if self._sources[src]:
                yield _unrolled(longer)
            else:
                wait(self._candidates(src), 0, longer, log_suffix + log_value)


def _unrolled(suffix: tuple[Step, Any] | None) -> list[Step]:
    steps = []
    while suffix is not None:
        step, suffix = suffix
        steps.append(step)
    return steps
