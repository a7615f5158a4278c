"""How paths go through the captured graph: one pass over its calls, and the verbs in which rules say it.

A rule says once what its operation does to paths: what it moves, sums, multiplies and cuts. Each kind of pass has the
verbs in its own terms: masses (:mod:`dagpath.passes.masses`) for sums over all paths, nodes and edges
(:mod:`dagpath.passes.edges`) for the paths themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture.graph import CapturedGraph
from dagpath.passes.constants import Constants, NotConstantError
from dagpath.passes.values import Call, Operand, leaves, mapped, plain

Places = Callable[[Tensor], Tensor]
"""Puts the entries of a tensor elsewhere: it may move, expand and drop entries, and fill places with zeros."""

Reader = Callable[[Call], Tensor]
"""Reads numbers off the real values of a call, given in place of its operands."""

Coefficient = Callable[[Callable[[Any], Tensor]], Tensor]
"""Computes a tensor of constants, given what reads the true values of an operand that depends on no input."""

Terms = Sequence[tuple[Coefficient, Any]]
"""Weights of edges: the sum of coefficients times parameters, ``[(coefficient, parameter)]``; None for no parameter."""


@dataclass(frozen=True)
class Gate:
    """How open edges are, which depends on the input: 0 for an edge that does not count there, 1 for one that does.

    Attributes:
        read: tells how open they are, from the real values of the call (a :class:`Call` whose arguments are tensors of
            values, and whose ``result`` is what the operation returned).
        shape: the shape of what ``read`` returns, which broadcasts to the edges; None for that of the edges.

    Example:
        >>> import torch
        >>> from dagpath.ops import Gate
        >>> is_open = Gate(lambda real: real["x"] > 0)  # the gate of a ReLU
    """

    read: Reader
    shape: Sequence[int] | None = None


class PathRule(Protocol):
    """What an operation knows of paths."""

    def keeps_weights(self, call: Call) -> bool: ...

    def paths(self, flow: Any, call: Call) -> Any: ...


class PathFlow(fx.Interpreter):
    """Runs a captured graph on operands that stand for paths. Path quantities make it; rules get it.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.ops import Operation
        >>> @torch.library.custom_op("dagpath_example::average", mutates_args=())
        ... def average(x: torch.Tensor) -> torch.Tensor:
        ...     return x.mean(1, keepdim=True)
        >>> _ = average.register_fake(lambda x: x.new_empty(x.shape[0], 1))
        >>> class Average(Operation):  # a sum of edges of weight 1/k
        ...     def neurons(self, flow, call):
        ...         return flow.mix(flow.activation(call["x"]), [1], "a mean of channels")
        ...     def paths(self, flow, call):
        ...         x = call["x"]
        ...         return flow.reduced(x, call.output.shape, lambda x: x[:, None], weight=1 / x.shape[1])
        >>> dagpath.register_op(average, Average())
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a = torch.nn.Linear(1, 4, bias=False)
        ...     def forward(self, x):
        ...         return average(self.a(x))
        >>> net = Net()
        >>> _ = net.a.weight.data.fill_(3.0)
        >>> traced = dagpath.trace(net, torch.zeros(1, 1))
        >>> dagpath.path_norm(traced), dagpath.path_norm(traced, p=2)  # four paths of value 3/4
        (3.0, 1.5)
        >>> traced.unroll()  # the input, four neurons, and their mean
        UnrolledGraph(7 nodes, 8 edges, 3 levels)

    Args:
        graph: the eval graph of a model.
        parameters: the parameters' values by name, in the order of ``model.named_parameters()``.
        rule: finds the rule of a call's target.
        cut: calls through which no path goes, because their rule did not fit them.
        kept: which factor paths go through, for calls that multiply two activations.

    Attributes:
        node: the node of the graph that is run.
        cuts: the nodes at which paths were cut.
        real_node: the true values of what does not depend on the input.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        rule: Callable[[Any], PathRule],
        cut: Container[fx.Node] = (),
        kept: Mapping[fx.Node, int] | None = None,
    ) -> None:
        super().__init__(graph.module)
        self.graph_inputs = graph
        self.parameters = parameters
        self.real_node = Constants(graph, parameters)
        self.cuts: list[fx.Node] = []
        self._rule = rule
        self._cut = cut
        self._kept = kept or {}
        self.node: fx.Node

    # -- running a graph -------------------------------------------------------------------------------------------

    def run_graph(self) -> None:
        """Run the whole graph."""
        self.run(enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        args, kwargs = self.fetch_args_kwargs_from_env(n) if n.all_input_nodes else (n.args, n.kwargs)
        result = getattr(self, n.op)(n.target, args, kwargs)
        return mapped(result, Operand, lambda operand: operand if operand.node else replace(operand, node=n))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = self.graph_inputs.parameters.get(str(target))
        if name is not None and self.node.meta["val"].is_floating_point():
            return self.parameter_at(self.node)
        if name is not None or str(target) in self.graph_inputs.tensors:
            return self.constant_at(self.node)
        return self.inputs(self.node.meta.get("val"))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call = Call(target, args, dict(kwargs), self.node)
        operands = call.leaves(Operand)
        rule = self._rule(target)
        if any(operand.data for operand in operands) or (any(o.params for o in operands) and rule.keeps_weights(call)):
            return self.barrier(call) if self.node in self._cut else self.answer(rule, call)
        try:
            return self.evaluated(self.node)
        except NotConstantError:
            return self.inputs(call.output)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.evaluated(self.node)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        for operand in leaves(args, Operand):
            self.end(operand)

    def answer(self, rule: PathRule, call: Call) -> Any:
        """What a rule says of a call."""
        return rule.paths(self, call)

    def evaluated(self, node: fx.Node) -> Any:
        """What stands for a node that depends on no input: edges of constant weight.

        Raises:
            NotConstantError: it has no fixed value.
        """
        return mapped(self.real_node(node), Tensor, self.constant)

    def constant_at(self, node: fx.Node) -> Any:
        """What stands for a buffer or a constant of the model."""
        return self.evaluated(node)

    def parameter_at(self, node: fx.Node) -> Any:
        """What stands for a parameter."""
        raise NotImplementedError

    def end(self, operand: Any) -> None:
        """Paths into this operand end there."""
        raise NotImplementedError

    def through_second(self, a: Operand, b: Operand) -> bool | None:
        """Do paths go through the second factor of a product of two activations? None if one is a weight, or both may
        be crossed.
        """
        if self.node not in self._kept or not (a.data and b.data):
            return None
        return bool(self._kept[self.node]) if a.params == b.params else b.params

    # -- values ----------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> Any:
        """A tensor that depends on no input: its entries are edges of fixed weight; infinite ones are none."""
        raise NotImplementedError

    def source(self, shape: Sequence[int], read: Reader, role: str = "") -> Any:
        """New inputs of the network, of which ``read`` tells the values: paths start there."""
        raise NotImplementedError

    def number(self, value: Any, name: str = "") -> Any:
        """A Python number as a constant; what is known with the input alone (the argument ``name``) is a new input."""
        known = plain(value)
        if known is not None:
            return self.constant(torch.tensor(known, dtype=torch.float64))
        return self.source((), lambda real: torch.as_tensor(real[name]), name)

    def operand(self, value: Any, name: str) -> Any:
        """An argument of this name that is a tensor or a number."""
        return value if isinstance(value, Operand) else self.number(value, name)

    def inputs(self, output: Any) -> Any:
        """New inputs in the shape of ``output`` (the fake tensors of this node), which start paths."""
        found, structure = pytree.tree_flatten(output)

        def one(index: int, fake: Any) -> Any:
            if not isinstance(fake, Tensor):
                return fake
            read: Reader = lambda real: pytree.tree_leaves(real.result)[index]  # noqa: E731
            return self.source(fake.shape, read, str(index) if len(found) > 1 else "")

        return pytree.tree_unflatten([one(index, fake) for index, fake in enumerate(found)], structure)

    # -- verbs -----------------------------------------------------------------------------------------------------

    def moved(self, call: Call, move: Callable[[Call, Callable[[Any], Any]], Any]) -> Any:
        """Entries of the operands elsewhere, and zeros: the operation itself moves them.

        Args:
            call: the call.
            move: ``move(call, convert)`` runs the operation on what ``convert`` makes of its arguments.
        """
        raise NotImplementedError

    def placed(self, x: Any, place: Places) -> Any:
        """Entries of an operand elsewhere, and zeros."""
        raise NotImplementedError

    def sum(self, shape: Sequence[int], terms: Sequence[tuple[Any, float]], gate: Gate | None = None) -> Any:
        """Sums of operands times constants, entry by entry.

        Args:
            shape: of the result, to which the operands broadcast.
            terms: operands and their factors.
            gate: how open each edge is; the edges have the shape ``[terms, *shape]``.
        """
        raise NotImplementedError

    def reduced(
        self,
        x: Any,
        shape: Sequence[int],
        src: Places,
        dst: Places | None = None,
        weight: Tensor | float = 1.0,
        gate: Gate | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Sums over entries of one operand. Of a weight, with a gate, what the input chooses: the gates are inputs.

        Args:
            x: the operand.
            shape: of the result.
            src: puts the entries of x where they broadcast with their destinations.
            dst: puts the entries of the result there. If None, ``src`` returns ``[*shape, ...]``, and sums are over the
                other dimensions.
            weight: a constant for each entry of the result, or for all.
            gate: how open each edge is.
            total: the sums, where there is a faster way to them.
        """
        raise NotImplementedError

    def product(self, shape: Sequence[int], a: Any, b: Any) -> Any:
        """Products, entry by entry. Of two activations paths go through one; the other is a gate."""
        raise NotImplementedError

    def inverse(self, x: Any) -> Any:
        """What a quotient multiplies by: a constant, or a gate, where paths end."""
        raise NotImplementedError

    def bilinear(
        self,
        shape: Sequence[int],
        operands: tuple[Any, Any, Any],
        run: Callable[..., Tensor],
        places: Callable[[], tuple[Places, Places, Places, Places, int]],
        is_layer: bool = False,
    ) -> Any:
        """What is linear in each of two operands, plus a bias.

        Args:
            shape: of the result.
            operands: both, and the bias or None.
            run: computes the result from tensors in place of the operands.
            places: puts entries of the result, of both operands and of the bias where they broadcast, and how many of
                the last dimensions are summed.
            is_layer: is it a linear layer, of weight [dst, src], on the last axis of the first operand?
        """
        raise NotImplementedError

    def affine(self, x: Any, scale: Terms, shift: Terms, place: Places) -> Any:
        """``x · scale + shift``, entry by entry; ``place`` makes both broadcast with x."""
        raise NotImplementedError

    def weights(self, terms: Terms) -> Any:
        """A weight that is computed from parameters: each term a parameter times a coefficient."""
        raise NotImplementedError

    def anew(self, x: Any, read: Reader) -> Any:
        """New inputs in the shape of an operand in which paths end; ``read`` tells their values."""
        self.cut_paths(x)
        return self.source(x.shape, read)

    def cut_paths(self, x: Any) -> None:
        """Paths into this operand end there."""
        if isinstance(x, Operand) and x.data and x.params:
            self.end(x)
            self.cuts.append(self.node)

    def barrier(self, call: Call) -> Any:
        """Cut all paths: what enters the operation counts as an output, what leaves it as a new input."""
        for operand in call.leaves(Operand):
            self.cut_paths(operand)
        return self.inputs(call.output)
