"""Masses of what is computed from parameters and constants alone: what an edge through each entry carries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.capture.graph import CapturedGraph
from dagpath.passes.constants import _OF_A_SHAPE, NotConstantError
from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import Call, Mass, ldexp_, leaves, mapped

_POWERS = (1, 2)
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Magnitudes:
    """What the edges in each entry of a weight carry together.

    Attributes:
        sums: for q = 1 and q = 2, the sum of ``|w|^q`` over the parallel edges of each entry, float64.
    """

    sums: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, values: Tensor) -> Magnitudes:
        """One edge in each entry."""
        magnitudes = values.detach().to("cpu", torch.float64).abs()
        return cls((magnitudes, magnitudes.square()))

    @property
    def are_single(self) -> bool:
        """Is there at most one edge in each entry?"""
        first, second = self.sums
        return bool(((first.square() - second).abs() <= _ROUNDING * second).all())

    def changed(self, change: Callable[[Tensor], Tensor]) -> Magnitudes:
        """The magnitudes of other entries: both tensors changed alike."""
        first, second = self.sums
        return Magnitudes((change(first), change(second)))


class WeightMasses:
    """Runs the part of a captured graph that depends on no input on masses of the powers 1 and 2, as far as asked.

    Args:
        graph: the eval graph of a model.
        parameters: the parameters' values by name.
        rule: finds the rule of a call's target.
        cut: calls through which no path goes.
        kept: which factor paths go through, for calls that multiply two activations.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        rule: Callable[[Any], Any],
        cut: Container[fx.Node],
        kept: Mapping[fx.Node, int],
    ) -> None:
        self._rule = rule
        self._flows = [PowerFlow(graph, parameters, rule, cut, kept, power=power) for power in _POWERS]
        inputless: set[fx.Node] = set()
        for node in graph.module.graph.nodes:
            given = node.op == "get_attr" or node.name in graph.parameters or node.name in graph.tensors
            given = given or node.target in _OF_A_SHAPE
            if given or (node.op == "call_function" and all(used in inputless for used in node.all_input_nodes)):
                inputless.add(node)
        self._inputless = inputless

    def is_inputless(self, node: fx.Node) -> bool:
        """Does it depend on no input of the model?"""
        return node in self._inputless

    def are_edges(self, node: fx.Node) -> bool:
        """Is what a node makes of parameters, and perhaps of gates, a weight through which paths go?

        Else it is a constant to them.
        """
        return any(mass.params for mass in leaves(self._mass(self._flows[0], node), Mass))

    def are_constants(self, node: fx.Node) -> bool:
        """Is what a node makes of parameters a constant to paths?"""
        return not any(mass.params or mass.data for mass in leaves(self._mass(self._flows[0], node), Mass))

    def mass(self, node: fx.Node, power: float) -> Mass | None:
        """The mass of a weight; None for what is none, and for other powers than 1 and 2."""
        if power not in _POWERS or node not in self._inputless:
            return None
        mass = self._mass(self._flows[_POWERS.index(int(power))], node)
        return mass.made if isinstance(mass, Mass) and mass.params else None

    def __call__(self, node: fx.Node) -> Magnitudes:
        """The magnitudes of a weight, of its shape."""
        first, second = (_plain(self._mass(flow, node)) for flow in self._flows)
        return Magnitudes((first, second))

    def alone(self, node: fx.Node, operand: fx.Node, occurrence: int) -> Magnitudes:
        """The part of a weight that one operand of its call makes, where it is given for the n-th time.

        The other operands are zero.
        """
        first, second = (_plain(self._alone(flow, node, operand, occurrence)) for flow in self._flows)
        return Magnitudes((first, second))

    def _mass(self, flow: PowerFlow, node: fx.Node) -> Any:
        if node not in flow.env and node.target in _OF_A_SHAPE:
            flow.env[node] = flow.evaluated(node)
        if node not in flow.env:
            for operand in node.all_input_nodes:
                self._mass(flow, operand)
            flow.env[node] = flow.run_node(node)
        return flow.env[node]

    def _alone(self, flow: PowerFlow, node: fx.Node, operand: fx.Node, occurrence: int) -> Any:
        met = itertools.count()
        for used in node.all_input_nodes:
            self._mass(flow, used)

        def given(used: fx.Node) -> Any:
            if used is operand and next(met) == occurrence:
                return flow.env[used]
            return mapped(flow.env[used], Mass, lambda mass: _zero(mass.made))

        flow.node = node
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), given)
        return self._rule(node.target).paths(flow, Call(node.target, args, kwargs, node))  # type: ignore[arg-type]


def _zero(mass: Mass) -> Mass:
    return replace(mass, values=torch.zeros_like(mass.values), zero=True)


def _plain(mass: Any) -> Tensor:
    if not isinstance(mass, Mass):
        raise NotConstantError("no weight")
    return ldexp_(mass.values.detach().to("cpu", torch.float64, copy=True), mass.log2_scale)
