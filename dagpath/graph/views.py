"""A network's structure as sparse matrices and as networkx graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from dagpath.passes.sparse import csr_tensor
from dagpath.passes.structure import Edges, Structure

WEIGHTS = ("l2", "l1", "max", "count")


@dataclass(frozen=True)
class Layer:
    """Nodes that one call made: neurons, joins, or what stands for an input, an output or a barrier.

    Attributes:
        label: a readable name, unique in the network.
        module: path of the module that made the call.
        operation: name of the ATen operation.
        role: ``"hidden"``, ``"join"``, ``"input"``, ``"output"``, ``"barrier"`` or ``"constant"``.
        start: its first node.
        count: number of nodes.
    """

    label: str
    module: str
    operation: str
    role: str
    start: int
    count: int

    def name(self, channel: int) -> str:
        """The name of one node."""
        return f"{self.label}.{channel}" if self.count > 1 or self.role in ("hidden", "join") else self.label


def require_weight(weight: str) -> None:
    """Raise ValueError for an unknown norm."""
    if weight not in WEIGHTS:
        raise ValueError(f"weight must be one of {', '.join(map(repr, WEIGHTS))}, got {weight!r}")


def neurons_of(structure: Structure) -> np.ndarray:
    """The neuron that each node is, in the order of the graph's neurons; -1 for nodes that are none."""
    result, count = np.full(structure.num_nodes, -1), 0
    for segment in structure.segments:
        if segment.role == "hidden" and segment.again is None:
            result[segment.start : segment.start + segment.count] = np.arange(count, count + segment.count)
            count += segment.count
    for segment in structure.segments:
        if segment.again is not None:
            first = result[segment.again]
            result[segment.start : segment.start + segment.count] = np.arange(first, first + segment.count)
    return result


@dataclass(frozen=True)
class Bundle:
    """Edges between nodes, each with the norm of the parameter elements that it stands for. One-dimensional arrays."""

    dst: np.ndarray
    src: np.ndarray
    weight: np.ndarray
    elements: np.ndarray

    def rows(self) -> Iterator[tuple[int, int, float, int]]:
        """(source, destination, weight, number of elements) of each edge."""
        return zip(*(array.tolist() for array in (self.src, self.dst, self.weight, self.elements)), strict=True)


def _bundle(edges: Edges, weight: str) -> Bundle:
    """The edges of one parameter, those between the same two nodes taken together as far as they stand in a kernel.

    The weight is what adds up: a sum of squares for ``"l2"``.
    """
    shape = edges.values.shape
    ends = [end.reshape((1,) * (len(shape) - end.ndim) + tuple(end.shape)) for end in (edges.dst, edges.src)]
    kernel = [dim for dim in range(len(shape)) if all(end.shape[dim] == 1 for end in ends)]
    size = math.prod(shape[dim] for dim in kernel)
    values = edges.values.detach()
    if weight == "count":
        values = torch.ones_like(values)
    values = values.abs().to(torch.float64)
    values = values.square() if weight == "l2" else values
    if kernel:
        values = values.amax(kernel, keepdim=True) if weight == "max" else values.sum(kernel, keepdim=True)
    dst, src = (end.expand(values.shape).reshape(-1).numpy() for end in ends)
    known = (src >= 0) & (dst >= 0)
    flat = values.reshape(-1).cpu().numpy()[known]
    return Bundle(dst[known], src[known], flat, np.full(len(flat), size))


def adjacency(structure: Structure, weight: str, device: torch.device | str | None) -> Tensor:
    """See :meth:`dagpath.NeuronGraph.adjacency`."""
    require_weight(weight)
    neuron_of = neurons_of(structure)
    num_neurons = int(neuron_of.max(initial=-1)) + 1
    feeding = _feeding(structure, neuron_of, num_neurons)
    degree = np.diff(feeding.indptr)
    rows, columns, values = [], [], []
    for edges in structure.edges:
        bundle = _bundle(edges, weight)
        chosen = (neuron_of[bundle.dst] >= 0) & (degree[bundle.src] > 0)
        src, counts = bundle.src[chosen], degree[bundle.src[chosen]]
        starts = np.repeat(feeding.indptr[src] - np.cumsum(counts) + counts, counts)
        columns.append(feeding.indices[starts + np.arange(counts.sum())])
        rows.append(np.repeat(neuron_of[bundle.dst[chosen]].astype(np.int32), counts))
        values.append(np.repeat(bundle.weight[chosen], counts))
    row, column = (np.concatenate([np.zeros(0, np.int32), *parts]) for parts in (rows, columns))
    value = np.concatenate([np.zeros(0), *values])
    if weight == "max":
        row, column, value = _largest_of_equals(row, column, value, num_neurons)
    matrix = coo_array((value, (row, column)), shape=(num_neurons, num_neurons)).tocsr()
    matrix.sum_duplicates()
    data = np.sqrt(matrix.data) if weight == "l2" else matrix.data
    pointers, indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
    return csr_tensor(csr_array((data, indices, pointers), shape=matrix.shape), device)


