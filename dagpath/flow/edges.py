"""The unrolled graph: the graph of operations run on numbers of scalar activations in place of activations.

Every activation becomes an integer tensor of its own shape whose entries are node numbers, 0 where an entry is always
zero. Data movement is the operation itself, applied to the numbers; an operation that computes makes new nodes and
connects them in bulk: tensors of destinations, sources and weights that broadcast with each other.

Where an edge counts or not depends on the input (a ReLU, the inputs of a maximum), it has a **gate**: a function of
the activations says how open it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture.graph import CapturedGraph
from dagpath.errors import UnsupportedOpError
from dagpath.flattened import Flattened
from dagpath.flow.blocks import Blocks, Edges
from dagpath.flow.constants import Constants, NotConstantError
from dagpath.flow.edge_values import EdgeWeights, Nodes, stacked
from dagpath.flow.values import Call, Operand, mapped, plain

CONSTANT = 1
"""The number of the constant node, of value 1."""

Values = Mapping[fx.Node, Any]
"""What the nodes of the captured graph compute from one input."""

Reader = Callable[[Values], Tensor]
"""Reads numbers off what the nodes of the captured graph compute."""

Places = Callable[[Tensor], Tensor]
"""Puts the entries of an operand where they broadcast with those of others."""


class EdgeRule(Protocol):
    """What an operation knows of edges."""

    def keeps_weights(self, call: Call) -> bool: ...

    def edges(self, flow: EdgeFlow, call: Call) -> Any: ...


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
    read: Reader


class EdgeFlow(fx.Interpreter):
    """Runs a captured graph on nodes; collects nodes, edges, gates, and where paths start and end.

    Args:
        graph: the eval graph of a model.
        parameters: the parameters' values by name, in the order of ``model.named_parameters()``.
        rule: finds the rule of a call's target.
        cut: calls through which no path goes, because their rule did not fit them.
        kept: which factor paths go through, for calls that multiply two activations.
        on_node: called after each node of the graph.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        rule: Callable[[Any], EdgeRule],
        cut: Container[fx.Node] = (),
        kept: Mapping[fx.Node, int] | None = None,
        on_node: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(graph.module)
        self.graph_inputs = graph
        self._parameters = parameters
        self._rule = rule
        self._cut = cut
        self._kept = kept or {}
        self._on_node = on_node
        self._elements = Flattened({name: parameter.shape for name, parameter in parameters.items()})
        self.num_elements = len(self._elements)
        self.real_node = Constants(graph, parameters)
        self.blocks = Blocks(self.num_elements)
        self.blocks.new(1, Layer(None, "", torch.Size()))
        self.sources = [Source(torch.tensor([CONSTANT]), lambda values: torch.ones(1))]
        self.sinks: list[Tensor] = []
        self.gates: list[Reader] = []
        self.num_slots = 0
        self.cuts: list[fx.Node] = []
        self.outputs: Any = None
        self.node: fx.Node

    # -- running a graph -------------------------------------------------------------------------------------------

    def run_graph(self) -> None:
        placeholders = sum(node.op == "placeholder" for node in self.graph_inputs.module.graph.nodes)
        self.run(*[None] * placeholders, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        self._on_node()
        return mapped(result, (Nodes, EdgeWeights), lambda value: replace(value, node=n))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        super().placeholder(target, args, kwargs)
        name = self.graph_inputs.parameters.get(str(target))
        if name is not None and self._parameters[name].is_floating_point():
            return EdgeWeights.parameter(self._parameters[name], self._elements.spans[name].start + 1)
        if name is not None:
            return EdgeWeights.constant(self._parameters[name])
        tensor = self.graph_inputs.tensors.get(str(target))
        return self.inputs(self.node.meta.get("val")) if tensor is None else EdgeWeights.constant(tensor)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call = Call(target, args, dict(kwargs), self.node)
        operands = call.leaves(Operand)
        rule = self._rule(target)
        if any(operand.data for operand in operands) or (any(o.params for o in operands) and rule.keeps_weights(call)):
            return self.barrier(call) if self.node in self._cut else rule.edges(self, call)
        try:
            return mapped(self.real_node(self.node), Tensor, EdgeWeights.constant)
        except NotConstantError:
            return self.inputs(call.output)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return EdgeWeights.constant(value) if isinstance(value, Tensor) else value

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.outputs = mapped(args[0], Operand, self.nodes)
        for leaf in pytree.tree_leaves(self.outputs):
            if isinstance(leaf, Tensor):
                self._end(leaf)

    def _end(self, numbers: Tensor) -> None:
        """Paths end in these nodes."""
        self.sinks.append(numbers[numbers > 0])

    # -- what operations call: values --------------------------------------------------------------------------------

    def inputs(self, output: Any) -> Any:
        """New inputs in the shape of ``output`` (the fake tensors of this call), which start paths."""
        leaves, structure = pytree.tree_flatten(output)
        node = self.node

        def one(index: int, fake: Any) -> Any:
            if not isinstance(fake, Tensor):
                return fake
            read: Reader = lambda values: pytree.tree_leaves(values[node])[index]  # noqa: E731
            return self.source(fake.shape, read, str(index) if len(leaves) > 1 else "")

        return pytree.tree_unflatten([one(index, fake) for index, fake in enumerate(leaves)], structure)

    def source(self, shape: Sequence[int], read: Reader, role: str = "") -> Nodes:
        """New nodes that start paths, and what reads their values."""
        numbers = self.new(shape, role)
        self.sources.append(Source(numbers.flatten(), _of_size(numbers.numel(), read)))
        return Nodes(numbers)

    def number(self, value: Any, name: str) -> Nodes | EdgeWeights:
        """A Python number as a constant; what is only known with the input (the argument ``name``) is a new input."""
        if isinstance(value, complex):
            raise NotImplementedError("it reads a complex number, and edges have real values")
        if plain(value) is not None:
            return EdgeWeights.constant(torch.tensor(value, dtype=torch.float64))
        node = Call(self.node.target, self.node.args, dict(self.node.kwargs), self.node)[name]  # type: ignore[arg-type]
        shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else ()
        return replace(self.source(shape, lambda values: torch.as_tensor(values[node]), name), node=node)

    def operand(self, call: Call, name: str) -> Any:
        """An argument that is a tensor or a number."""
        value = call[name]
        return value if isinstance(value, Operand) else self.number(value, name)

    def nodes(self, value: Any) -> Tensor:
        """The node numbers of an operand; a weight becomes nodes of its own, fed by the constant node."""
        if isinstance(value, Nodes):
            return value.numbers
        numbers = self.new(value.shape, "weight")
        self.add(numbers, value)
        exists: Tensor = value.exists.any(0)
        return numbers * exists

    def moved(self, call: Call, move: Callable[[Call, Callable[[Any], Any]], Any]) -> Any:
        """Data movement, by ``move(call, convert)``: run on the places of all entries (0 for zeros), then looked up."""
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

        moved = move(call, places)
        if any(isinstance(operand, Nodes) for operand in operands):
            table = torch.cat([torch.zeros(1).long(), *(self.nodes(operand).flatten() for operand in operands)])
            params = any(operand.params for operand in operands)
            return mapped(moved, Tensor, lambda taken: Nodes(table[taken], params))
        weights = [operand for operand in operands if isinstance(operand, EdgeWeights)]
        flat = [weight.taken(torch.arange(1, math.prod(weight.shape) + 1)) for weight in weights]
        return mapped(moved, Tensor, stacked(flat, -1).taken)

    # -- what operations call: nodes and edges -----------------------------------------------------------------------

    def new(self, shape: Sequence[int], role: str = "") -> Tensor:
        """Numbers of new nodes. The edges into them have to come before the next nodes are made."""
        layer = Layer(self.node if self.blocks.num_nodes else None, role, torch.Size(shape))
        return self.blocks.new(math.prod(shape), layer).view(layer.shape)

    def slots(self, shape: Sequence[int], read: Reader) -> Tensor:
        """Numbers of new gates; ``read`` says how open each is, in this shape."""
        count = math.prod(shape)
        self.gates.append(_of_size(count, read))
        self.num_slots += count
        return torch.arange(self.num_slots - count + 1, self.num_slots + 1).view(torch.Size(shape))

    def connect(self, dst: Tensor, src: Tensor, weight: EdgeWeights | float = 1.0, slots: Tensor | None = None) -> None:
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

    def add(self, dst: Tensor, value: Any, factor: float = 1.0, slots: Tensor | None = None) -> None:
        """Edges into ``dst`` from an operand that is added there, times a constant."""
        if isinstance(value, Nodes):
            self.connect(dst, value.numbers, factor, slots)
        else:
            self.connect(dst, torch.tensor(CONSTANT), value if factor == 1 else value.scaled(factor), slots)

    def multiply(self, dst: Tensor, a: Any, place_a: Places, b: Any, place_b: Places) -> None:
        """Edges into ``dst`` from the products of two operands, one of them an activation.

        Of two activations paths go through one; the other is a gate.
        """
        a, b = self.factors(a, b)
        if not isinstance(a, Nodes):
            a, place_a, b, place_b = b, place_b, a, place_a
        src = _placed(a.numbers, place_a)
        if isinstance(b, EdgeWeights):
            self.connect(dst, src, b.taken(place_b(all_places(b.shape))))
        else:
            self.connect(dst, src, slots=_placed(b, place_b))

    def factors(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Both factors of a product; of two activations the gate is replaced by numbers of gates."""
        if not (a.data and b.data):
            return a, b
        if a.params and b.params and self.node not in self._kept:
            raise NotImplementedError("a weight times a gate is a factor of an activation, an edge that is no number")
        through_b = self._kept.get(self.node, 0) if a.params == b.params else b.params
        return (self.gate(a), b) if through_b else (a, self.gate(b))

    def gate(self, value: Nodes, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        """Paths through an activation end there: its value, changed, is a gate. The gates' numbers, in its shape."""
        self.cut_paths(value)
        node = value.node
        assert node is not None
        return self.slots(value.shape, lambda values: change(torch.as_tensor(values[node])))

    def barrier(self, call: Call) -> Any:
        """Cut all paths: what enters the operation counts as an output, what leaves it as a new input."""
        for operand in call.leaves(Operand):
            self.cut_paths(operand)
        return self.inputs(call.output)

    def cut_paths(self, value: Any) -> None:
        """Paths into this operand end there."""
        if isinstance(value, Nodes) and value.params:
            self._end(value.numbers)
            self.cuts.append(self.node)


def _of_size(count: int, read: Reader) -> Reader:
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
