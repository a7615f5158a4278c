"""Wrong rules are noticed: in every rule of the registry, one fact after the other is planted wrong."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dagpath
from dagpath.capture import CapturedGraph
from dagpath.flow.neurons import NeuronFlow
from dagpath.graph import NeuronGraph
from dagpath.ops import Operation, base
from dagpath.state import plain_computation

from mutants import EDGES, MASSES, NEURONS, Mutant
from properties import (
    assert_agree,
    check_realization,
    check_rescaling,
    in_float64,
    outputs,
    quantities,
    unrolled_quantities,
)
from rule_networks import CASES

_MOST = 10
"""Networks that a mutant meets, about."""

FACTS = {"neurons": NEURONS, "mass": MASSES, "edges": EDGES}


@dataclass(frozen=True, eq=False)
class Network:
    """A traced network, and what is known of it."""

    name: str
    traced: dagpath.TracedModel
    variants: list[dagpath.TracedModel]
    inputs: tuple[Tensor, ...]
    groups: int

    @functools.cached_property
    def rules(self) -> set[int]:
        nodes = self.traced.fx.graph.nodes
        return {id(base.operation_of(node.target)) for node in nodes if node.op == "call_function"}

    @functools.cached_property
    def unrolled(self) -> list[dict[str, Any]]:
        return [unrolled_quantities(traced) for traced in self.variants]

    @functools.cached_property
    def quantities(self) -> list[dict[str, Any]]:
        return [quantities(traced) for traced in self.variants]

    @functools.cached_property
    def outputs(self) -> list[Tensor]:
        return outputs(self.traced.model, self.inputs, False)

    def check_neurons(self, planted: Callable[[], bool]) -> None:
        """The numbers of neurons again, with the rules of now: what is free, and that rescalings are exact."""
        captured = self.traced.captured
        neurons = neurons_of(self.traced.model, captured.eval, *([] if captured.train is None else [captured.train]))
        if planted():
            ends = [end.flatten() for both in neurons.ends.values() for end in (both.dst, both.src)]
            assert int((torch.cat(ends).unique() > 0).sum()) == self.groups
            check_rescaling(dagpath.TracedModel(self.traced.model, captured, neurons, 0.0), self.inputs)

    def check_mass(self, planted: Callable[[], bool]) -> None:
        for traced, expected in zip(self.variants, self.unrolled, strict=True):
            dagpath.path_norm(traced, 3, log=True)
            if planted():
                assert_agree(quantities(traced), expected)

    def check_edges(self, planted: Callable[[], bool]) -> None:
        for traced, expected in zip(self.variants, self.quantities, strict=True):
            found = unrolled_quantities(traced)
            if planted():
                assert_agree(found, expected)
        if planted() and not self.unrolled[0]["cut"] and in_float64(self.traced):
            check_realization(self.traced, self.inputs, self.outputs)


@plain_computation()
def neurons_of(model: nn.Module, *graphs: CapturedGraph) -> NeuronGraph:
    """The numbers of neurons, with the rules of now."""
    flow = NeuronFlow(model, base.operation_of, base.Unknown)
    for graph in graphs:
        flow.run_graph(graph)
    return NeuronGraph(flow, lambda: None)


def scaled(traced: dagpath.TracedModel) -> dagpath.TracedModel:
    """The same network with larger parameters: masses beyond what travels without an exponent."""
    model = copy.deepcopy(traced.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0**45)
    return dagpath.TracedModel(model, traced.captured, traced.graph, 0.0)


def probed(traced: dagpath.TracedModel) -> dagpath.TracedModel:
    """The same network, of which a sigmoid reads every activation: paths end everywhere."""
    graph, known = fx.Graph(), {}
    result = graph.graph_copy(traced.fx.graph, known)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            with graph.inserting_after(node):
                graph.call_function(torch.ops.aten.sigmoid.default, (node,)).meta = dict(node.meta)
    graph.output(result)
    captured = replace(traced.captured.eval, module=fx.GraphModule(traced.fx, graph))
    neurons = neurons_of(traced.model, captured)
    return dagpath.TracedModel(traced.model, replace(traced.captured, eval=captured), neurons, 0.0)


@functools.cache
def networks() -> list[Network]:
    found = []
    for name, case in CASES.items():
        net, inputs = case.build()
        traced = dagpath.trace(net, inputs)
        variants = [traced, scaled(traced), probed(traced)]
        found.append(Network(name, traced, variants, inputs, case.groups))
    return found


def rules() -> dict[str, Operation]:
    """The distinct rules of the registry, by the first name of each."""
    found: dict[int, tuple[str, Operation]] = {}
    for name, rule in dagpath.ops.registered().items():
        found.setdefault(id(rule), (f"{type(rule).__name__} of {name}", rule))
    return dict(found.values())


def networks_of(rule: Operation) -> list[Network]:
    """The networks that use a rule; of many, some from all over the list."""
    found = [network for network in networks() if id(rule) in network.rules]
    return found[:: max(1, len(found) // _MOST)]


def is_caught(monkeypatch, rule: Operation, fact: str, mutant: Mutant) -> bool | None:
    """Does a property fail for a network that uses the rule? None if the mutant changes no answer anywhere."""
    planted = False
    answer = getattr(rule, fact)

    def wrong(flow, call):
        nonlocal planted
        result, changed = mutant(answer, flow, call)
        planted |= changed
        return result

    other = copy.copy(rule)
    setattr(other, fact, wrong)
    registry = {name: other if known is rule else known for name, known in base._REGISTRY.items()}
    with monkeypatch.context() as patch:
        for network in networks_of(rule):
            assert network.unrolled
            assert network.quantities
            assert network.outputs
            patch.setattr(base, "_REGISTRY", registry)
            try:
                getattr(network, f"check_{fact}")(lambda: planted)
            except Exception:
                if planted:
                    return True
                raise
            finally:
                patch.undo()
    return False if planted else None
