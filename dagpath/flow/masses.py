"""Sums over paths: the graph of operations run on path masses in place of activations.

With ``|θ|^q`` for every parameter, ``|c|^q`` for every constant, a maximum replaced by a sum and a mean by a sum of
edges of weight ``(1/k)^q``, feeding ones gives ``Σ |Φ|^q`` over all paths that end in an output; its derivative with
respect to ``|θ|^q`` gives the mass through each parameter. One forward and one backward pass.

Masses leave the floating-point range in deep networks, so each tensor carries a power of two beside its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture import CapturedGraph
from dagpath.flow.constants import Constants, NotConstantError
from dagpath.flow.values import NOTHING, Call, Mass, plain

_HEADROOM = {torch.float64: 128, torch.float32: 16}
"""Values between 2**-h and 2**h are left alone: one operation moves them far less than the type's range over h."""


_FAST_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by number of dimensions: float64 convolutions are a quarter faster in these on a CPU."""


class MassRule(Protocol):
    """What an operation knows of masses."""

    def keeps_weights(self, call: Call) -> bool: ...

    def mass(self, flow: MassFlow, call: Call) -> Any: ...


class MassFlow(fx.Interpreter):
    """Runs a captured graph on masses.

    Args:
        graph: the eval graph of a model.
        parameters: the parameters' values by name.
        rule: finds the rule of a call's target.
        power: the exponent q.
        dtype: float64, or float32 for speed.
        cut: calls through which no path goes, because their rule did not fit them.
        kept: which factor paths go through, for calls that multiply two activations.
        on_gradient: if given, ``total().backward()`` calls it with the name of each parameter and the derivative of
            the total mass with respect to ``|θ|^q``, as soon as it is complete, and then frees it.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        rule: Callable[[Any], MassRule],
        power: float,
        dtype: torch.dtype = torch.float64,
        cut: Container[fx.Node] = (),
        kept: Mapping[fx.Node, int] | None = None,
        on_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        super().__init__(graph.module)
        self.graph_inputs = graph
        self.exponent_q = power
        self.dtype = dtype
        self._parameters = parameters
        self._rule = rule
        self._on_gradient = on_gradient
        self._cut = cut
        self._kept = kept or {}
        self.real_node = Constants(graph, parameters)
        self.sinks: list[Mass] = []
        self.device = next((tensor.device for tensor in parameters.values()), torch.device("cpu"))

    # -- running a graph -------------------------------------------------------------------------------------------

    def total(self) -> Mass:
        """Σ |Φ|^q over all paths, as a mass of one entry."""
        placeholders = sum(node.op == "placeholder" for node in self.graph_inputs.module.graph.nodes)
        with torch.set_grad_enabled(self._on_gradient is not None):
            self.run(*[None] * placeholders, enable_io_processing=False)
            exponent = max((sink.magnitude for sink in self.sinks), default=NOTHING)
            if exponent == NOTHING:
                return Mass(torch.zeros((), dtype=self.dtype, device=self.device), zero=True)
            sums = [self.shifted(sink.values, sink.exponent - exponent).sum() for sink in self.sinks]
            return Mass(torch.stack(sums).sum(), exponent)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        return pytree.tree_map_only(Mass, lambda mass: mass if mass.node else replace(mass, node=n), result)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        super().placeholder(target, args, kwargs)
        name = self.graph_inputs.parameters.get(str(target))
        if name is not None and self._parameters[name].is_floating_point():
            return self._parameter(name)
        if name is not None:
            return self.constant(self._parameters[name])
        tensor = self.graph_inputs.tensors.get(str(target))
        if tensor is not None:
            return self.constant(tensor)
        return self.inputs(self.node.meta.get("val"))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call = Call(target, args, dict(kwargs), self.node)
        masses = call.leaves(Mass)
        rule = self._rule(target)
        if any(mass.data for mass in masses) or (any(mass.params for mass in masses) and rule.keeps_weights(call)):
            return self.barrier(call) if self.node in self._cut else rule.mass(self, call)
        try:
            return pytree.tree_map_only(Tensor, self.constant, self.real_node(self.node))
        except NotConstantError:
            return self.inputs(call.output)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.constant(value) if isinstance(value, Tensor) else value

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.sinks += [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Mass)]

    def _parameter(self, name: str) -> Mass:
        values = self.power(self._parameters[name].detach())
        visit = self._on_gradient
        if visit is not None:
            values.requires_grad_(True)

            def hand_over(leaf: Tensor) -> None:  # must not refer to the flow: autograd's cycles are never collected
                gradient, leaf.grad = leaf.grad, None
                assert gradient is not None
                visit(name, gradient)

            values.register_post_accumulate_grad_hook(hand_over)
        return Mass(values, zero=self.exponent_of(values) == NOTHING, params=True)

    def inputs(self, output: Any) -> Any:
        """Inputs of the network in the shape of ``output`` (the fake tensors of a node): masses of one."""

        def one(fake: Tensor) -> Mass:
            layout = _FAST_LAYOUT.get(fake.ndim, torch.contiguous_format)
            ones = torch.ones(fake.shape, dtype=self.dtype, device=self.device)
            return Mass(ones.contiguous(memory_format=layout), data=True)

        return pytree.tree_map_only(Tensor, one, output)

    # -- what operations call --------------------------------------------------------------------------------------

    def power(self, value: Any) -> Any:
        """``|value|^q``, of a number or a tensor (in the dtype of the masses)."""
        if not isinstance(value, Tensor):
            return abs(value) ** self.exponent_q
        value = value if value.layout == torch.strided else value.to_dense()
        value = value.abs() if value.is_complex() else value
        layout = _FAST_LAYOUT.get(value.ndim, torch.preserve_format)
        copy = value.detach().to(self.device, self.dtype, copy=True, memory_format=layout)
        return copy.square_() if self.exponent_q == 2 else copy.abs_().pow_(self.exponent_q)

    def constant(self, tensor: Tensor) -> Mass:
        """A tensor that depends on no input: its entries are edges of fixed weight; infinite ones are none."""
        values = self.power(tensor)
        if bool(values.isinf().any()):
            values = values.masked_fill(values.isinf(), 0.0)
        return Mass(values, zero=self.exponent_of(values) == NOTHING)

    def number(self, value: Any) -> Mass:
        """A Python number as a constant; one that depends on the input counts as a new input, of mass one."""
        known = plain(value)
        return self.constant(torch.tensor(1.0 if known is None else known, dtype=torch.float64))

    def real(self, mass: Mass) -> Tensor:
        """The true values, in float64, of something that does not depend on the network's input."""
        assert mass.node is not None
        value: Tensor = self.real_node(mass.node)
        return value.detach().to(self.device, torch.float64)

    def result(self, parents: list[Mass], values: Tensor, exponent: int) -> Mass:
        """A computed mass; its values are brought back near one where they drift away."""
        top = self.exponent_of(values)
        if top != NOTHING and abs(top) > _HEADROOM[self.dtype]:
            values, exponent = self.shifted(values, -top), exponent + top
        data, params = any(parent.data for parent in parents), any(parent.params for parent in parents)
        return Mass(values, exponent, top == NOTHING, data, params)

    def linear(self, call: Call) -> Any:
        """Run an operation that is linear in all its operands together, on masses brought to one exponent."""
        parents = call.leaves(Mass)
        exponent = self.common(parents)

        def convert(leaf: Any) -> Any:
            return self.shifted(leaf.values, leaf.exponent - exponent) if isinstance(leaf, Mass) else leaf

        return pytree.tree_map_only(Tensor, lambda values: self.result(parents, values, exponent), call.run(convert))

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
        """Both factors of a product; where both are activations that paths come through, those of the gate end there.

        A weight times a gate is still a weight: its edges continue the paths of the other factor.
        """
        if self.node not in self._kept or not all(mass.data and mass.params for mass in (a, b)):
            return a, b
        return (self.barrier_input(a), b) if self._kept[self.node] else (a, self.barrier_input(b))

    def gradient_only(self, weight: Mass, factor: Tensor) -> Tensor:
        """Zero in value; its derivative with respect to the weight's mass is ``factor``.

        For a constant edge whose value mixes parameters: each parameter sees its own derivative of it.
        """
        return (weight.values - weight.values.detach()) * factor.to(weight.values)

    @staticmethod
    def exponent_of(values: Tensor) -> int:
        """The power of two just above the largest value."""
        top = float(values.detach().amax()) if values.numel() else 0.0
        return math.frexp(top)[1] if top else NOTHING

    @staticmethod
    def shifted(values: Tensor, shift: int) -> Tensor:
        """``values * 2**shift``; what leaves the floating-point range is out of sight of its neighbours anyway."""
        return values * math.ldexp(1.0, max(min(shift, 1000), -1074)) if shift else values

    @staticmethod
    def common(masses: list[Mass]) -> int:
        """The exponent at which masses are added: the largest of those that are not zero."""
        largest = max(mass.magnitude for mass in masses)
        return largest if largest != NOTHING else masses[0].exponent
