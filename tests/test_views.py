"""The neuron graph as a sparse matrix and as networkx graphs."""

import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath

from networks import Net, RandomNet, ScalarGraph

seeds = st.integers(0, 2**31 - 1)
NORMS = {
    "l1": lambda values: np.abs(values).sum(),
    "l2": lambda values: math.sqrt(np.square(values).sum()),
    "max": lambda values: np.abs(values).max(),
    "count": len,
}


class ChannelGraph(ScalarGraph):
    """Which neurons every layer reads, from the graph of scalar activations."""

    def __init__(self, net: RandomNet) -> None:
        self.neuron: dict[int, int] = {}
        self.count = 0
        self.elements: dict[tuple[int, int], dict[tuple, float]] = {}
        super().__init__(net)

    def feeding(self, node: int | None) -> set[int]:
        if node in self.neuron:
            return {self.neuron[node]}
        if node is None or node not in self.into:
            return set()
        return set().union(*(self.feeding(source) for source, _, _ in self.into[node]))

    def _layer(self, result: np.ndarray, reads: list[list[tuple]]) -> np.ndarray:
        for channel, (row, found) in enumerate(zip(result, reads, strict=True)):
            neuron = self.count + channel
            self.neuron |= dict.fromkeys(np.ravel(row).tolist(), neuron)
            for sources, key, value in found:
                for source in set().union(*map(self.feeding, np.ravel(sources).tolist())):
                    self.elements.setdefault((neuron, source), {})[key] = value
        self.count += len(result)
        return result

    def _Linear(self, layer, x):
        weight = layer.weight.detach().numpy()
        reads = [[(x[i], (layer, j, i), weight[j, i]) for i in range(len(x))] for j in range(len(weight))]
        return self._layer(super()._Linear(layer, x), reads)

    def _Conv2d(self, layer, x):
        weight = layer.weight.detach().numpy()
        per_group, out_per_group = weight.shape[1], len(weight) // layer.groups
        reads = [
            [
                (x[o // out_per_group * per_group + i], (layer, o, i, a, b), weight[o, i, a, b])
                for i, a, b in itertools.product(*map(range, weight.shape[1:]))
            ]
            for o in range(len(weight))
        ]
        return self._layer(super()._Conv2d(layer, x), reads)

    def _BatchNorm2d(self, layer, x):
        gain = (layer.weight / (layer.running_var + layer.eps).sqrt()).tolist()
        reads = [[(x[channel], (layer, channel), value)] for channel, value in enumerate(gain)]
        return self._layer(super()._BatchNorm2d(layer, x), reads)


@settings(max_examples=40)
@given(seeds)
def test_adjacency_is_the_norm_of_the_elements_between_two_neurons(seed):
    net = RandomNet(seed, 5).double()
    truth = ChannelGraph(net)
    graph = dagpath.trace(net, net.example()).graph
    assert graph.num_neurons == truth.count
    for weight, norm in NORMS.items():
        expected = np.zeros((truth.count, truth.count))
        for (dst, src), elements in truth.elements.items():
            expected[dst, src] = norm(list(elements.values()))
        found = graph.adjacency(weight)
        assert found.layout == torch.sparse_csr
        torch.testing.assert_close(found.to_dense(), torch.from_numpy(expected), rtol=1e-12, atol=0)


@settings(max_examples=40)
@given(seeds)
def test_the_longest_path_of_the_networkx_graph_is_the_heaviest_path(seed):
    net = RandomNet(seed, 3).double()
    traced = dagpath.trace(net, net.example())
    graph = traced.graph.to_networkx("neuron", weight="max")
    assert nx.is_directed_acyclic_graph(graph)
    heaviest = heaviest_path(graph)
    log_value = sum(math.log(graph.edges[edge]["weight"]) for edge in itertools.pairwise(heaviest))
    (top,) = dagpath.top_paths(traced, 1, progress=False)
    assert log_value >= top.log_value - 1e-9
    if "output" in heaviest and log_value == pytest.approx(top.log_value):
        assert [node for node in heaviest if graph.nodes[node]["role"] not in ("join", "output")] == list(top.neurons)


def heaviest_path(graph: nx.DiGraph) -> list[str]:
    """The heaviest way from a source to the output, by networkx: logarithms may be negative, so each edge gets more."""
    graph = graph.subgraph({"output"} | nx.ancestors(graph, "output"))
    sources = [node for node, degree in graph.in_degree if degree == 0]
    logs = nx.DiGraph()
    for u, v, weight in graph.edges(data="weight"):
        logs.add_edge(u, v, log=math.log(weight) if weight else -1e6)
    depth = dict.fromkeys(sources, 0.0)
    for node in nx.topological_sort(logs):
        depth.setdefault(node, max((depth[u] + 1 for u in logs.predecessors(node)), default=0))
    for u, v, data in logs.edges(data=True):
        data["log"] += 1e7 * (depth[v] - depth[u])  # adds up to the same over every way from a source to the output
    return nx.dag_longest_path(logs, "log")


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        plain = stride == 1 and channels == width
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet20(nn.Module):
    """The ResNet-20 of CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*[Block(*shape) for shape in shapes])
        self.head = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def resnet20() -> dagpath.TracedModel:
    return dagpath.trace(ResNet20().double().eval(), torch.zeros(1, 3, 32, 32, dtype=torch.float64))


def test_networkx_finds_what_every_path_of_a_resnet_crosses(resnet20):
    graph = resnet20.graph.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    graph.remove_node("(1)")
    dominators = nx.immediate_dominators(graph, "x")
    crossed, node = ["output"], "output"
    while node != "x":
        node = dominators[node]
        crossed.append(node)
    every_stream = [f"blocks.{index}.add" for index in range(9)]
    assert crossed[::-1] == ["x", "conv", "bn", *every_stream, "mean", "head", "output"]
    neurons = resnet20.graph.to_networkx("neuron")
    neurons.remove_node("(1)")
    dominators = nx.immediate_dominators(neurons, "x")
    assert all(dominators[f"blocks.4.bn2.{c}"] == f"blocks.4.conv2.{c}" for c in range(32))
    assert dominators["output"] == "x"  # sixteen channels side by side: none of them is crossed by all paths


def test_networkx_finds_the_heaviest_path_of_a_resnet(resnet20):
    graph = resnet20.graph.to_networkx("neuron", weight="max")
    graph.remove_node("(1)")
    heaviest = heaviest_path(graph)
    log_value = sum(math.log(graph.edges[edge]["weight"]) for edge in itertools.pairwise(heaviest))
    paths = dagpath.top_paths(resnet20, 200, progress=False)
    first = next(path for path in paths if path.neurons[0] == "x")
    assert log_value == pytest.approx(first.log_value, rel=1e-12)
    assert [node for node in heaviest if graph.nodes[node]["role"] not in ("join", "output")] == list(first.neurons)


def test_networkx_finds_the_narrowest_cut_of_a_resnet(resnet20):
    graph = resnet20.graph.to_networkx("neuron")
    graph.remove_node("(1)")
    assert nx.node_connectivity(graph, "x", "output") == 10
    graph.remove_nodes_from([f"head.{index}" for index in range(10)])
    graph.add_edges_from((f"blocks.8.add.{channel}", "features") for channel in range(64))
    cut = nx.minimum_node_cut(graph, "x", "features")
    assert len(cut) == 16
    assert {graph.nodes[node]["module"].split(".")[0] for node in cut} <= {"conv", "bn", "blocks"}


def test_nodes_have_what_a_person_reads():
    net = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    traced = dagpath.trace(net, torch.zeros(1, 3))
    mass = torch.arange(7.0)
    layer = traced.graph.to_networkx(mass=mass)
    roles = nx.get_node_attributes(layer, "role")
    assert roles == {
        "(1)": "constant",
        "input": "input",
        "0": "hidden",
        "1.sigmoid": "barrier",
        "2": "hidden",
        "4": "hidden",
        "output": "output",
    }
    assert {name: layer.nodes[name].get("mass") for name in ("0", "2", "4", "input")} == {
        "0": 1.0,
        "2": 14.0,
        "4": 6.0,
        "input": None,
    }
    assert layer.nodes["2"]["size"] == layer.nodes["2"]["free"] == 4
    assert layer.edges["2", "4"]["elements"] == 4
    assert layer.edges["2", "4"]["parameters"] == ("4.weight",)
    neuron = traced.graph.to_networkx("neuron", mass=mass)
    assert neuron.nodes["2.3"] == {
        "module": "2",
        "operation": "linear",
        "role": "hidden",
        "channel": 3,
        "group": 4,
        "mass": 5.0,
    }
    assert neuron.edges["2.3", "4.0"]["weight"] == pytest.approx(abs(net[4].weight[0, 3].item()))
    assert neuron.edges["(1)", "2.3"]["parameters"] == ("2.bias",)


def test_layers_of_one_module_have_names_of_their_own():
    twice = Net(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Linear(2, 2))
    assert {"a", "a#2"} <= set(dagpath.trace(twice, torch.zeros(1, 2)).graph.to_networkx())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda graph: graph.adjacency("l3"), "weight must be one of 'l2', 'l1', 'max', 'count', got 'l3'"),
        (lambda graph: graph.to_networkx("channel"), "level must be 'layer' or 'neuron', got 'channel'"),
        (lambda graph: graph.to_networkx(weight="l3"), "got 'l3'"),
        (lambda graph: graph.to_networkx(mass=torch.ones(2)), r"one entry for each of 1 neurons, got \(2,\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(dagpath.trace(nn.Linear(1, 1), torch.zeros(1, 1)).graph)
