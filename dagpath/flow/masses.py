"""Sums over paths: the graph of operations run on path masses in place of activations.

Every edge has a mass, its weight's absolute value to some power, say; a path's mass is the product of its edges'. With
a maximum replaced by a sum and a mean by a sum of edges of weight ``1/k``, feeding ones gives the mass of all paths to
an output; its derivative with respect to the mass of an edge is the mass of all paths through it, without that edge.
One forward and one backward pass. What the mass of an edge is, a subclass of :class:`MassFlow` says.

Masses leave the floating-point range in deep networks, so each tensor carries a power of two beside its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from dagpath.capture.graph import CapturedGraph
from dagpath.fetched import Fetched, device_of
from dagpath.flow.constants import Constants, NotConstantError
from dagpath.flow.values import LARGEST_STEP, NOTHING, Call, Later, Mass, is_fetched, leaves, mapped, plain
from dagpath.state import uncollected

_HEADROOM = {torch.float64: 128, torch.float32: 16}
"""Values between 2**-h and 2**h are left alone: one operation moves them far less than the type's range over h."""


_FAST_LAYOUT = {(torch.float64, 4): torch.channels_last, (torch.float64, 5): torch.channels_last_3d}
"""Memory formats by type and number of dimensions: float64 convolutions are a quarter faster in these on a CPU."""


_AGAIN: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": False}

Coefficient = Callable[[Callable[[Mass], Tensor]], Tensor]
"""Computes a tensor from constants, given what reads the true values of a mass that depends on no input."""


class MassRule(Protocol):
    """What an operation knows of masses."""

    def keeps_weights(self, call: Call) -> bool: ...

    def mass(self, flow: MassFlow, call: Call) -> Any: ...


