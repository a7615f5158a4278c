"""How neurons read each other: the graph of operations run on node numbers, as paths see it.

Where :mod:`dagpath.flow.neurons` asks which neurons must share a scale, this pass asks which read which. It runs the
same rules: what ties two neurons into one scale there makes a new node here, a join that reads both. What lies between
layers without a parameter of its own (the 1/k of a mean, a constant factor) is measured by the operation's rule of
masses, so each operation's facts stay in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dagpath.errors import UnsupportedOpError
from dagpath.flow.constants import Constants, NotConstantError
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.responses import Response, Responses
from dagpath.flow.structure import CONSTANT, Edges, Links, Segment, Structure
from dagpath.flow.values import FIXED, ZERO, Call, Weight, broadcast, compact, leaves, mapped
from dagpath.survey import Capture

_OFFSET = 2
"""Node n has number n + 2, or minus that: smaller numbers say fixed, always zero and not used."""


class StructureFlow(NeuronFlow):
    """Runs the graphs of a model on node numbers and records who reads whom in the eval graph.

    A node's number is positive where it carries a scale and negative where it does not (inputs, results of barriers),
    so that every rule decides as it does in the flow of neurons.

    Args:
        model: the model.
        captured: its graphs.
        rule: finds the rule of a call's target.
        unknown: makes the rule of an operation that fixes what it touches, from the reason.
        cut: calls through which no path goes.
        kept: which factor paths go through, for calls that multiply two activations.
        values: the values of the parameters by name, which weigh the edges.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Capture,
        rule: Callable[[Any], Any],
        unknown: Callable[[str], Any],
        cut: Container[fx.Node],
        kept: Mapping[fx.Node, int],
        values: Mapping[str, Tensor],
    ) -> None:
        super().__init__(model, rule, unknown)
        self.parameters: dict[str, Tensor] = dict(values)
        self._captured = captured
        self._known_cut = cut
        self._known_kept = kept
        self._values = Constants(captured.eval, self.parameters)
        self._responses = Responses(captured.eval, self._values, rule, cut, kept)
        self._recording = True
        self.num_numbers = _OFFSET
        self._segments = [Segment("constant", None, CONSTANT, 1)]
        self._edges: list[Edges] = []
        self._links: list[Links] = []
        self._path_ends: list[Links] = []
        self._num_records = 0
        self._spread_order: dict[fx.Node, int] = {}
        self._with_params: dict[fx.Node, bool] = {}
        self._part_nodes: dict[int, fx.Node] = {}
        self._start_call()

    def _start_call(self) -> None:
        """Forget what concerned the last call."""
        self._operands: dict[fx.Node, Any] = {}
        self._first_number = self.num_numbers + 1
        self._first_edge = len(self._edges)
        self._used = False
        self._reads: tuple[int, Tensor] | None = None
        self._moved: dict[int, int] = {}
        self._biased: Tensor | None = None
        self._barrier: Tensor | None = None

    # -- running -----------------------------------------------------------------------------------------------------

    def structure(self) -> Structure:
        """Run both graphs (in the train graph neurons are only counted) and assemble the records."""
        self.run_graph(self._captured.eval)
        self._recording = False
        if self._captured.train is not None:
            self.run_graph(self._captured.train)
        self._recording = True
        self._start_call()
        in_order = len(self._edges)
        self.spread_computed()
        # the parts of a computed weight come from its outputs to its inputs
        edges = sorted([*self._edges[:in_order], *reversed(self._edges[in_order:])], key=lambda record: record.order)
        records = (tuple(self._segments), tuple(edges), tuple(self._links), tuple(self._path_ends))
        return Structure(self.num_numbers - _OFFSET + 1, *records)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        self._with_params[self.node] = str(target) in self.graph_inputs.parameters
        if self._recording and isinstance(value, Tensor) and not self._is_constant():
            return self._source("input").expand(value.shape)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self._recording:
            return super().call_function(target, args, kwargs)
        self._start_call()
        self._operands = {node: self.env[node] for node in self.node.all_input_nodes}
        self._with_params[self.node] = any(self._with_params.get(node, False) for node in self._operands)
        call = Call(target, args, dict(kwargs), self.node)
        cut = self.node in self._known_cut
        numbers = self._cut(call, "") if cut else self._rule(target).neurons(self, call)
        if self._moved:
            numbers = mapped(numbers, Tensor, self._replaced)
        data = {node: self._with_params[node] for node, value in self._operands.items() if _has_nodes(value)}
        if not data:
            is_input = not leaves(numbers, Weight) and not self._is_constant()
            return mapped(numbers, Tensor, self._sourced) if is_input else numbers
        if self._used and self._reads is None:
            return numbers
        return self._responded(numbers, data, self._responses(self.node, data))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = leaves(args, Tensor)
        if self._recording:
            for number, leaf in zip(self._allocate("output", len(tensors)), tensors, strict=True):
                self._end(number, leaf)

    def _is_constant(self) -> bool:
        """Has the current node a value that does not depend on the input?"""
        try:
            self._values(self.node)
        except NotConstantError:
            return False
        return True

    def _responded(self, numbers: Any, data: Mapping[fx.Node, bool], response: Response) -> Any:
        """The numbers that a call returned, after the constants that it multiplies by and adds, and what it cuts."""
        for operand in response.ended:
            for leaf in leaves(self._operands[operand], object):
                self._end(self._barrier_number(), leaf)
        if self._reads is not None:
            self._normalize(leaves(numbers, object)[0], response)
            return numbers
        (operand, *others) = (self._operands[node] for node in data)
        flat, spec = pytree.tree_flatten(numbers)
        for index, (leaf, is_data) in enumerate(zip(flat, response.data, strict=False)):
            if not is_data:
                continue
            found = leaf
            if not _has_nodes(leaf):  # its scale is fixed, but do paths go on?
                goes_on = not response.ended and not others and isinstance(operand, Tensor)
                found = -operand.abs() if goes_on and operand.shape == leaf.shape else self._sourced(leaf)
            if response.factors:
                found = self._multiplied(found, response.factors[index], response.constants[index])
            flat[index] = found
        return pytree.tree_unflatten(flat, spec)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _new_numbers(self, count: int, maker: fx.Node | None) -> Tensor:
        return self._allocate("join" if maker is None else "hidden", count)

    def _allocate(self, role: str, count: int) -> Tensor:
        start = self.num_numbers + 1
        self.num_numbers += count
        if count:
            self._segments.append(Segment(role, self.node, start - _OFFSET, count))
        return torch.arange(start, start + count)

    def _source(self, role: str) -> Tensor:
        return -self._allocate(role, 1)[0]

    def _barrier_number(self) -> Tensor:
        if self._barrier is None:
            self._barrier = self._source("barrier")
        return self._barrier

    def _sourced(self, numbers: Tensor) -> Tensor:
        """Paths that start anew at a barrier."""
        self._with_params[self.node] = False
        return self._barrier_number().expand(numbers.shape)

    def _replaced(self, numbers: Tensor) -> Tensor:
        """``numbers`` with those that got a bias replaced by the joins that have it."""
        table = torch.arange(self.num_numbers + 1)
        table[list(self._moved)] = torch.tensor(list(self._moved.values()))
        small = compact(numbers)
        return torch.where(small > FIXED, table[small.clamp(min=0)], small).expand(numbers.shape)

    def _end(self, end: Tensor, numbers: Tensor) -> None:
        sources = torch.unique(_nodes(compact(numbers)))
        sources = sources[sources > CONSTANT]
        self._path_ends.append(
            Links(
                self._next(), _nodes(end).expand(len(sources)), sources, torch.ones(len(sources), dtype=torch.float64)
            )
        )

    def _next(self) -> int:
        self._num_records += 1
        return self._spread_order.get(self.node, self._num_records)

    def _link(self, dst: Tensor, src: Tensor, factor: Tensor | float = 1.0) -> None:
        dst, src, factors = broadcast(dst, src, torch.as_tensor(factor, dtype=torch.float64))
        known = (src != ZERO) & (factors > 0)
        if known.any():
            self._links.append(Links(self._next(), _nodes(dst[known]), _nodes(src[known]), factors[known]))

    def _joins(self, keys: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """A new join for each distinct row of ``keys``; returns the numbers of the rows, and one row of each join."""
        unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
        first = torch.full((len(unique),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
        numbers = self._allocate("join", len(unique))
        return (numbers * signs[first])[inverse], first

    def join(self, a: Tensor, b: Tensor, reason: str, scale: float = 1.0) -> Tensor:
        if not self._recording:
            return super().join(a, b, reason)
        if self._biased is not None and (a is self._biased or b is self._biased):
            return self._biased
        a, b = (self._replaced(value) if self._moved else value for value in (a, b))
        a, b = broadcast(compact(a), compact(b))
        result = torch.where((a == ZERO) | ((a == FIXED) & (b < ZERO)), b, a)
        differ = (a != b) & (a != ZERO) & (b != ZERO) & ((a > FIXED) | (a < ZERO)) & ((b > FIXED) | (b < ZERO))
        hidden = (a == FIXED) & (b > FIXED)
        for chosen, factor in ((differ, 1.0), (hidden, 0.0)):
            if not chosen.any():
                continue
            signs = torch.where(a[chosen] > FIXED, 1, -1)
            numbers, first = self._joins(torch.stack([a[chosen], b[chosen]], 1), signs)
            self._link(numbers[first], a[chosen][first], factor)
            self._link(numbers[first], b[chosen][first], abs(scale))
            result = result.masked_scatter(chosen, numbers)
        return result

    def mix(self, numbers: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        dims = list(dims)
        if not self._recording:
            return super().mix(numbers, dims, reason)
        numbers = compact(numbers, dims)
        dims = [dim for dim in dims if numbers.shape[dim] > 1]
        if not dims or not numbers.numel():
            return numbers
        kept = [dim for dim in range(numbers.ndim) if dim not in dims]
        shape = [1 if dim in dims else size for dim, size in enumerate(numbers.shape)]
        narrow = compact(numbers, kept)
        narrow_shape = [1 if dim in dims else size for dim, size in enumerate(narrow.shape)]
        rows = narrow.permute(*kept, *dims).reshape(-1, math.prod(narrow.shape[dim] for dim in dims))
        is_node = rows.abs() > _OFFSET
        most, least = (rows.masked_fill(~is_node, fill) for fill in (-self.num_numbers - 1, self.num_numbers + 1))
        most, least = most.amax(1), least.amin(1)
        result = torch.where(is_node.any(1), most, rows.amax(1))
        several = most > least
        if several.any():
            joins = self._allocate("join", int(several.sum()))
            chosen = rows[several]
            row, column = torch.nonzero(is_node[several], as_tuple=True)
            pairs = torch.unique(torch.stack([joins[row], chosen[row, column]], 1), dim=0)
            self._link(pairs[:, 0], pairs[:, 1])
            result[several] = torch.where(most[several] > FIXED, joins, -joins)
        return result.view(narrow_shape).expand(shape)

    def _multiplied(self, numbers: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
        """Numbers of nodes that read these times a factor, plus a constant; entries with 1 and 0 stay as they are."""
        small = compact(numbers)
        factor, constant = (_largest(value, numbers.shape, small.shape) for value in (factor, constant))
        is_node = small.abs() > _OFFSET
        factor = torch.where(is_node, factor, 0.0)
        chosen = (is_node & (factor != 1)) | (constant > 0)
        if not chosen.any():
            return numbers
        keys = torch.stack([small[chosen].double(), factor[chosen], constant[chosen]], 1)
        made, first = self._joins(keys, torch.where(small[chosen] > FIXED, 1, -1))
        self._link(made[first], small[chosen][first], factor[chosen][first])
        self._link(made[first], torch.tensor(FIXED), constant[chosen][first])
        return small.masked_scatter(chosen, made).expand(numbers.shape)

    def product(self, factors: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor]) -> Tensor:
        may_be_free = [bool((compact(factor) > FIXED).any()) for factor in factors]
        index = self._known_kept.get(self.node, int(may_be_free[1]))
        kept, other = (compact(results[i]) for i in (index, 1 - index))
        shape = torch.broadcast_shapes(*(result.shape for result in results))  # type: ignore[no-untyped-call]
        if all(may_be_free):
            kept = torch.where(other == ZERO, ZERO, kept)
        return kept.expand(shape)

    # -- ties, which are of no interest here -------------------------------------------------------------------------

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        return

    def fix(self, numbers: Tensor, reason: str) -> None:
        return

    def pin(self, weight: Weight, reason: str = "") -> None:
        return

    # -- edges -------------------------------------------------------------------------------------------------------

    def bias(self, numbers: Tensor, weight: Weight) -> Tensor:
        if not self._recording:
            return super().bias(numbers, weight)
        elements = self.elements(weight)
        small, elements = broadcast(compact(numbers), compact(elements))
        keys = torch.stack([small.reshape(-1), elements.reshape(-1)], 1)
        made, first = self._joins(keys, torch.where(keys[:, 0] > FIXED, 1, -1))
        self._link(made[first], torch.where(keys[first, 0] == FIXED, ZERO, keys[first, 0]))
        self._record(Weight(first.shape, elements=keys[first, 1]), made[first].abs(), torch.tensor(FIXED), None)
        self._biased = made.view(small.shape)
        return self._biased

    def use(self, weight: Weight, dst: Tensor, src: Tensor, reads: Tensor | None = None) -> None:
        super().use(weight, dst, src, reads)
        if not self._recording:
            return
        old = compact(dst)
        old = torch.unique(old[(old > FIXED) & (old < self._first_number)])
        old = old[[number not in self._moved for number in old.tolist()]]
        if len(old) and not self._spread_order.get(self.node):
            joins = self._allocate("join", len(old))
            self._link(joins, old)
            self._moved |= dict(zip(old.tolist(), joins.tolist(), strict=True))
        if self._moved:
            dst = self._replaced(dst)
        if reads is not None:
            self._reads = (len(self._edges), reads)
        node = next((node for node, value in self._operands.items() if value is weight), None)
        self._record(weight, dst, src, node or self._part_nodes.get(id(weight)))

    def _record(self, weight: Weight, dst: Tensor, src: Tensor, node: fx.Node | None) -> None:
        """Record the edges of a weight, whose values are those of ``node``, or else those of its parameters."""
        self._used = True
        order = self._next()
        values = None if node is None else self._values(node).detach().expand(weight.shape)
        name = self._elements.name_of(weight)
        if name is not None and name not in self._computed:
            shape = self._elements.shapes[name]
            if weight.shape != shape:
                dst, src = (compact(end.expand(weight.shape).reshape(shape)) for end in (dst, src))
            values = self.parameters[name] if values is None else values.reshape(shape)
            self._edges.append(Edges(self.node, order, name, None, _nodes(dst), _nodes(src), values))
            return
        for owner, inside, local in self._elements.by_parameter(self.elements(weight)):
            if owner in self._computed:
                self._check_plain(owner, node)
                self._spread_order.setdefault(self._computed[owner].node, order)
                continue
            to, of = (_nodes(end.expand(weight.shape)[inside]) for end in (dst, src))
            found = self.parameters[owner].reshape(-1)[local] if values is None else values[inside]
            self._edges.append(Edges(self.node, order, owner, local, to, of, found))

    def _normalize(self, numbers: Tensor, response: Response) -> None:
        """Let the edges of a normalization's gain read its input, or a barrier where its statistics are the input's."""
        assert self._reads is not None
        at, reads = self._reads
        gain = self._edges[at]
        added = [index for index in range(self._first_edge, len(self._edges)) if index != at]
        if response.ended:
            self._edges[at] = replace(gain, src=_nodes(self._barrier_number()), order=self._next())
            return
        dst, src = broadcast(compact(numbers), compact(reads))
        given = (response.factors[:1] or (torch.ones(()),)) + (response.constants[:1] or (torch.zeros(()),))
        factor, constant = (_largest(value, numbers.shape, dst.shape).reshape(-1) for value in given)
        dst, src = dst.reshape(-1), src.reshape(-1)
        tables = torch.zeros(2, self.num_numbers + 1, dtype=torch.float64)
        for table, value in zip(tables, (factor, constant), strict=True):
            table.scatter_reduce_(0, _nodes(dst), value, "amax")
        pairs = torch.unique(torch.stack([dst, src], 1)[src.abs() > _OFFSET], dim=0)
        read, inverse, counts = torch.unique(pairs[:, 0], return_inverse=True, return_counts=True)
        several = counts > 1
        sources = torch.full((self.num_numbers + 1,), ZERO)
        sources[_nodes(pairs[:, 0])] = _nodes(pairs[:, 1])
        joins = torch.zeros_like(read)
        joins[several] = self._allocate("join", int(several.sum()))
        chosen = several[inverse]
        self._link(joins[inverse[chosen]], pairs[chosen, 1])
        sources[_nodes(read[several])] = _nodes(joins[several])
        self._edges[at] = replace(
            gain, order=self._next(), src=sources[gain.dst], values=tables[0][gain.dst].expand(gain.values.shape)
        )
        for index in added:
            edges = self._edges[index]
            self._edges[index] = replace(edges, values=tables[1][edges.dst].expand(edges.values.shape))

    def computed(
        self, formula: str, shape: torch.Size, parts: Sequence[Weight], spread: Callable[[Tensor, Tensor], None]
    ) -> Weight:
        for part in parts:
            node = next((node for node, value in self._operands.items() if value is part), None)
            if node is not None:
                self._part_nodes[id(part)] = node
        return super().computed(formula, shape, parts, spread)

    def _check_plain(self, name: str, node: fx.Node | None) -> None:
        """Raise UnsupportedOpError if a computed weight is multiplied by constants before it is used."""
        computed = self._computed[name]
        if node is None or node is computed.node:
            return
        ones = torch.ones(self._elements.shapes[name], device=next(iter(self.parameters.values())).device)
        factor = Constants(self._captured.eval, self.parameters, known={computed.node: ones})(node)
        if not bool((factor == 1).all()):
            raise UnsupportedOpError(
                f"the {name} is multiplied by constants ({node.name}) before it is used as a weight: no edge of the "
                "neuron graph has that value; multiply one of its factors by them"
            )


def _nodes(numbers: Tensor) -> Tensor:
    """Node of each number; -1 where there is none."""
    nodes = numbers.abs() - _OFFSET
    return torch.where(numbers == FIXED, CONSTANT, torch.where(nodes > 0, nodes, ZERO))


def _has_nodes(value: Any) -> bool:
    return any(bool((compact(leaf).abs() > _OFFSET).any()) for leaf in leaves(value, Tensor))


def _largest(value: Tensor, shape: torch.Size, narrow: Sequence[int]) -> Tensor:
    """The largest entries of what broadcasts to ``shape``, along the dimensions that are of size 1 in ``narrow``."""
    dims = [dim for dim, size in enumerate(narrow) if size == 1 and shape[dim] > 1]
    whole = value.expand(shape).to(torch.float64)
    return whole.amax(dims, keepdim=True) if dims else whole
