"""The unrolled graph: the graph of operations run on numbers of scalar activations in place of activations.

Every activation becomes an integer tensor of its own shape whose entries are node numbers, 0 where an entry is always
zero. Data movement is the operation itself, applied to the numbers; an operation that computes makes new nodes and
connects them in bulk: tensors of destinations, sources and weights that broadcast with each other.

Where an edge counts or not depends on the input (a ReLU, the inputs of a maximum), it has a **gate**: a function of
the activations says how open it is.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.errors import UnsupportedOpError
from dagpath.passes.blocks import Blocks, Edges
from dagpath.passes.edge_values import EdgeWeights, Nodes, Slots, stacked
from dagpath.passes.flattened import Flattened
from dagpath.passes.paths import Gate, PathFlow, Places, Reader, Terms
from dagpath.passes.values import Call, Operand, mapped

CONSTANT = 1
"""The number of the constant node, of value 1."""

Values = Mapping[fx.Node, Any]
"""What the nodes of the captured graph compute from one input."""

ValuesReader = Callable[[Values], Tensor]
"""Reads numbers off what the nodes of the captured graph compute."""


@dataclass(frozen=True)
class Layer:
    """What nodes are: the entries of a tensor of this shape.

    Attributes:
        node: the call that made them; None for the constant node.
        role: tells apart what one call makes; empty for the entries of its output.
        shape: the shape of that tensor.
    """

    node: fx.Node | None
    role: str
    shape: torch.Size


@dataclass(frozen=True)
class Source:
    """Where paths start: the numbers of these nodes, and what reads their values."""

    numbers: Tensor
    read: ValuesReader


class EdgeFlow(PathFlow):
    """A pass over nodes; collects nodes, edges, gates, and where paths start and end.

    Args:
        graph, parameters, rule, cut, kept: see :class:`~dagpath.passes.paths.PathFlow`.
        on_node: called after each node of the graph.
    """

    def __init__(self, *graph: Any, on_node: Callable[[], object] = lambda: None, **options: Any) -> None:
        super().__init__(*graph, **options)
        self._on_node = on_node
        self._elements = Flattened({name: parameter.shape for name, parameter in self.parameters.items()})
        self.num_elements = len(self._elements)
        self.blocks = Blocks(self.num_elements)
        self.blocks.new(1, Layer(None, "", torch.Size()))
        self.sources = [Source(torch.tensor([CONSTANT]), lambda values: torch.ones(1))]
        self.sinks: list[Tensor] = []
        self.gates: list[ValuesReader] = []
        self.num_slots = 0
        self.outputs: Any = None

    # -- running a graph -------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        runs = self.blocks.runs
        first = len(runs)
        result = super().run_node(n)
        unnamed = [at for at in range(first, len(runs)) if runs[at].label is not None and not runs[at].label.role]
        for step, at in enumerate(unnamed[:-1], 1):  # the last ones are the entries of the output
            runs[at] = replace(runs[at], label=replace(runs[at].label, role=f"step {step}"))
        self._on_node()
        return result

    def parameter_at(self, node: fx.Node) -> EdgeWeights:
        name = self.graph_inputs.parameters[str(node.target)]
        return EdgeWeights.parameter(self.parameters[name], self._elements.spans[name].start + 1)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        returned = mapped(args, Operand, lambda operand: Nodes(self.nodes(operand)))
        self.outputs = mapped(returned[0], Nodes, lambda operand: operand.numbers)
        super().output(target, returned, kwargs)

    def end(self, operand: Nodes) -> None:
        self.sinks.append(operand.numbers[operand.numbers > 0])

    # -- values ----------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> EdgeWeights:
        return EdgeWeights.constant(tensor)

    def source(self, shape: Sequence[int], read: Reader, role: str = "") -> Nodes:
        numbers = self.new(shape, role)
        self.sources.append(Source(numbers.flatten(), _of_size(numbers.numel(), self._reader(read))))
        return Nodes(numbers)

    def number(self, value: Any, name: str = "") -> Nodes | EdgeWeights:
        if isinstance(value, complex):
            raise NotImplementedError("it reads a complex number, and edges have real values")
        found: Nodes | EdgeWeights = super().number(value, name)
        if isinstance(found, EdgeWeights):
            return found
        call = Call(self.node.target, self.node.args, dict(self.node.kwargs), self.node)  # type: ignore[arg-type]
        return replace(found, node=call[name])

    def nodes(self, value: Any) -> Tensor:
        """The node numbers of an operand; a weight becomes nodes of its own, fed by the constant node."""
        if isinstance(value, Nodes):
            return value.numbers
        numbers = self.new(value.shape, "weight")
        self._add(numbers, value)
        exists: Tensor = value.exists.any(0)
        return numbers * exists

    # -- nodes, gates and edges --------------------------------------------------------------------------------------

    def new(self, shape: Sequence[int], role: str = "") -> Tensor:
        """Numbers of new nodes. The edges into them have to come before the next nodes are made."""
        layer = Layer(self.node if self.blocks.num_nodes else None, role, torch.Size(shape))
        return self.blocks.new(math.prod(shape), layer).view(layer.shape)

    def _reader(self, read: Reader) -> ValuesReader:
        call = Call(self.node.target, (), {}, self.node)  # type: ignore[arg-type]
        return lambda values: read(call.on(values))

    def _slots(self, gate: Gate, edges: Sequence[int]) -> Tensor:
        """Numbers of new gates, for edges of this shape."""
        return self._new_slots(edges if gate.shape is None else gate.shape, self._reader(gate.read))

    def _new_slots(self, shape: Sequence[int], read: ValuesReader) -> Tensor:
        count = math.prod(shape)
        self.gates.append(_of_size(count, read))
        self.num_slots += count
        return torch.arange(self.num_slots - count + 1, self.num_slots + 1).view(torch.Size(shape))

    def _connect(
        self, dst: Tensor, src: Tensor, weight: EdgeWeights | float = 1.0, slots: Tensor | None = None
    ) -> None:
        """Edges between nodes, entry by entry of tensors that broadcast; there are none from or to number 0.

        Args:
            dst: destinations.
            src: sources.
            weight: the weights.
            slots: the numbers of their gates.
        """
        if not isinstance(weight, EdgeWeights):
            weight = EdgeWeights.constant(torch.tensor(weight, dtype=torch.float64))
        slots = torch.zeros((), dtype=torch.int64) if slots is None else slots
        shape = torch.broadcast_shapes(dst.shape, src.shape, weight.shape, slots.shape)  # type: ignore[no-untyped-call]
        exists = weight.exists
        exists = exists.view(len(exists), *[1] * (len(shape) - len(weight.shape)), *weight.shape)
        there = (dst > 0) & (src > 0) & exists
        there = there.expand(len(exists), *shape)
        weight = weight.expand(shape)
        chosen_entries = there.numpy()

        def chosen(tensor: Tensor) -> Tensor:  # by NumPy, which is twenty times faster on expanded tensors
            return torch.from_numpy(tensor.expand(there.shape).numpy()[chosen_entries])

        def columns(tensor: Tensor) -> Tensor:
            parts = [chosen(tensor[:, factor]) for factor in range(tensor.shape[1])]
            return torch.stack(parts, 1) if parts else tensor.new_zeros(int(there.sum()), 0)

        parts = columns(weight.elements), columns(weight.slopes)
        self.blocks.connect(Edges(chosen(dst), chosen(src), chosen(weight.values), *parts, chosen(slots)))

    def _add(self, dst: Tensor, value: Any, factor: float = 1.0, slots: Tensor | None = None) -> None:
        """Edges into ``dst`` from an operand that is added there, times a constant."""
        if isinstance(value, Nodes):
            self._connect(dst, value.numbers, factor, slots)
        else:
            self._connect(dst, torch.tensor(CONSTANT), value if factor == 1 else value.scaled(factor), slots)

    def _gate_of(self, value: Nodes, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Slots:
        """Paths into an activation end there: its value, changed, is a gate."""
        self.cut_paths(value)
        node = value.node
        assert node is not None
        return Slots(self._new_slots(value.shape, lambda values: change(torch.as_tensor(values[node]))))

    def _factors(self, a: Any, b: Any) -> tuple[Nodes, Any, bool]:
        """The factor of a product that paths go through, the other one (a weight or gates), and are they swapped?"""
        if a.data and b.data:
            if a.params and b.params and self.node not in self._kept:
                raise NotImplementedError(
                    "a weight times a gate is a factor of an activation, an edge that is no number"
                )
            through_second = self.through_second(a, b)
            swapped = (b.params and not a.params) if through_second is None else through_second
        else:
            swapped = not isinstance(a, Nodes)
        through, other = (b, a) if swapped else (a, b)
        return through, self._gate_of(other) if isinstance(other, Nodes) else other, swapped

    # -- verbs -----------------------------------------------------------------------------------------------------

    def moved(self, call: Call, move: Callable[[Call, Callable[[Any], Any]], Any]) -> Any:
        operands: list[Nodes | EdgeWeights] = call.leaves(Operand)
        starts = [0]
        for operand in operands:
            starts.append(starts[-1] + math.prod(operand.shape))
        known = list(zip(operands, starts, strict=False))

        def places(leaf: Any) -> Any:
            if not isinstance(leaf, Operand):
                return leaf
            operand, start = next(pair for pair in known if pair[0] is leaf)
            return start + all_places(operand.shape)

        moved = move(call, places)  # on the places of all entries, 0 for zeros
        if any(isinstance(operand, Nodes) for operand in operands):
            table = torch.cat([torch.zeros(1).long(), *(self.nodes(operand).flatten() for operand in operands)])
            params = any(operand.params for operand in operands)
            return mapped(moved, Tensor, lambda taken: Nodes(table[taken], params))
        weights = [operand for operand in operands if isinstance(operand, EdgeWeights)]
        flat = [weight.taken(torch.arange(1, math.prod(weight.shape) + 1)) for weight in weights]
        return mapped(moved, Tensor, stacked(flat, -1).taken)

    def placed(self, x: Any, place: Places) -> Any:
        if isinstance(x, EdgeWeights):
            return x.taken(place(all_places(x.shape)))
        return replace(x, numbers=place(x.numbers), node=None)

    def sum(self, shape: Sequence[int], terms: Sequence[tuple[Any, float]], gate: Gate | None = None) -> Any:
        if gate is None and all(isinstance(x, EdgeWeights) for x, _ in terms):
            return functools.reduce(EdgeWeights.plus, (x.scaled(factor) for x, factor in terms))
        slots = None if gate is None else self._slots(gate, (len(terms), *shape))
        dst = self.new(shape)
        for index, (x, factor) in enumerate(terms):
            self._add(dst, x, factor, None if slots is None else slots[index])
        return Nodes(dst, any(x.params for x, _ in terms))

    def reduced(
        self,
        x: Any,
        shape: Sequence[int],
        src: Places,
        dst: Places | None = None,
        weight: Tensor | float = 1.0,
        gate: Gate | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Nodes:
        chosen: EdgeWeights | None = None
        slots: Tensor | None = None
        if isinstance(x, EdgeWeights) and gate is not None:
            chosen = self.placed(x, src)
            sources = self.source(gate.shape or chosen.shape, gate.read, "gate").numbers
        else:
            sources = src(self.nodes(x))
            slots = None if gate is None else self._slots(gate, sources.shape)
        made = self.new(shape)
        others = max(0, max(sources.ndim, 0 if chosen is None else len(chosen.shape)) - len(shape))
        factor = torch.as_tensor(weight, dtype=torch.float64)
        factor = factor.reshape(*factor.shape, *[1] * others) if factor.ndim else factor
        placed = made.reshape(*made.shape, *[1] * others) if dst is None else dst(made)
        weights = EdgeWeights.constant(factor)
        self._connect(placed, sources, weights if chosen is None else chosen.times(weights), slots)
        return Nodes(made, x.params)

    def product(self, shape: Sequence[int], a: Any, b: Any) -> Any:
        if isinstance(a, EdgeWeights) and isinstance(b, EdgeWeights):
            return a.times(b)
        through, other, _ = self._factors(a, b)
        dst = self.new(shape)
        if isinstance(other, Slots):
            self._connect(dst, through.numbers, slots=other.numbers)
        else:
            self._connect(dst, through.numbers, other)
        return Nodes(dst, a.params or b.params)

    def inverse(self, x: Any) -> Any:
        return EdgeWeights.constant(1 / x.total) if isinstance(x, EdgeWeights) else self._gate_of(x, torch.reciprocal)

    def bilinear(
        self,
        shape: Sequence[int],
        operands: tuple[Any, Any, Any],
        run: Callable[..., Tensor],
        places: Callable[[], tuple[Places, Places, Places, Places, int]],
        is_layer: bool = False,
    ) -> Any:
        a, b, bias = operands
        place_dst, place_a, place_b, place_bias, summed = places()
        if isinstance(a, EdgeWeights) and isinstance(b, EdgeWeights):
            product = self.placed(a, place_a).times(self.placed(b, place_b)).summed(summed)
            return product if bias is None else product.plus(self.placed(bias, place_bias))
        through, other, swapped = self._factors(a, b)
        place_src, place_other = (place_b, place_a) if swapped else (place_a, place_b)
        src, dst = _placed(through.numbers, place_src), self.new(shape)
        if isinstance(other, Slots):
            self._connect(place_dst(dst), src, slots=_placed(other.numbers, place_other))
        else:
            self._connect(place_dst(dst), src, self.placed(other, place_other))
        if bias is not None:
            self._add(dst, self.placed(bias, place_bias))
        return Nodes(dst, any(part is not None and part.params for part in (a, b, bias)))

    def affine(self, x: Any, scale: Terms, shift: Terms, place: Places) -> Nodes:
        src = self.nodes(x)
        dst = self.new(src.shape)
        self._connect(dst, src, self.placed(self.weights(scale), place))
        if shift:
            self._add(dst, self.placed(self.weights(shift), place))
        return Nodes(dst, x.params or any(weight is not None and weight.params for _, weight in (*scale, *shift)))

    def weights(self, terms: Terms) -> EdgeWeights:
        parts = []
        for coefficient, weight in terms:
            factor = EdgeWeights.constant(coefficient(lambda x: x.total))
            parts.append(factor if weight is None else factor.times(weight))
        return parts[0] if len(parts) == 1 else functools.reduce(EdgeWeights.plus, parts).merged()


def _of_size(count: int, read: ValuesReader) -> ValuesReader:
    """The same reader, which refuses inputs whose values choose other numbers of entries than those of the trace."""

    def checked(values: Values) -> Tensor:
        with contextlib.suppress(RuntimeError):  # of shapes that do not fit
            found = read(values)
            if found.numel() == count:
                return found
        raise UnsupportedOpError(
            "values of these inputs decide that there are other numbers of entries than in the trace: trace the model "
            "on inputs like these"
        )

    return checked


def all_places(shape: Sequence[int]) -> Tensor:
    """The places of all entries of a tensor of this shape, counted from 1."""
    return torch.arange(1, math.prod(shape) + 1).view(torch.Size(shape))


def _placed(numbers: Tensor, place: Places) -> Tensor:
    table = torch.nn.functional.pad(numbers.flatten(), (1, 0))
    return table[place(all_places(numbers.shape))]
