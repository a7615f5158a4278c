"""The path-lifting of a small network, path by path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy import sparse
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture.graph import is_random
from dagpath.capture.site import describe
from dagpath.errors import UnsupportedOpError
from dagpath.graph.unrolled import UnrolledGraph
from dagpath.lifting import path_count
from dagpath.passes.level_masses import numbers_of, product_of_each, running_products
from dagpath.passes.real import RealFlow, widened
from dagpath.passes.sparse import csr_tensor
from dagpath.paths.basis import BasisPaths, basis_paths
from dagpath.paths.independence import require_independent
from dagpath.paths.inputs import examples
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced
from dagpath.words import counted


@dataclass(frozen=True)
class Path:
    """A path from an input, or the constant 1, to an output: one scalar activation after the other.

    Attributes:
        value: Φ, the product of the weights on it.
        nodes: readable names of its nodes, from start to end.
        weights: on each edge the parameter elements that its weight depends on, such as ``0.weight[1, 0]``; empty
            where it is a constant.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(2.0), net[2].weight.fill_(-3.0)
        >>> path = dagpath.PathLifting(dagpath.trace(net, torch.zeros(1, 1))).paths[-1]
        >>> print(path)
        input[0] → 0 linear[0] → 1 relu[0] → 2 linear[0]
        >>> path.value, path.weights
        (-6.0, ('0.weight[0, 0]', '', '2.weight[0, 0]'))
    """

    value: float
    nodes: tuple[str, ...]
    weights: tuple[str, ...]

    def __str__(self) -> str:
        return " → ".join(self.nodes)


class PathLifting:
    """The path-lifting Φ(θ) of a small network: every path by itself, with its value, derivative and activation.

    With the activations a_p(θ, x) of all paths (the product of its gates: 0 or 1 at a ReLU, the slope where a leaky
    ReLU is negative, 1 only along the selected input of a maximum) the network is

    ``R(θ, x)_out = Σ_{p ends in out} Φ_p(θ) · a_p(θ, x) · x_start(p)``.

    Everything is at the parameters and buffers of the time it is made. Paths and edges are those of the unrolled graph
    (:meth:`TracedModel.unroll`): a convolution's weight is met by a path for each position.

    Args:
        traced: the traced model.
        limit: the largest number of paths to enumerate.

    Attributes:
        graph: the :class:`dagpath.UnrolledGraph`.
        values: Φ, float64 tensor [paths]. Paths are ordered by the output that they end in.
        edges: int64 tensor [paths, longest path]: the edges of each path from its start, then -1.
        starts: int64 tensor [paths]: the node of the graph where each path starts.
        ends: int64 tensor [paths]: where it ends, an index into ``graph.ends``.

    Raises:
        TypeError: ``traced`` is not a traced model.
        ValueError: there are more paths than the limit (the message has the exact number), or a parameter is complex.

    Cost: unrolling, and memory for paths times their length. Source: Gonon et al., ICLR 2024, definitions of the
    path-lifting and the path-activations.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     for parameter, values in zip(net.parameters(), ([[2.0], [-3.0]], [[5.0, 7.0]], [1.0])):
        ...         _ = parameter.copy_(torch.tensor(values))
        >>> lifting = dagpath.PathLifting(dagpath.trace(net.double(), torch.zeros(1, 1).double()))
        >>> for path in lifting.paths:
        ...     print(path.value, path)
        1.0 1 → 2 linear[0]
        10.0 input[0] → 0 linear[0] → 1 relu[0] → 2 linear[0]
        -21.0 input[0] → 0 linear[1] → 1 relu[1] → 2 linear[0]
        >>> x = torch.tensor([[1.0], [-1.0]]).double()
        >>> lifting.activations(x).tolist()
        [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
        >>> lifting.realize(x).tolist() == net(x).tolist()
        True
        >>> lifting.jacobian().to_dense().tolist()  # columns: two weights, two weights, the bias
        [[0.0, 0.0, 0.0, 0.0, 1.0], [5.0, 0.0, 2.0, 0.0, 0.0], [0.0, 7.0, 0.0, -3.0, 0.0]]
    """

    def __init__(self, traced: TracedModel, limit: int = 100_000) -> None:
        require_traced(traced)
        parameters = dict(traced.values)
        for name, parameter in parameters.items():
            if parameter.is_complex():
                raise ValueError(f"the parameter {name!r} is {parameter.dtype}: values of paths are real")
        count = path_count(traced)
        if count > limit:
            raise ValueError(
                f"{type(traced.model).__name__} has {count} paths, more than limit={limit}; path_norm, gram_diagonal "
                "and top_paths do not enumerate them"
            )
        self.traced = traced
        self.graph: UnrolledGraph = traced.unroll()
        captured = traced.captured.eval
        self._captured = captured
        values = {place: parameters[name] for place, name in captured.parameters.items()}
        values |= {**captured.tensors, **captured.state}
        self._given = {place: widened(tensor).clone() for place, tensor in values.items()}
        self.edges, self.starts, self.ends = _enumerated(self.graph)
        self.values: Tensor = product_of_each(self._along(self.graph.weights))

    def __repr__(self) -> str:
        return f"PathLifting({counted(len(self), 'path')}, at most {counted(self.edges.shape[1], 'edge')} long)"

    def __len__(self) -> int:
        return len(self.starts)

    def _along(self, of_edges: Tensor) -> Tensor:
        """Numbers of the edges, along each path; 1 behind its end."""
        return torch.nn.functional.pad(of_edges, (0, 1), value=1.0)[self.edges]

    @cached_property
    def paths(self) -> list[Path]:
        """All paths, with readable names, as a list of :class:`Path`."""
        graph, destinations = self.graph, self.graph.destinations_of_edges
        used = self.edges[self.edges >= 0]
        edge_names = {edge: graph.edge_name(edge) for edge in set(used.tolist())}
        ids = set(torch.cat([self.starts, destinations[used]]).tolist())
        node_names = {node: graph.name(node) for node in ids}
        found = []
        for value, start, row in zip(self.values.tolist(), self.starts.tolist(), self.edges.tolist(), strict=True):
            edges = [edge for edge in row if edge >= 0]
            nodes = [start, *(int(destinations[edge]) for edge in edges)]
            found.append(Path(value, tuple(node_names[n] for n in nodes), tuple(edge_names[e] for e in edges)))
        return found

    # -- derivatives -----------------------------------------------------------------------------------------------

    @cached_property
    def _jacobian(self) -> sparse.csr_array:
        weights = self._along(self.graph.weights)
        before, behind = running_products(weights), running_products(weights.flip(1))
        values = before[0][:, :-1] * behind[0][:, :-1].flip(1)
        rest = numbers_of(values, before[1][:, :-1] + behind[1][:, :-1].flip(1))
        inside = self.edges >= 0
        rows = inside.nonzero()[:, 0]
        entries = rest[inside].numpy(), (rows.numpy(), self.edges[inside].numpy())
        of_edges = sparse.csr_array(entries, shape=(len(self), self.graph.num_edges))
        jacobian = sparse.csr_array(of_edges @ self.graph.derivative_to_scipy())
        jacobian.sum_duplicates()
        return jacobian

    def jacobian(self, device: torch.device | str | None = None) -> Tensor:
        """∂Φ: the derivative of every path's value by every parameter element.

        A path that meets a parameter twice (a shared weight) has the sum of both derivatives.

        Args:
            device: where the tensor goes; None for the CPU.

        Returns:
            float64 sparse CSR tensor [paths, parameters]; columns follow ``model.parameters()``, each flattened.

        Cost: once, memory for paths times their length; then a copy.
        """
        return csr_tensor(self._jacobian, device)

    def kernel(self, dense: bool = True, device: torch.device | str | None = None) -> Tensor:
        """The path kernel ``K = ∂Φ ∂Φᵀ``, whose nonzero eigenvalues are those of the path Gram matrix.

        Args:
            dense: a strided tensor, else a sparse CSR one.
            device: where the tensor goes; None for the CPU.

        Returns:
            float64 tensor [paths, paths].
        """
        kernel = csr_tensor(sparse.csr_array(self._jacobian @ self._jacobian.T), device)
        return kernel.to_dense() if dense else kernel

    # -- on an input -----------------------------------------------------------------------------------------------

    def basis(self) -> BasisPaths:
        """The basis paths of the network, as :func:`dagpath.paths.basis.basis_paths` gives them."""
        return basis_paths(self.traced)

    def activations(self, x: Tensor | tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The path activations a_p(θ, x), the product of the gates on each path.

        Args:
            x: a tensor, or the tuple of positional arguments of ``model.forward``, with any number of examples.
            kwargs: its keyword arguments.

        Returns:
            float64 tensor [batch, paths].

        Raises:
            ValueError: an input has another shape than the traced one, or another kind of type (integers for real
                numbers), or no example; the message says which.
            TypeError: ``x`` is neither a tensor nor a tuple.
            UnsupportedOpError: an operation cuts paths or draws random numbers, or the examples mix
                (``h - h.mean(0)``), so that an example alone gives another output than in the batch; the message says
                where.
        """
        return torch.stack([self._activation(values) for values in self._runs(x, kwargs)])

    def inputs(self, x: Tensor | tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The values x_start(p) where paths start, 1 for paths from a bias.

        Args:
            x: as in :meth:`activations`.
            kwargs: as there.

        Returns:
            float64 tensor [batch, paths].

        Raises:
            ValueError: as :meth:`activations`, which raises TypeError and UnsupportedOpError too.
        """
        return torch.stack([self._input(values) for values in self._runs(x, kwargs)])

    def realize(self, x: Tensor | tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """The network's output as a sum over paths, in float64 and in the model's own structure (eval mode).

        Args:
            x: as in :meth:`activations`.
            kwargs: as there.

        Returns:
            What ``model(x)`` returns; containers that PyTorch cannot look into come as lists.

        Raises:
            ValueError: as :meth:`activations`, which raises TypeError and UnsupportedOpError too.
        """
        results = [self._realized(values) for values in self._runs(x, kwargs)]
        leaves = [
            torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim else parts[0]
            for parts in zip(*results, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._captured.structure)

    @plain_computation()
    def _runs(self, x: Any, kwargs: Mapping[str, Any] | None) -> list[Mapping[fx.Node, Any]]:
        """What the nodes of the captured graph compute, example by example."""
        if self.graph.cuts:
            raise UnsupportedOpError(
                f"{describe(self.graph.cuts[0])} is not positively homogeneous: it cuts paths, and the output is no "
                "sum over them"
            )
        drawn = next(filter(is_random, self._captured.module.graph.nodes), None)
        if drawn is not None:
            raise UnsupportedOpError(f"{describe(drawn)} draws random numbers: the output is no sum over paths alone")
        args = (x,) if isinstance(x, Tensor) else x
        if not isinstance(args, tuple):
            raise TypeError(
                f"x must be a Tensor or a tuple of the model's positional arguments, got {type(x).__name__}"
            )
        inputs = examples(self._captured, args, kwargs or {})
        if len(inputs) > 1:
            require_independent(self.traced.model, self._captured, self._given, args, kwargs or {})
        return [RealFlow(self._captured).values({**self._given, **one}) for one in inputs]

    def _activation(self, values: Mapping[fx.Node, Any]) -> Tensor:
        gates, of_edges = self.graph.gates, torch.ones(self.graph.num_edges, dtype=torch.float64)
        if len(gates.edges):
            slots = torch.cat([read(values).double().flatten() for read in gates.read])
            of_edges[gates.edges] = slots[gates.slots]
        return self._along(of_edges).prod(1)

    def _input(self, values: Mapping[fx.Node, Any]) -> Tensor:
        of_nodes = torch.zeros(self.graph.num_nodes, dtype=torch.float64)
        for source in self.graph.sources:
            of_nodes[source.numbers] = source.read(values).double().flatten()
        return of_nodes[self.starts]

    def _realized(self, values: Mapping[fx.Node, Any]) -> list[Any]:
        terms = self.values * self._activation(values) * self._input(values)
        sums = torch.zeros(len(self.graph.ends), dtype=torch.float64).index_add_(0, self.ends, terms)
        found: list[Any] = []
        first = len(sums) - sum(int((leaf >= 0).sum()) for leaf in self.graph.outputs if isinstance(leaf, Tensor))
        for leaf in self.graph.outputs:
            if not isinstance(leaf, Tensor):
                found.append(leaf)
                continue
            there = leaf >= 0
            count = int(there.sum())
            found.append(
                torch.zeros(leaf.shape, dtype=torch.float64).masked_scatter(there, sums[first : first + count])
            )
            first += count
        return found


def _enumerated(graph: UnrolledGraph) -> tuple[Tensor, Tensor, Tensor]:
    """All paths, walked from their ends: their edges from the start, padded with -1, their starts and their ends.

    All paths take a step at once.
    """
    rows, sources, reached = graph.adjacency().crow_indices(), graph.sources_of_edges, graph.reached()
    is_start = torch.zeros(graph.num_nodes, dtype=torch.bool)
    is_start[graph.starts] = True
    at, ends = graph.ends, torch.arange(len(graph.ends))
    walked = torch.zeros(len(at), 0, dtype=torch.int64)
    finished: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(at):
        done = is_start[at]
        finished.append((walked[done], at[done], ends[done]))
        counts = rows[at + 1] - rows[at]
        path = torch.arange(len(at)).repeat_interleave(counts)
        edge = torch.arange(len(path)) - (counts.cumsum(0) - counts - rows[at])[path]
        kept = reached[sources[edge]]
        path, edge = path[kept], edge[kept]
        walked = torch.cat([walked[path], edge[:, None]], 1)
        at, ends = sources[edge], ends[path]
    longest = walked.shape[1] - 1 if finished else 0
    edges = [torch.nn.functional.pad(w.flip(1), (0, longest - w.shape[1]), value=-1) for w, _, _ in finished]
    if not edges:
        return torch.zeros(0, 0, dtype=torch.int64), at, ends
    order = torch.cat([ends for _, _, ends in finished]).argsort(stable=True)
    return (
        torch.cat(edges)[order],
        torch.cat([starts for _, starts, _ in finished])[order],
        torch.cat([ends for _, _, ends in finished])[order],
    )
