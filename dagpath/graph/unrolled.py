"""The unrolled graph: one node per scalar activation, and every weight between two of them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx
import torch
from scipy import sparse
from torch import Tensor, fx
from tqdm.auto import tqdm

from dagpath.capture.graph import CapturedGraph
from dagpath.capture.site import Site, describe, site_of
from dagpath.errors import UnsupportedOpError
from dagpath.passes.blocks import Run
from dagpath.passes.edges import EdgeFlow, Layer, Source
from dagpath.passes.flattened import Flattened
from dagpath.passes.level_masses import Masses, backward_masses, forward_masses, squares_by_element
from dagpath.passes.paths import PathRule
from dagpath.passes.powers import checked_power
from dagpath.runtime.state import plain_computation
from dagpath.words import counted

_LIMB = 32
"""Bits of a digit of an exact count: sums of 2**31 digits fit into int64."""


@dataclass(frozen=True, repr=False)
class Level:
    """The nodes that the longest path reaches with the same number of edges.

    Attributes:
        nodes: their numbers, consecutive.
        weights: float64 sparse CSR tensor [len(nodes), num_nodes]: the edges into them.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> for level in dagpath.trace(net, torch.zeros(1, 2)).unroll().levels:
        ...     print(level)
        Level(nodes 0 to 2, 0 edges)
        Level(nodes 3 to 5, 6 edges)
        Level(nodes 6 to 8, 3 edges)
        Level(nodes 9 to 9, 4 edges)
    """

    nodes: range
    weights: Tensor

    def __repr__(self) -> str:
        edges = counted(self.weights.values().numel(), "edge")
        return f"Level(nodes {self.nodes.start} to {self.nodes.stop - 1}, {edges})"


@dataclass(frozen=True)
class Gates:
    """Which edges count only under a condition, and what says how open they are.

    Attributes:
        edges: the edges that have a gate, increasing.
        slots: the gate of each.
        read: read the values of all gates, one part after the other, off the values of the captured graph's nodes.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> gates = dagpath.trace(net, torch.zeros(1, 2)).unroll().gates
        >>> len(gates.edges)  # one edge into each ReLU
        3
    """

    edges: Tensor
    slots: Tensor
    read: list[Callable[[Mapping[fx.Node, Any]], Tensor]]


class UnrolledGraph:
    """The network as a graph of scalar activations. Made by :meth:`TracedModel.unroll`.

    A node is one entry of an activation of one example: channel and position, before and after a ReLU. Node 0 is the
    constant 1, from which biases come. An edge is a weight, a bias, the slope ``a = γ/sqrt(var+eps)`` or the shift
    ``c = β − mean·a`` of a frozen batch norm, 1/k into a mean over k entries, or 1 into a sum, an activation function
    or a maximum. Data movement makes no nodes. There is at most one edge from one node to another: parallel ones, such
    as two weights of a convolution that read the same reflected entry, go through copies of their source.

    A path leads from an input or the constant to an output. An operation that is not positively homogeneous cuts
    paths: what enters it ends them, what leaves it starts new ones. Weights are those at the time of unrolling.

    Attributes:
        num_nodes: how many nodes there are.
        num_edges: how many edges.
        num_parameters: number of elements of all parameters.
        shapes: parameter name -> shape, in the order of ``model.named_parameters()``.
        starts: int64 tensor; the nodes where paths start.
        ends: int64 tensor; the nodes where paths end, each as often as it is an output.
        outputs: the model's outputs, with int64 tensors of the nodes in their entries; -1 where an entry is always 0.
        gates: which edges have a gate.
        sources: where paths start, call by call, and what reads the values there.
        cuts: calls that cut paths, each a node of the captured graph.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(2.0), net[0].bias.zero_(), net[2].weight.fill_(5.0)
        >>> graph = dagpath.trace(net, torch.zeros(1, 1)).unroll()
        >>> [graph.name(node) for node in range(graph.num_nodes)]
        ['1', 'input[0]', '0 linear[0]', '0 linear[1]', '1 relu[0]', '1 relu[1]', '2 linear[0]']
        >>> graph.adjacency().to_dense()[-1]  # the output reads both ReLUs
        tensor([0., 0., 0., 0., 5., 5., 0.], dtype=torch.float64)
        >>> graph.path_norm(), graph.path_count()  # two paths of value 10, and two of the biases, which are zero
        (20.0, 4)
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        rule: Callable[[Any], PathRule],
        cut: frozenset[fx.Node],
        kept: Mapping[fx.Node, int],
        device: torch.device | str | None,
        progress: bool,
    ) -> None:
        calls = len(graph.module.graph.nodes)
        with tqdm(total=calls, desc="unrolling", unit="call", disable=not progress, leave=False) as bar:
            flow = EdgeFlow(graph, parameters, rule, cut, kept, on_node=bar.update)
            try:
                flow.run_graph()
            except NotImplementedError as error:
                reason = str(error).splitlines()[0]
                raise UnsupportedOpError(f"{describe(flow.node)} cannot be unrolled: {reason}") from error
        assembled = flow.blocks.assembled()
        self._runs: list[Run] = flow.blocks.runs
        self._weights = assembled.adjacency.to(device)
        self._derivative = assembled.derivative.to(device)
        self._bounds = assembled.levels
        self._numbers = assembled.numbers
        ids = assembled.ids
        self.shapes: dict[str, torch.Size] = {name: parameter.shape for name, parameter in parameters.items()}
        self.num_nodes = len(self._weights)
        self.num_edges = len(self._weights.columns)
        self.num_parameters = flow.num_elements
        self.sources = [Source(ids[source.numbers], source.read) for source in flow.sources]
        self.starts: Tensor = torch.cat([source.numbers for source in self.sources]).to(device)
        self.ends: Tensor = torch.cat([ids[:0], *(ids[numbers] for numbers in flow.sinks)]).to(device)
        leaves = list(flow.outputs)[len(flow.outputs) - graph.structure.num_leaves :]
        self.outputs: list[Any] = [ids[leaf] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.gates = Gates(assembled.gated, assembled.slots, flow.gates)
        self.cuts = flow.cuts

    def __repr__(self) -> str:
        nodes, edges = counted(self.num_nodes, "node"), counted(self.num_edges, "edge")
        return f"UnrolledGraph({nodes}, {edges}, {counted(len(self._bounds) - 1, 'level')})"

    @property
    def device(self) -> torch.device:
        """Where the sparse tensors are."""
        return self._weights.values.device

    # -- nodes -----------------------------------------------------------------------------------------------------

    @cached_property
    def _firsts(self) -> list[int]:
        return [run.first for run in self._runs]

    def _entry(self, node: int) -> tuple[Layer, int, str]:
        """What a node is an entry of, its place there, and what to add to its name; a copy is what it copies."""
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node must be from 0 to {self.num_nodes - 1}, got {node}")
        number = int(self._numbers[node])
        run = self._runs[bisect.bisect_right(self._firsts, number) - 1]
        if run.label is not None:
            return run.label, number - run.first, ""
        layer, place, suffix = self._entry(int(self._weights.columns[self._weights.span(node, node + 1).start]))
        return layer, place, f"{suffix} again"

    def site(self, node: int) -> Site:
        """The operation that computes a node, with its module and source line.

        Raises:
            ValueError: there is no such node.
        """
        layer, _, _ = self._entry(node)
        return Site("constant", "", "") if layer.node is None else site_of(layer.node)

    def index(self, node: int) -> tuple[int, ...]:
        """Where a node stands in the tensor that it is an entry of, as (example, channel, position ...).

        Raises:
            ValueError: there is no such node.
        """
        layer, place, _ = self._entry(node)
        return tuple(int(part) for part in torch.unravel_index(torch.tensor(place), layer.shape))

    def name(self, node: int) -> str:
        """A readable name of a node, such as ``layer1.0.conv1 conv2d[3, 5, 7]``: module, operation, channel, position.

        Raises:
            ValueError: there is no such node.
        """
        layer, _, suffix = self._entry(node)
        if layer.node is None:
            return f"1{suffix}"
        site, index = self.site(node), self.index(node)
        what = str(layer.node.target) if layer.node.op == "placeholder" else f"{site.module} {site.operation}".strip()
        role = f" {layer.role}" if layer.role else ""
        return f"{what}{role}{_brackets(index[1:] if layer.shape[:1] == (1,) else index)}{suffix}"

    def edge_name(self, edge: int) -> str:
        """The parameter elements that an edge's weight depends on, such as ``0.weight[1, 0]``; empty for constants.

        Raises:
            ValueError: there is no such edge.
        """
        if not 0 <= edge < self.num_edges:
            raise ValueError(f"edge must be from 0 to {self.num_edges - 1}, got {edge}")
        elements = self._derivative.columns[self._derivative.span(edge, edge + 1)].tolist()
        places = map(Flattened(self.shapes).find, elements)
        return ", ".join(f"{name}{_brackets(index)}" for name, index in places)

    def nodes_of(self, node: fx.Node) -> Tensor:
        """The nodes in the entries of a call's output, by place.

        Args:
            node: a node of the captured graph that makes nodes.

        Returns:
            int64 tensor [entries].
        """
        runs = [r for r in self._runs if r.label is not None and r.label.node is node and not r.label.role]
        ids = torch.empty_like(self._numbers)
        ids[self._numbers - 1] = torch.arange(self.num_nodes)
        return torch.cat([ids[:0], *(ids[run.first - 1 : run.first - 1 + run.count] for run in runs)])

    # -- matrices --------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> list[Level]:
        """The nodes by the number of edges of the longest path that leads there; together they are the adjacency."""
        return [Level(range(a, b), self._weights.tensor(a, b)) for a, b in self._spans]

    @property
    def _spans(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self._bounds))

    def adjacency(self) -> Tensor:
        """The weights as a float64 sparse CSR tensor [num_nodes, num_nodes]; row = destination, column = source."""
        return self._weights.tensor(0, self.num_nodes)

    def derivative(self) -> Tensor:
        """The derivative of every edge's weight by every parameter element, sparse CSR [num_edges, num_parameters].

        Edges follow the entries of :meth:`adjacency`, parameters ``model.parameters()``, each flattened.
        """
        return self._derivative.tensor(0, self.num_edges)

    def derivative_to_scipy(self) -> sparse.csr_array:
        """:meth:`derivative` as a SciPy array."""
        return self._derivative.to_scipy()

    @property
    def weights(self) -> Tensor:
        """The weight of every edge, float64 [num_edges], which are the values of :meth:`adjacency`."""
        return self._weights.values

    @property
    def sources_of_edges(self) -> Tensor:
        """The node that every edge comes from, [num_edges], which are the columns of :meth:`adjacency`."""
        return self._weights.columns

    @property
    def destinations_of_edges(self) -> Tensor:
        """The node that every edge leads to, int64 [num_edges]."""
        nodes = torch.arange(self.num_nodes, device=self.device)
        return nodes.repeat_interleave(self._weights.lengths(0, self.num_nodes))

    def to_scipy(self) -> sparse.csr_array:
        """:meth:`adjacency` as a SciPy array."""
        return self._weights.to_scipy()

    def to_networkx(self) -> networkx.DiGraph:
        """The graph for networkx, edges from source to destination.

        Nodes have the attributes ``name``, ``module``, ``operation``, ``index`` and ``level``, edges ``weight``. For
        small graphs: a node takes about a kilobyte.

        Returns:
            A :class:`networkx.DiGraph` without cycles.
        """
        graph = networkx.DiGraph()
        for level, (first, last) in enumerate(self._spans):
            for node in range(first, last):
                site = self.site(node)
                facts = {"name": self.name(node), "module": site.module, "operation": site.operation}
                graph.add_node(node, **facts, index=self.index(node), level=level)
        entries = self.to_scipy().tocoo()
        graph.add_weighted_edges_from(
            zip(entries.col.tolist(), entries.row.tolist(), entries.data.tolist(), strict=True)
        )
        return graph

    # -- path quantities -------------------------------------------------------------------------------------------

    def forward_mass(self, p: float = 1, log: bool = False) -> Tensor:
        """``Σ |Π w|^p`` over all paths from a start to each node.

        Args:
            p: at least 1, and finite.
            log: return natural logarithms, which are finite where the sums leave float64.

        Returns:
            float64 tensor [num_nodes]; 0 or inf (not their logarithms) where a sum leaves the range of float64.

        Raises:
            ValueError: p is below 1 or not finite.

        Cost: one pass over the edges.
        """
        masses = self._forward(checked_power(p))
        return masses.logarithms() if log else masses.numbers()

    @plain_computation()
    def _forward(self, p: float) -> Masses:
        return forward_masses(self._weights, self._spans[1:], self.starts, p)

    def backward_mass(self, p: float = 1, log: bool = False) -> Tensor:
        """``Σ |Π w|^p`` over all paths from each node to an end.

        Args:
            p: at least 1, and finite.
            log: return natural logarithms, which are finite where the sums leave float64.

        Returns:
            float64 tensor [num_nodes], as :meth:`forward_mass`.

        Raises:
            ValueError: p is below 1 or not finite.

        Cost: that of :meth:`forward_mass`.
        """
        masses = self._backward(checked_power(p))
        return masses.logarithms() if log else masses.numbers()

    @plain_computation()
    def _backward(self, p: float) -> Masses:
        return backward_masses(self._weights, self._spans[1:], self.ends, p)

    def path_norm(self, p: float = 1, log: bool = False) -> float:
        """The path-norm ``(Σ |Φ|^p)^(1/p)``, as :func:`dagpath.path_norm` gives it by another way.

        Args:
            p: at least 1, and finite.
            log: return the natural logarithm, which is finite where the norm itself leaves float64.

        Returns:
            The norm, or its logarithm; -inf is the logarithm of a norm of zero, inf a norm above the float64 range.

        Raises:
            ValueError: p is below 1 or not finite.

        Cost: that of :meth:`forward_mass`.
        """
        p = checked_power(p)
        total = self._forward(p).at(self.ends).total()
        return float(total.logarithms()) / p if log else float(total.root(p))

    @plain_computation()
    def gram_diagonal(self, log: bool = False) -> dict[str, Tensor]:
        """The diagonal of the path Gram matrix, as :func:`dagpath.gram_diagonal` gives it by another way.

        ``G_ee = Σ (∂w/∂θ_e)² · forward(src) · backward(dst)`` over all edges that depend on the element e, with masses
        of p = 2.

        Args:
            log: return natural logarithms (-inf for zero), which are finite where G itself leaves float64.

        Returns:
            parameter name -> float64 tensor of its shape.

        Cost: that of :meth:`forward_mass` and :meth:`backward_mass`, and a pass over the edges.
        """
        ways = self._forward(2), self._backward(2)
        found = squares_by_element(self._weights, self._derivative, self._spans[1:], *ways)
        return Flattened(self.shapes).split(found.logarithms() if log else found.numbers())

    @plain_computation()
    def path_count(self) -> int:
        """The number of paths, exact, however large.

        Edges of weight zero count, unless they are zero for good (a constant mask).

        Cost: a pass over the edges for every 32 binary digits of the number.
        """
        digits = [torch.zeros(self.num_nodes, dtype=torch.int64, device=self.device)]
        digits[0][self.starts] = 1
        for first, last in self._spans[1:]:
            carry = torch.zeros(last - first, dtype=torch.int64, device=self.device)
            for digit in digits:
                total = self._sums(digit, first, last) + carry
                digit[first:last] = total & ((1 << _LIMB) - 1)
                carry = total >> _LIMB
            if bool(carry.any()):
                digits.append(torch.zeros_like(digits[0]))
                digits[-1][first:last] = carry
        return sum(int(digit[self.ends].sum()) << _LIMB * place for place, digit in enumerate(digits))

    def _sums(self, values: Tensor, first: int, last: int) -> Tensor:
        """Exact sums of integers over the sources of each of these nodes."""
        span = self._weights.span(first, last)
        sums = torch.nn.functional.pad(values[self._weights.columns[span]].cumsum(0), (1, 0))
        starts = self._weights.starts[first : last + 1] - span.start
        return sums[starts].diff()

    @plain_computation()
    def reached(self) -> Tensor:
        """Which nodes a path from a start reaches, bool [num_nodes]."""
        reached = torch.zeros(self.num_nodes, dtype=torch.int64, device=self.device)
        reached[self.starts] = 1
        for first, last in self._spans[1:]:
            reached[first:last] = self._sums(reached, first, last).clamp(max=1)
        return reached.bool()


def _brackets(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else ""