def _feeding(structure: Structure, neuron_of: np.ndarray, num_neurons: int) -> csr_array:
    """[nodes, neurons]: the neurons whose values a node is made of without a parameter: itself, or those it joins."""
    nodes = np.flatnonzero(neuron_of >= 0)
    shape = (structure.num_nodes, num_neurons)
    step = csr_array((np.ones(len(nodes), bool), (nodes, neuron_of[nodes])), shape=shape)
    pairs = [(links.dst.numpy(), links.src.numpy()) for links in structure.links]
    dst, src = (np.concatenate([np.zeros(0, np.int64), *(pair[end] for pair in pairs)]) for end in (0, 1))
    joins = csr_array((np.ones(len(dst), bool), (dst, src)), shape=(structure.num_nodes, structure.num_nodes))
    result = step
    while step.nnz:
        step = joins @ step
        result = result + step
    return result


def _largest_of_equals(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not len(row):
        return row, column, value
    order = np.argsort(row.astype(np.int64) * size + column, kind="stable")
    row, column, value = row[order], column[order], value[order]
    first = np.flatnonzero(np.concatenate([[True], (np.diff(row) != 0) | (np.diff(column) != 0)]))
    return row[first], column[first], np.maximum.reduceat(value, first)


def to_networkx(
    structure: Structure,
    layers: Sequence[Layer],
    group_of: Tensor,
    level: str,
    weight: str,
    mass: Tensor | None,
) -> nx.DiGraph:
    """See :meth:`dagpath.NeuronGraph.to_networkx`."""
    if level not in ("layer", "neuron"):
        raise ValueError(f"level must be 'layer' or 'neuron', got {level!r}")
    require_weight(weight)
    neuron_of = neurons_of(structure)
    groups = _groups(structure, neuron_of, group_of.numpy())
    masses = np.zeros(structure.num_nodes)
    if mass is not None:
        neurons, first = np.unique(neuron_of, return_index=True)  # a neuron that is met again has its mass once
        masses[first[neurons >= 0]] = mass.cpu().numpy()[neurons[neurons >= 0]]
    layer_of = np.repeat(np.arange(len(layers)), [layer.count for layer in layers])
    graph = nx.DiGraph()
    if level == "neuron":
        names = [layer.name(channel) for layer in layers for channel in range(layer.count)]
    else:
        names = [layer.label for layer in layers]
    for layer in layers:
        facts = {"module": layer.module, "operation": layer.operation, "role": layer.role}
        nodes = slice(layer.start, layer.start + layer.count)
        if level == "layer":
            free = int(np.count_nonzero(groups[nodes]))
            graph.add_node(layer.label, **facts, size=layer.count, free=free)
            if layer.role == "hidden" and mass is not None:
                graph.nodes[layer.label]["mass"] = float(masses[nodes].sum())
            continue
        for channel, (group, share) in enumerate(zip(groups[nodes].tolist(), masses[nodes].tolist(), strict=True)):
            name = layer.name(channel)
            graph.add_node(name, **facts, channel=channel, group=group)
            if layer.role == "hidden" and mass is not None:
                graph.nodes[name]["mass"] = share
    for parameter, bundle in _bundles(structure, weight):
        found = bundle if level == "neuron" else _between(bundle, layer_of, weight)
        for source, target, value, elements in found.rows():
            _add_edge(graph, names[source], names[target], parameter, value, elements, weight)
    for _, _, data in graph.edges(data=True):
        data["weight"] = math.sqrt(data["weight"]) if weight == "l2" else data["weight"]
    unread = [
        node for node, role in graph.nodes(data="role") if role not in ("hidden", "join") and not graph.degree(node)
    ]
    graph.remove_nodes_from(unread)
    return graph


def _bundles(structure: Structure, weight: str) -> Iterator[tuple[str, Bundle]]:
    """(parameter, edges); the parameter is empty for edges without one, whose weight is their constant factor."""
    for edges in structure.edges:
        yield edges.parameter, _bundle(edges, weight)
    for links in (*structure.links, *structure.ends):
        factor = links.factor.numpy()
        factor = {"l2": factor**2, "count": np.ones_like(factor)}.get(weight, factor)
        yield "", Bundle(links.dst.numpy(), links.src.numpy(), factor, np.zeros(len(factor), np.int64))


def _between(bundle: Bundle, layer_of: np.ndarray, weight: str) -> Bundle:
    """Edges between neurons as edges between layers."""
    size = int(layer_of.max()) + 1
    pairs, inverse = np.unique(layer_of[bundle.dst] * size + layer_of[bundle.src], return_inverse=True)
    elements = np.bincount(inverse, bundle.elements, len(pairs)).astype(np.int64)
    total = np.zeros(len(pairs))
    (np.maximum if weight == "max" else np.add).at(total, inverse, bundle.weight)
    return Bundle(pairs // size, pairs % size, total, elements)


def _add_edge(
    graph: nx.DiGraph, source: str, target: str, parameter: str, value: float, elements: int, weight: str
) -> None:
    if not graph.has_edge(source, target):
        graph.add_edge(source, target, weight=value, elements=elements, parameters=(parameter,) if parameter else ())
        return
    data = graph.edges[source, target]
    data["weight"] = max(data["weight"], value) if weight == "max" else data["weight"] + value
    data["elements"] += elements
    if parameter and parameter not in data["parameters"]:
        data["parameters"] += (parameter,)


def _groups(structure: Structure, neuron_of: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """The scale group of each node: a join has that of what it joins."""
    groups = np.zeros(structure.num_nodes, np.int64)
    groups[neuron_of >= 0] = group_of[neuron_of[neuron_of >= 0]]
    for links in structure.links:
        groups[links.dst.numpy()] = np.maximum(groups[links.dst.numpy()], groups[links.src.numpy()])
    return groups
