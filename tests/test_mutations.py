"""Wrong rules are noticed: in every rule of the registry, one fact after the other is planted wrong."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_fetched import assert_same_quantities
from torch import Tensor, fx

import dagpath
from dagpath.graph import NeuronGraph
from dagpath.ops import Operation
from dagpath.passes.edges import EdgeFlow
from dagpath.rules import base
from dagpath.trace import neurons_of

from mutants import EDGES, MASSES, NEURONS
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

FACTS = {"neurons": NEURONS, "mass": MASSES, "edges": EDGES}
METHODS = {"neurons": "neurons", "mass": "paths", "edges": "paths"}
"""Where a rule says each of them: what it says of paths is read by a pass over masses and by one over edges."""

_MOST = 14
"""Networks that the mutants of a rule meet, about, if most networks use it."""

_LARGE = "constants of every kind"
"""A network that is there for its neurons: it has many paths."""

_NEVER_CALLED = {"Compound of _pad_circular": "what it stands for is replaced by what PyTorch makes it of"}

_FIXED = "what enters is fixed, so its numbers mean what those of a constant do"
_ALREADY = "the rule fixes what enters"
_ALIKE = "every entry is a new input there"
EQUIVALENT = {
    ("Unknown of _log_softmax", "neurons", "numbers of the first operand"): _FIXED,
    ("Clamp of clamp", "neurons", "numbers of the first operand"): _FIXED,
    ("MaskedFill of masked_fill", "neurons", "numbers of the first operand"): _FIXED,
    ("NanToNum of nan_to_num", "neurons", "numbers of the first operand"): _FIXED,
    ("Quotient of div", "neurons", "numbers of the first operand"): _FIXED,
    ("Scan of cumsum", "neurons", "numbers of the first operand"): "all numbers along the axis are tied",
    ("Unknown of _log_softmax", "neurons", "operands fixed"): _ALREADY,
    ("Unknown of view.dtype", "neurons", "operands fixed"): _ALREADY,
    ("Unknown of view.dtype", "neurons", "numbers of the first operand"): _FIXED,
    ("Unknown of view.dtype", "edges", "turned along channels"): _ALIKE,
    ("Unknown of view.dtype", "edges", "turned along the last axis"): _ALIKE,
    ("Normalization of _batch_norm_no_update", "neurons", "operands fixed"): _ALREADY,
    ("Normalization of layer_norm", "neurons", "operands fixed"): _ALREADY,
    ("NanToNum of nan_to_num", "edges", "gates of a sum forgotten"): "of numbers it is the identity",
    ("Index of gather", "mass", "second operand forgotten"): "paths end at computed indices: their masses are not used",
    ("Index of gather", "mass", "second operand twice"): "paths end at computed indices: their masses are not used",
}
"""Mutants that no property can catch, since they say the same in other words: rule, fact, mutant -> why."""


@dataclass(frozen=True, eq=False)
class Network:
    """A traced network, what is known of it, and what its rules say of it now.

    Attributes:
        name: of the network.
        traced: as it is.
        scaled: with parameters so large that masses travel with powers of two.
        probed: a sigmoid reads every activation, so paths end everywhere.
        inputs: example inputs.
        groups: how many scale groups are free.
    """

    name: str
    traced: dagpath.TracedModel
    scaled: dagpath.TracedModel
    probed: dagpath.TracedModel
    inputs: tuple[Tensor, ...]
    groups: int

    @functools.cached_property
    def rules(self) -> set[int]:
        nodes = self.traced.fx.graph.nodes
        return {id(base.operation_of(node.target)) for node in nodes if node.op == "call_function"}

    @functools.cached_property
    def unrolled(self) -> list[dict[str, Any]]:
        return [unrolled_quantities(traced.unroll()) for traced in (self.traced, self.scaled, self.probed)]

    @functools.cached_property
    def quantities(self) -> list[dict[str, Any]]:
        return [quantities(traced) for traced in (self.traced, self.probed)]

    @functools.cached_property
    def outputs(self) -> list[Tensor]:
        return outputs(self.traced.model, self.inputs, False)

    def run_neurons(self) -> NeuronGraph:
        """The graph of neurons, with the rules of now."""
        return neurons_of(self.traced.model, self.traced.captured)

    def check_neurons(self) -> None:
        """What is free, and that rescalings are exact."""
        neurons = self.run_neurons()
        ends = [end.flatten() for both in neurons.ends.values() for end in (both.dst, both.src)]
        assert int((torch.cat(ends).unique() > 0).sum()) == self.groups
        check_rescaling(dagpath.TracedModel(self.traced.model, self.traced.captured, neurons, 0.0), self.inputs)

    def run_mass(self) -> None:
        for traced in (self.traced, self.scaled, self.probed):
            dagpath.gram_diagonal(traced)

    def check_mass(self) -> None:
        """Path quantities are those of the unrolled graph."""
        for traced, expected in zip((self.traced, self.scaled, self.probed), self.unrolled, strict=True):
            assert_agree(quantities(traced), expected)

    def run_edges(self) -> None:
        for traced in (self.traced, self.probed):
            parameters = dict(traced.model.named_parameters())
            graph = traced.captured.eval
            EdgeFlow(graph, parameters, base.operation_of, traced.graph.cut, traced.graph.kept).run_graph()

    def check_edges(self) -> None:
        """The unrolled graph has the path quantities of the passes, and its paths are the function."""
        for traced, expected in zip((self.traced, self.probed), self.quantities, strict=True):
            assert_agree(unrolled_quantities(traced.unroll()), expected)
        if not self.unrolled[0]["cut"] and in_float64(self.traced):
            check_realization(self.traced, self.inputs, self.outputs)

    def run(self, fact: str) -> None:
        {"neurons": self.run_neurons, "mass": self.run_mass, "edges": self.run_edges}[fact]()

    def check(self, fact: str) -> None:
        {"neurons": self.check_neurons, "mass": self.check_mass, "edges": self.check_edges}[fact]()


def scaled(traced: dagpath.TracedModel) -> dagpath.TracedModel:
    """The same network with larger parameters."""
    model = copy.deepcopy(traced.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0**45)
    return dagpath.TracedModel(model, traced.captured, traced.graph, 0.0)


def probed(traced: dagpath.TracedModel) -> dagpath.TracedModel:
    """The same network, every activation of which a sigmoid reads."""
    graph, known = fx.Graph(), {}
    result = graph.graph_copy(traced.fx.graph, known)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            with graph.inserting_after(node):
                graph.call_function(torch.ops.aten.sigmoid.default, (node,)).meta = dict(node.meta)
    graph.output(result)
    captured = replace(traced.captured.eval, module=fx.GraphModule(traced.fx, graph))
    both = replace(traced.captured, eval=captured)
    return dagpath.TracedModel(traced.model, both, neurons_of(traced.model, both), 0.0)


@functools.cache
def networks() -> list[Network]:
    found = []
    for name, case in CASES.items():
        net, inputs = case.build()
        traced = dagpath.trace(net, inputs)
        found.append(Network(name, traced, scaled(traced), probed(traced), inputs, case.groups))
    return found


def networks_of(rule: Operation, fact: str) -> list[Network]:
    """The networks that use a rule; some of them, if most networks do."""
    found = [network for network in networks() if id(rule) in network.rules]
    if len(found) > len(networks()) // 2:
        found = found[:: len(found) // _MOST]
    return [network for network in found if fact == "neurons" or network.name != _LARGE]


def rules() -> dict[str, Operation]:
    """The distinct rules of the registry, by the first name of each."""
    found: dict[int, tuple[str, Operation]] = {}
    for name, rule in dagpath.ops.registered().items():
        if "::" in name:  # of somebody else: other tests register such
            continue
        found.setdefault(id(rule), (f"{type(rule).__name__} of {name}", rule))
    return dict(found.values())


Rule = Callable[[Any, Any], Any]


def in_place_of(rule: Operation, fact: str, answer: Rule) -> dict[str, Operation]:
    """The registry with a rule that gives other answers about one fact."""
    other = copy.copy(rule)
    setattr(other, METHODS[fact], answer)
    return {name: other if known is rule else known for name, known in base._REGISTRY.items()}


def planted(monkeypatch, network: Network, rule: Operation, fact: str) -> set[str]:
    """The mutants that change an answer somewhere in a network: all are asked, none is believed."""
    answer, found = getattr(rule, METHODS[fact]), set()

    def asked(flow, call):
        for name, mutant in FACTS[fact].items():
            try:
                _, changed = mutant(answer, flow, call)
            except Exception:
                changed = True
            if changed:
                found.add(name)
        return answer(flow, call)

    with monkeypatch.context() as patch:
        patch.setattr(base, "_REGISTRY", in_place_of(rule, fact, asked))
        network.run(fact)
    return found


def is_caught(monkeypatch, network: Network, rule: Operation, fact: str, name: str) -> bool:
    """Does a property fail where a mutant answers for the rule?"""
    answer, mutant = getattr(rule, METHODS[fact]), FACTS[fact][name]
    if fact != "neurons":
        assert network.unrolled  # by the true rules
        assert network.quantities
        assert network.outputs
    with monkeypatch.context() as patch:
        patch.setattr(base, "_REGISTRY", in_place_of(rule, fact, lambda flow, call: mutant(answer, flow, call)[0]))
        try:
            network.check(fact)
        except Exception:
            return True
    return False


def fates(monkeypatch, rule: Operation, fact: str) -> dict[str, bool]:
    """Which mutants of a rule are caught, of those that change any answer."""
    found: dict[str, bool] = {}
    for network in networks_of(rule, fact):
        for name in planted(monkeypatch, network, rule, fact):
            if not found.get(name):
                found[name] = is_caught(monkeypatch, network, rule, fact, name)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_property_holds_for_the_networks_of_the_rules(name):
    network = next(network for network in networks() if network.name == name)
    for fact in FACTS if name != _LARGE else ["neurons"]:
        network.check(fact)
    if name != _LARGE:
        assert_same_quantities(network.traced)


def test_every_rule_is_exercised():
    used = set().union(*(network.rules for network in networks()))
    assert {label for label, rule in rules().items() if id(rule) not in used} == set(_NEVER_CALLED)


def test_wrong_rules_are_caught(monkeypatch):
    found = {
        (label, fact, name): caught
        for label, rule in rules().items()
        for fact in FACTS
        for name, caught in fates(monkeypatch, rule, fact).items()
    }
    missed = {mutant for mutant, caught in found.items() if not caught}
    assert len(found) > 1000
    assert sum(found.values()) / len(found) >= 0.9
    assert missed <= set(EQUIVALENT), missed - set(EQUIVALENT)