class MassFlow(fx.Interpreter):
    """Runs a captured graph on masses. Path quantities make it; rules get it.

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
        ...     def mass(self, flow, call):
        ...         x = call["x"]
        ...         return flow.scaled(x, x.values.sum(1, keepdim=True), flow.number(1 / x.values.shape[1]))
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

    Attributes:
        records: do passes record what a backward pass needs?
        outputs: the masses at the model's outputs, once the graph was run.
        sinks: the masses at all ends of paths: those, and what enters operations that cut paths.
        layers: the calls that are parametrized linear layers.

    Args:
        graph: the eval graph of a model.
        parameters: the parameters' values by name.
        rule: finds the rule of a call's target.
        cut: calls through which no path goes, because their rule did not fit them.
        kept: which factor paths go through, for calls that multiply two activations.
        dtype: float64, or float32 for speed.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        rule: Callable[[Any], MassRule],
        cut: Container[fx.Node] = (),
        kept: Mapping[fx.Node, int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(graph.module)
        self.graph_inputs = graph
        self.dtype = dtype
        self.parameters = parameters
        self._rule = rule
        self._cut = cut
        self._kept = kept or {}
        self.records = False
        self.resumptions = 0  # of backward passes, inside of calls
        self.real_node = Constants(graph, parameters)
        self.layers: set[fx.Node] = set()
        self.sinks: list[Mass] = []
        self.outputs: list[Mass] = []
        self.device = device_of(parameters)

    # -- what the mass of an edge is: for subclasses -----------------------------------------------------------------

    def parameter(self, name: str) -> Mass:
        """The masses of a parameter's elements."""
        raise NotImplementedError

    def fixed(self, weights: Tensor) -> Mass:
        """The masses of edges of constant weights."""
        raise NotImplementedError

    def edge(self, parts: Sequence[tuple[Coefficient, Mass | None]]) -> Mass:
        """The masses of edges of weight ``Σ coefficient · parameter``; one part may have no parameter."""
        raise NotImplementedError

    def layer(self, values: Tensor) -> Tensor:
        """The masses of paths once they have crossed a parametrized linear layer."""
        return values

    def factors_of(self, weight: Mass, x: Mass) -> Callable[[Mass], None] | None:
        """What takes the result of a linear layer, if derivatives by its weight's masses are not made one by one."""
        return None

    def settled(self, values: Tensor) -> tuple[Tensor, int | None]:
        """Computed values, brought back near one where they drift away, and by how much; None if all are zero."""
        top = self.exponent_of(values)
        if top == NOTHING:
            return values, None
        return (self.shifted(values, -top), top) if abs(top) > _HEADROOM[self.dtype] else (values, 0)

    # -- running a graph -------------------------------------------------------------------------------------------

    def run_graph(self) -> None:
        """Run the whole graph."""
        with uncollected(), torch.set_grad_enabled(self.records):
            self.run(enable_io_processing=False)
        self.env.clear()  # what nothing reads refers to this flow

    def total(self) -> Mass:
        """The sum over all paths, as a mass of one entry."""
        self.run_graph()
        with torch.set_grad_enabled(self.records):
            if not self.sinks:
                return Mass(torch.zeros((), dtype=self.dtype, device=self.device), zero=True)
            exponent = self.common(self.sinks)  # a sum of zero has derivatives too: those by the zeros of a last layer
            sums = [self.at(sink, exponent).sum() for sink in self.sinks]
            return Mass(torch.stack(sums).sum(), exponent, zero=all(sink.zero for sink in self.sinks))

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        args, kwargs = self.fetch_args_kwargs_from_env(n) if n.all_input_nodes else (n.args, n.kwargs)
        result = getattr(self, n.op)(n.target, args, kwargs)
        if isinstance(result, Mass) and result.node:
            return result
        return mapped(result, Mass, lambda mass: mass if mass.node else replace(mass, node=n))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = self.graph_inputs.parameters.get(str(target))
        if name is not None and self.node.meta["val"].is_floating_point():
            return Later(self._parameter_at, True, self.node)
        if name is not None or str(target) in self.graph_inputs.tensors:
            return Later(self.evaluated, False, self.node)
        return self.inputs(self.node.meta.get("val"))

    def _parameter_at(self, node: fx.Node) -> Mass:
        with torch.set_grad_enabled(self.records):  # whatever the rule that reads it first is in
            return self.parameter(self.graph_inputs.parameters[str(node.target)])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call = Call(target, args, dict(kwargs), self.node)
        masses = call.leaves(Mass)
        rule = self._rule(target)
        if any(mass.data for mass in masses) or (any(mass.params for mass in masses) and rule.keeps_weights(call)):
            return self.barrier(call) if self.node in self._cut else self._answer(rule, call)
        try:
            return self.evaluated(self.node)
        except NotConstantError:
            return self.inputs(call.output)

    def _answer(self, rule: MassRule, call: Call) -> Any:
        """What the rule says. Parameters that are fetched for this call alone are let go, and fetched again later."""
        passing = [mass for mass in call.leaves(Mass) if not is_fetched(mass)]
        if not (self.records and isinstance(self.parameters, Fetched)) or len(passing) == len(call.leaves(Mass)):
            return rule.mass(self, call)
        sinks, resumptions, found = len(self.sinks), self.resumptions, list[Any]()

        def compute(anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            given = iter(values)

            def anew(mass: Mass) -> Mass:
                assert mass.node is not None
                return Later(self._parameter_at, True, mass.node) if is_fetched(mass) else mass.on(next(given))

            outer, self.node = self.node, call.node  # a backward pass is elsewhere in the graph
            args, kwargs = mapped((call.args, call.kwargs), Mass, anew)
            before = len(self.sinks)
            result = rule.mass(self, Call(call.target, args, kwargs, call.node))
            self.node = outer
            if found:  # paths end there already
                del self.sinks[before:]
            else:  # later ones would hold what they were computed from
                found.append(result)
            return anchor.clone(), *(mass.values for mass in leaves(result, Mass))

        anchor = torch.ones((), requires_grad=True)  # without which nothing that is fetched would have a derivative
        _, *computed = checkpoint(compute, anchor, *(mass.values for mass in passing), **_AGAIN)
        values = iter(computed)
        first, known = found[0], {id(mass.values) for mass in passing}
        if self.resumptions > resumptions or any(id(sink.values) not in known for sink in self.sinks[sinks:]):
            del self.sinks[sinks:]
            return rule.mass(self, call)
        return mapped(first, Mass, lambda mass: mass.on(next(values)))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.evaluated(self.node)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.outputs = leaves(args, Mass)
        self.sinks += self.outputs

    def evaluated(self, node: fx.Node) -> Any:
        """The masses of a node that depends on no input: constant edges.

        Raises:
            NotConstantError: it has no fixed value.
        """
        return mapped(self.real_node(node), Tensor, self.constant)

    def inputs(self, output: Any) -> Any:
        """Inputs of the network in the shape of ``output`` (the fake tensors of a node): masses of one."""

        def one(fake: Tensor) -> Mass:
            layout = _FAST_LAYOUT.get((self.dtype, fake.ndim), torch.contiguous_format)
            ones = torch.ones(fake.shape, dtype=self.dtype, device=self.device)
            return Mass(ones.contiguous(memory_format=layout), data=True)

        return mapped(output, Tensor, one)

    # -- what operations call --------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> Mass:
        """A tensor that depends on no input: its entries are edges of fixed weight; infinite ones are none."""
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        tensor = tensor.abs() if tensor.is_complex() else tensor
        return self.fixed(tensor if math.isfinite(tensor.sum()) else tensor.masked_fill(tensor.isinf(), 0))

    def number(self, value: Any) -> Mass:
        """A Python number as a constant; one that depends on the input counts as a new input, of mass one."""
        known = plain(value)
        return self.constant(torch.tensor(1.0 if known is None else known, dtype=torch.float64))

    def real(self, mass: Mass) -> Tensor:
        """The true values, in float64, of something that does not depend on the network's input."""
        assert mass.node is not None
        value: Tensor = self.real_node(mass.node)
        return value.to(self.device, torch.float64).detach()

    def result(self, parents: list[Mass], values: Tensor, exponent: int, layer: bool = False) -> Mass:
        """A computed mass; its values are brought back near one where they drift away.

        Args:
            parents: what it was computed from.
            values: its values.
            exponent: the power of two beside them.
            layer: did the paths cross a parametrized linear layer?

        Returns:
            A :class:`Mass`.
        """
        if layer:
            self.layers.add(self.node)
            values = self.layer(values)
        values, shift = self.settled(values)
        data, params = any(parent.data for parent in parents), any(parent.params for parent in parents)
        return Mass(values, exponent + (shift or 0), shift is None, data, params, self.node)

    def scaled(self, mass: Mass, values: Tensor, weight: Mass | None) -> Mass:
        """``values``, computed from ``mass`` at its exponent, times the mass of a constant weight."""
        if weight is None:
            return self.result([mass], values, mass.exponent)
        return self.result([mass], values * weight.values, mass.exponent + weight.exponent)

    def inverse(self, mass: Mass) -> Mass:
        """The masses of edges that divide by a constant weight, or by a parameter, which is a constant there."""
        return Mass(1 / mass.values.detach(), -mass.exponent)

    def linear(self, call: Call) -> Any:
        """Run an operation that is linear in all its operands together, on masses brought to one exponent."""
        parents = call.leaves(Mass)
        exponent = self.common(parents)

        def convert(leaf: Any) -> Any:
            return self.at(leaf, exponent) if isinstance(leaf, Mass) else leaf

        return mapped(call.run(convert), Tensor, lambda values: self.result(parents, values, exponent))

    def barrier(self, call: Call) -> Any:
        """Cut all paths: what enters the operation counts as an output, what leaves it as a new input."""
        for mass in call.leaves(Mass):
            self.barrier_input(mass)
        return self.inputs(call.output)

    def barrier_input(self, mass: Mass) -> Mass:
        """Cut the paths into one tensor; returns the new inputs that replace it."""
        if mass.data and mass.params:
            self.sinks.append(mass)
        return Mass(torch.ones_like(mass.values), data=True)

    def factors(self, a: Mass, b: Mass) -> tuple[Mass, Mass]:
        """Both factors of a product; of two activations one is a gate, of mass one, where paths end.

        A weight times a gate is still a weight: its edges continue the paths of the other factor.
        """
        if self.node not in self._kept or not (a.data and b.data):
            return a, b
        through_b = self._kept[self.node] if a.params == b.params else b.params
        return (self.barrier_input(a), b) if through_b else (a, self.barrier_input(b))

    @staticmethod
    def exponent_of(values: Tensor) -> int:
        """The power of two just above the largest absolute value."""
        if not values.numel():
            return NOTHING
        values = values.detach()
        if not values.is_contiguous():  # aminmax would make a copy
            values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))
        low, high = values.aminmax()
        top = max(float(high), -float(low))
        return math.frexp(top)[1] if top else NOTHING

    @staticmethod
    def shifted(values: Tensor, shift: int) -> Tensor:
        """``values * 2**shift``: infinite or zero where that leaves the floating-point range."""
        step = LARGEST_STEP[values.dtype]
        shift = max(-3 * step, min(shift, 3 * step))  # which leads from one end of the range beyond the other
        while shift:
            now = max(-step, min(shift, step))
            values = values * 2.0**now
            shift -= now
        return values

    def at(self, mass: Mass, exponent: int) -> Tensor:
        """The values of a mass at another exponent: masses are added at one, see :meth:`common`."""
        return self.shifted(mass.values, mass.exponent - exponent)

    def is_far(self, shift: int) -> bool:
        """Would derivatives leave the range of the type if values are multiplied by ``2**shift``?"""
        return False

    @staticmethod
    def common(masses: list[Mass]) -> int:
        """The exponent at which masses are added: the largest of those that are not zero."""
        largest = max(mass.magnitude for mass in masses)
        return largest if largest != NOTHING else masses[0].exponent
