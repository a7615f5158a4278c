"""Edges of a network's structure: through parameters, and through what is computed from several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dagpath.passes.structure import Edges, Links
from dagpath.passes.structure_nodes import NodeFlow, NoEdgesError, nodes_of
from dagpath.passes.values import FIXED, ZERO, Weight, broadcast, compact, leaves
from dagpath.passes.weights import Magnitudes, WeightMasses

_ROUNDING = 1e-9
_NO_EDGES = "makes a weight of parameters whose paths no edges of the neuron graph have"


@dataclass(frozen=True)
class Use:
    """A use of a computed weight, or of some of its elements.

    Attributes:
        owner: name of the computed weight.
        dst, src: numbers at its ends, broadcastable to the shape of ``found``.
        local: which elements, flat positions; None for all of them in their order.
        found: what each of them carries.
        order: that of the call that uses it.
        node: the call that made the weight.
    """

    owner: str
    dst: Tensor
    src: Tensor
    local: Tensor | None
    found: Magnitudes
    order: float
    node: fx.Node


@dataclass(frozen=True)
class _Part:
    """A part of a computed weight, as its formula uses it."""

    weight: Weight
    dst: Tensor
    src: Tensor


class WeightFlow(NodeFlow):
    """Records edges through parameters.

    A weight that is computed from several parameters is expanded into edges in a row and side by side, at each of its
    uses, once the neurons between its factors are known. What these edges carry is compared with what the passes over
    paths make of the weight, so that no structure has other paths than they.

    Args:
        model, rule, unknown, kept: see :class:`~dagpath.passes.structure_nodes.NodeFlow`.
        masses: what weights carry.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Callable[[Any], Any],
        unknown: Callable[[str], Any],
        kept: Mapping[fx.Node, int],
        masses: WeightMasses,
    ) -> None:
        self.masses = masses
        self._edges: list[Edges] = []
        self._uses: list[Use] = []
        self._sources_of_parts: dict[str, list[tuple[fx.Node, int] | None]] = {}
        self._inner: dict[str, Tensor] = {}
        self._expanded_once: set[str] = set()
        self._expanding: str | None = None
        self._parts: list[_Part] = []
        self._as_neurons: Magnitudes | None = None
        super().__init__(model, rule, unknown, kept)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def added(self, weight: Weight) -> Magnitudes:
        """What the entries of the call's output get from a weight that is added to an activation."""
        raise NotImplementedError

    def read(self, reads: Tensor) -> None:
        """The next edges are those of a normalization's gain, which reads this activation."""
        raise NotImplementedError

    # -- uses ----------------------------------------------------------------------------------------------------------

    def found(self, weight: Weight) -> Magnitudes | None:
        """What a weight among the operands of the call carries; None for a parameter's own values."""
        node = next((node for node, value in self._operands.items() if value is weight), None)
        if node is None or node.op == "placeholder":
            return None
        if not self.masses.are_edges(node):
            raise NoEdgesError(node, "makes a weight that is a constant to paths")
        return self.masses(node).changed(lambda sums: sums.expand(weight.shape))

    def own_values(self, weight: Weight) -> Tensor:
        """The values of a parameter, or of some of its elements, in its shape."""
        found = torch.zeros(weight.shape, dtype=torch.float64)
        for name, inside, local in self._elements.by_parameter(self.elements(weight)):
            found[inside] = self.parameters[name].detach().reshape(-1)[local].to("cpu", torch.float64)
        return found

    def as_neurons(self, weight: Weight) -> Tensor:
        if self._recording:
            found = self.found(weight)
            if found is not None:
                small = compact(self.elements(weight))
                self._as_neurons = found.changed(lambda sums: self._narrowed(sums, small.shape))
        numbers = super().as_neurons(weight)
        self._as_neurons = None
        return numbers

    def bias(self, numbers: Tensor, weight: Weight) -> Tensor:
        if not self._recording:
            return super().bias(numbers, weight)
        super().use(weight, torch.tensor(FIXED), torch.tensor(FIXED))  # that it is used: by which ends follows below
        small, elements = broadcast(compact(numbers), compact(self.elements(weight)))
        found = self.added(weight).changed(lambda sums: self._narrowed(sums, small.shape).reshape(-1))
        columns = (small.reshape(-1), elements.reshape(-1), *found.sums)
        keys = torch.stack([column.double() for column in columns], 1)
        made, first = self._joins(keys, torch.where(small.reshape(-1) > FIXED, 1, -1))
        old = keys[first, 0].long()
        self._link(made[first], torch.where(old == FIXED, ZERO, old))
        added = Weight(first.shape, elements=keys[first, 1].long())
        self._record(added, made[first].abs(), torch.tensor(FIXED), found.changed(lambda sums: sums[first]))
        self._biased = made.view(small.shape)
        return self._biased

    def _narrowed(self, sums: Tensor, shape: torch.Size) -> Tensor:
        """Entries that do not differ along the dimensions of size 1 in ``shape``, expanded to it."""
        while sums.ndim > len(shape):
            sums = self._first_of_equals(sums, 0).squeeze(0)
        for dim in range(-sums.ndim, 0):
            if shape[dim] == 1 and sums.shape[dim] > 1:
                sums = self._first_of_equals(sums, dim)
        return sums.expand(shape)

    def _first_of_equals(self, sums: Tensor, dim: int) -> Tensor:
        first = sums.narrow(dim, 0, min(1, sums.shape[dim]))
        if not torch.equal(first.expand(sums.shape), sums):
            raise NoEdgesError(self.node, "multiplies one element by several constants: no edge has two values")
        return first

    def use(self, weight: Weight, dst: Tensor, src: Tensor, reads: Tensor | None = None) -> None:
        if self._expanding is not None:
            self._parts.append(_Part(weight, dst, src))
            return
        super().use(weight, dst, src, reads)
        if not self._recording:
            return
        self._only_added &= not bool(compact(src).any())
        old = compact(dst)
        old = torch.unique(old[(old > FIXED) & (old < self._first_number)])
        old = old[[number not in self._moved for number in old.tolist()]]
        if len(old):
            joins = self._allocate("join", len(old))
            self._link(joins, old)
            self._moved |= dict(zip(old.tolist(), joins.tolist(), strict=True))
        if self._moved:
            dst = self._replaced(dst)
        if reads is not None:
            self.read(reads)
        self._record(weight, dst, src, self._as_neurons or self.found(weight))

    def joined(self, weight: Weight) -> Tensor:
        """Numbers of new joins that stand for the entries of a weight, which paths enter from the constant."""
        found, small = self.found(weight), compact(self.elements(weight))
        if found is not None:
            found = found.changed(lambda sums: self._narrowed(sums, small.shape))
        joins = self._allocate("join", small.numel()).view(small.shape)
        self._record(Weight(small.shape, elements=small), joins, torch.tensor(FIXED), found)
        return joins.expand(weight.shape)

    def _record(self, weight: Weight, dst: Tensor, src: Tensor, found: Magnitudes | None) -> None:
        """Record the edges of a weight, of what it carries, or else of the values of its parameters."""
        self._used = True
        order = self._next()
        name = self._elements.name_of(weight)
        if name is not None:
            shape = self._elements.shapes[name]
            if weight.shape != shape:
                dst, src = (compact(end.expand(weight.shape).reshape(shape)) for end in (dst, src))
                found = None if found is None else found.changed(lambda sums: sums.expand(weight.shape).reshape(shape))
            self._record_part(name, dst, src, None, found, order)
            return
        for owner, inside, local in self._elements.by_parameter(self.elements(weight)):
            to, of = (end.expand(weight.shape)[inside] for end in (dst, src))
            part = None if found is None else found.changed(lambda sums, inside=inside: sums[inside])  # type: ignore[misc]
            self._record_part(owner, to, of, local, part, order)

    def _record_part(
        self, owner: str, dst: Tensor, src: Tensor, local: Tensor | None, found: Magnitudes | None, order: float
    ) -> None:
        if owner not in self._computed:
            self._edges.append(self._plain_edges(owner, dst, src, local, found, order))
            return
        if found is None:
            found = self.masses(self._computed[owner].node)
            found = found if local is None else found.changed(lambda sums: sums.reshape(-1)[local])
        self._uses.append(Use(owner, dst, src, local, found, order, self._computed[owner].node))

    def _plain_edges(
        self, name: str, dst: Tensor, src: Tensor, local: Tensor | None, found: Magnitudes | None, order: float
    ) -> Edges:
        if found is None:
            values = self.parameters[name] if local is None else self.parameters[name].reshape(-1)[local]
        elif found.are_single:
            values = found.sums[0]
        else:
            raise NoEdgesError(self.node, "reads a weight whose entries are sums of one parameter with itself")
        return Edges(self.node, order, name, local, nodes_of(dst), nodes_of(src), values)

    # -- computed weights ----------------------------------------------------------------------------------------------

    def computed(
        self, formula: str, shape: torch.Size, parts: Sequence[Weight], spread: Callable[[Tensor, Tensor], None]
    ) -> Weight:
        weight = super().computed(formula, shape, parts, spread)
        if self._recording and weight.name is not None and weight.name not in self._sources_of_parts:
            given = leaves((self.node.args, self.node.kwargs), fx.Node)
            met: dict[fx.Node, int] = {}
            sources: list[tuple[fx.Node, int] | None] = []
            for part in parts:
                nodes = [node for node in given if self._operands.get(node) is part]
                if not nodes:
                    sources.append(None)
                    continue
                node = nodes[0]
                sources.append((node, met.get(node, 0)))
                met[node] = met.get(node, 0) + 1
            self._sources_of_parts[weight.name] = sources
        return weight

    def fresh(self, count: int, weight: Weight | None, standing: bool = True) -> Tensor:
        if self._expanding is None:
            return super().fresh(count, weight, standing)
        numbers = self._inner.get(self._expanding)
        if numbers is None:  # a weight that is an output: no rescaling has a neuron there
            return self._allocate("join", count)
        if self._expanding in self._expanded_once and len(numbers):
            return self._allocate("hidden", count, again=int(numbers[0]))
        self._expanded_once.add(self._expanding)
        return numbers

    def spread_computed(self) -> None:
        """Make the neurons between the factors of computed weights, in the order in which the flow of neurons does."""
        for name, computed in reversed(self._computed.items()):
            if name in self._ends:
                self.node = computed.node
                ends, shape, before = self._ends[name], self._elements.shapes[name], self.num_numbers
                computed.spread(ends.dst.expand(shape), ends.src.expand(shape))
                self._inner[name] = torch.arange(before + 1, self.num_numbers + 1)

    def expand_uses(self) -> None:
        """Record the edges of all uses of computed weights.

        Raises:
            NoEdgesError: they carry something else than the weight does.
        """
        for use in self._uses:
            records = self._expanded(use.owner, use.dst, use.src, use.local, use.found)
            self._check(use, records)
            for index, record in enumerate(records, 1):
                order = use.order + index / (len(records) + 1)
                if isinstance(record, Edges):
                    self._edges.append(replace(record, order=order))
                else:
                    self._links.append(replace(record, order=order))

    def _expanded(
        self, owner: str, dst: Tensor, src: Tensor, local: Tensor | None, found: Magnitudes | None
    ) -> list[Edges | Links]:
        """The edges that make up a computed weight, in the order in which paths cross them."""
        computed, shape = self._computed[owner], self._elements.shapes[owner]
        outer = self.node, self._expanding, self._parts, self._links
        ratio = self._ratio(owner, local, found)
        if local is not None:
            dst, src = (torch.full((shape.numel(),), ZERO).index_put_((local,), end).view(shape) for end in (dst, src))
        dst, src = dst.expand(shape), src.expand(shape)
        self.node, self._expanding, self._parts, self._links = computed.node, owner, [], []
        computed.spread(dst, src)
        parts, links = self._parts, self._links
        self.node, self._expanding, self._parts, self._links = outer
        self.node = computed.node
        groups: list[list[Edges | Links]] = []
        left = dict(enumerate(computed.parts))
        for index, part in enumerate(parts):
            own = next((at for at, given in left.items() if given is part.weight), index)
            left.pop(own, None)
            groups.append(self._edges_of_part(owner, own, part))
        self.node = outer[0]
        records = [*links, *(record for group in reversed(groups) for record in group)]
        return records if ratio is None else self._scaled(records, dst, src, ratio, computed.node)

    def _edges_of_part(self, owner: str, index: int, part: _Part) -> list[Edges | Links]:
        weight, found = part.weight, self._found_part(owner, index, part.weight.shape)
        dst, src = part.dst, part.src
        name = self._elements.name_of(weight)
        if name is not None:
            shape = self._elements.shapes[name]
            dst, src = (end.expand(weight.shape).reshape(shape) for end in (dst, src))
            found = None if found is None else found.changed(lambda sums: sums.reshape(shape))
            if name in self._computed:
                return self._expanded(name, dst, src, None, found)
            return [self._plain_edges(name, dst, src, None, found, 0)]
        records: list[Edges | Links] = []
        for name, inside, local in self._elements.by_parameter(self.elements(weight)):
            to, of = (end.expand(weight.shape)[inside] for end in (dst, src))
            chosen = None if found is None else found.changed(lambda sums, inside=inside: sums[inside])  # type: ignore[misc]
            if name in self._computed:
                records += self._expanded(name, to, of, local, chosen)
            else:
                records.append(self._plain_edges(name, to, of, local, chosen, 0))
        return records

    def _found_part(self, owner: str, index: int, shape: torch.Size) -> Magnitudes | None:
        """What the entries of a part carry in a computed weight; None for the values of its parameters."""
        source = self._sources_of_parts[owner][index]
        if source is None:
            return None
        node, occurrence = source
        alone = self.masses.alone(self._computed[owner].node, node, occurrence)
        found = alone if bool(alone.sums[0].any()) else self.masses(node)
        return found.changed(lambda sums: sums.expand(shape))

    def _ratio(self, owner: str, local: Tensor | None, found: Magnitudes | None) -> Tensor | None:
        """What the entries of a computed weight were multiplied by before their use; None for 1."""
        if found is None:
            return None
        shape = self._elements.shapes[owner]
        made = self.masses(self._computed[owner].node).sums[0].expand(shape)
        used = found.sums[0].expand(shape) if local is None else made.reshape(-1).index_put((local,), found.sums[0])
        ratio = torch.where(made > 0, used.reshape(shape) / made, 1.0)
        return None if bool(((ratio - 1).abs() <= _ROUNDING).all()) else ratio

    def _scaled(
        self, records: list[Edges | Links], dst: Tensor, src: Tensor, ratio: Tensor, node: fx.Node
    ) -> list[Edges | Links]:
        """The edges times constants that depend on where they lead to, or on where they come from, alone."""
        for end, side in ((dst, "dst"), (src, "src")):
            numbers, values = nodes_of(end).reshape(-1), ratio.reshape(-1)
            known = numbers >= 0
            numbers, values = numbers[known], values[known]
            table = torch.ones(self.num_numbers + 1, dtype=torch.float64)
            table[numbers] = values
            if bool(((table[numbers] - values).abs() <= _ROUNDING * values).all()):
                return [
                    replace(record, values=record.values.abs() * table[getattr(record, side)])
                    if isinstance(record, Edges)
                    else record
                    for record in records
                ]
        raise NoEdgesError(node, "is multiplied by constants before it is used as a weight: no edges have such values")

    def _check(self, use: Use, records: Sequence[Edges | Links]) -> None:
        """Raise NoEdgesError unless sums over the edges are those of the weight, whatever arrives at its sources."""
        generator = torch.Generator().manual_seed(0)
        size, shape = self.num_numbers + 1, use.found.sums[0].shape
        dst, src = (nodes_of(end).expand(shape).reshape(-1) for end in (use.dst, use.src))
        known = (dst >= 0) & (src >= 0)
        start = torch.zeros(size, dtype=torch.float64)
        start[src[known]] = torch.rand(size, generator=generator, dtype=torch.float64)[src[known]] + 0.5
        for power, sums in enumerate(use.found.sums, 1):
            expected = torch.zeros(size, dtype=torch.float64)
            expected.index_add_(0, dst[known], sums.reshape(-1)[known] * start[src[known]])
            reached = start.clone()
            for record in records:
                values = record.values if isinstance(record, Edges) else record.factor
                values = values.detach().to("cpu", torch.float64).abs() ** power
                to, of = (end.expand(values.shape).reshape(-1) for end in (record.dst, record.src))
                there = (to >= 0) & (of >= 0)
                reached.index_add_(0, to[there], (values.reshape(-1) * reached[of])[there])
            ends = torch.unique(dst[known])
            if bool(((reached[ends] - expected[ends]).abs() > _ROUNDING * expected[ends]).any()):
                raise NoEdgesError(use.node, _NO_EDGES)
