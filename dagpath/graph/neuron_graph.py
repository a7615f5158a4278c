"""The neuron graph of a model: neurons, the groups that share a scale, and which neurons every parameter joins."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx

from dagpath.capture.site import Site, describe, site_of
from dagpath.errors import UnsupportedOpError
from dagpath.graph import views
from dagpath.passes.agreement import Grouped
from dagpath.passes.flattened import Flattened
from dagpath.passes.neurons import UNKNOWN, Ends, NeuronFlow
from dagpath.passes.sparse import without_csr_warning
from dagpath.passes.structure import Structure
from dagpath.passes.structure_nodes import NoEdgesError
from dagpath.passes.ties import Links
from dagpath.words import counted


@dataclass(frozen=True)
class Cause:
    """Why neurons are fixed.

    Attributes:
        site: the call that fixed them, or tied them to something fixed.
        reason: the reason in words.
        tied_to: if they are tied to something fixed, what: the modules of fixed neurons (their own causes say why),
            ``the model's input``, ``a constant``, ``what softmax in head returns``.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 2))
        >>> for cause in dagpath.trace(net, torch.zeros(1, 4)).graph.causes:
        ...     print(cause.site.module, cause.reason)
        1 enters a function that is not positively homogeneous
        2 is an output of the model
    """

    site: Site
    reason: str
    tied_to: tuple[str, ...] = ()


class NeuronGraph:
    """Neurons of a traced model and the scale groups that they form.

    A neuron is a unit of a linear layer, or a channel of a convolution or of a normalization, or a unit between the
    factors of a weight (the rank of a low-rank update ``W + B A``). Neurons that must share one factor λ (the operands
    of a residual sum, channel by channel) form a scale group. Group 0 is fixed: it keeps λ = 1.

    Attributes:
        num_neurons: number of neurons.
        num_groups: number of free scale groups, those that may be rescaled.
        num_parameters: number of elements of all parameters.
        num_edges: number of those that are edges between neurons; a bias is an edge from the constant neuron.
        group_of: LongTensor [num_neurons]; 0 where the neuron is fixed, else its free group, 1 .. num_groups.
        ends: parameter name -> group numbers at both ends of its edges, each broadcastable to the parameter. The
            factor of an element is ``λ[dst] / λ[src]``.
        shapes: parameter name -> shape, in the order of ``model.parameters()``.
        maker_of: LongTensor [num_neurons]; which of ``sites`` made the neuron.
        cause_of: LongTensor [num_neurons]; which of ``causes`` fixed the neuron, -1 where it is free.
        sites: the calls that made neurons.
        causes: the calls that fixed neurons, each a :class:`dagpath.graph.Cause`.
        without_rule: the calls of operations that dagpath knows no rule for, each a :class:`dagpath.graph.Site`.
        cut: nodes of the captured graph whose rule did not fit them: their neurons are fixed, and no path crosses them.
        places: nodes that make neurons -> which neuron stands in each entry of their output (-1: none that they made),
            broadcastable to its shape.
        fed: parameter name -> which neuron each element leads into (-1: one that has a place), broadcastable to its
            shape, for the parameters that lead into neurons without a place.
        kept: nodes that multiply two activations -> which factor (0 or 1) paths go through; the other is a gate.
        unknown: names of parameters with elements that read zeros alone in the calls that were looked at: these
            elements are left as they are.
        not_edges: names of parameters that are no edges between neurons, so that no rescaling multiplies them.
        movable: names of parameters with an element that enters or leaves a free group.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> graph = dagpath.trace(net, torch.zeros(1, 4)).graph
        >>> graph
        NeuronGraph(5 neurons, 3 free groups, 23 parameters)
        >>> graph.group_of  # the hidden neurons are free, the outputs fixed
        tensor([1, 2, 3, 0, 0])
        >>> graph.ends["2.weight"].src, graph.ends["2.weight"].dst  # every row reads the groups 1, 2, 3
        (tensor([[1, 2, 3]]), tensor([[0],
                [0]]))
        >>> [graph.sites[maker].module for maker in graph.maker_of]
        ['0', '0', '0', '2', '2']
    """

    def __init__(self, found: Grouped, structure: Callable[[NeuronGraph], Structure]) -> None:
        flow, group_of = found.flow, found.group_of
        ends = {name: Ends(end.dst.clamp(min=0), end.src.clamp(min=0)) for name, end in flow.ends().items()}
        self._structure = structure
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in flow.parameters.items()}
        self.not_edges = [name for name in flow.parameters if not flow.is_edge(name)]
        self.without_rule = [site_of(node) for node in flow.without_rule]
        self.cut = frozenset(flow.cut)
        self.kept = dict(flow.kept)
        self.num_parameters = sum(shape.numel() for shape in self.shapes.values())
        self.num_edges = flow.num_edges()

        self.num_groups = int(group_of.max())
        self.ends: Mapping[str, Ends] = {name: _known(end) for name, end in found.ends.items()}
        self.unknown = [name for name, end in found.ends.items() if bool((end.src == UNKNOWN).any())]
        self.movable = {name for name, end in self.ends.items() if bool(end.dst.any()) or bool(end.src.any())}

        self.sites = [site_of(node) for node, _ in flow.makers if node is not None]
        index = itertools.count()
        made = [-1, *(-1 if node is None else next(index) for node, _ in flow.makers)]
        site_of_number = torch.repeat_interleave(torch.tensor(made), torch.tensor([1, *(n for _, n in flow.makers)]))
        is_neuron = site_of_number >= 0
        self.group_of: Tensor = group_of[is_neuron]
        self.num_neurons = len(self.group_of)
        self.maker_of: Tensor = site_of_number[is_neuron]
        neuron_of = torch.where(is_neuron, is_neuron.cumsum(0) - 1, -1)
        self.places = {
            node: torch.where(torch.isin(numbers, own), neuron_of[numbers.clamp(min=0)], -1)
            for node, (numbers, own) in flow.places.items()
        }
        placed = torch.cat([torch.tensor([0]), *(own for _, own in flow.places.values())])
        unplaced = neuron_of.index_fill(0, placed, -1)
        self.fed = {name: unplaced[end.dst] for name, end in ends.items() if bool((unplaced[end.dst] >= 0).any())}
        self.causes, cause_of = _find_causes(
            flow, self.sites, site_of_number.numpy(), Links(flow.ties, flow.num_numbers + 1)
        )
        self.cause_of: Tensor = torch.from_numpy(cause_of)

    def reading(self, structure: Callable[[NeuronGraph], Structure]) -> NeuronGraph:
        """The same graph, whose structure is found otherwise: at other values of the parameters."""
        graph = copy.copy(self)
        graph._structure = structure
        return graph

    def __repr__(self) -> str:
        return (
            f"NeuronGraph({counted(self.num_neurons, 'neuron')}, {counted(self.num_groups, 'free group')}, "
            f"{counted(self.num_parameters, 'parameter')})"
        )

    def digest(self) -> str:
        """A hash of the parameters' names and shapes and the groups that they join, equal for equal architectures."""
        found = hashlib.sha256()
        for name, ends in self.ends.items():
            dst, src = (end.cpu().contiguous() for end in (ends.dst, ends.src))
            found.update(repr((name, tuple(self.shapes[name]), tuple(dst.shape), tuple(src.shape))).encode())
            for end in (dst, src):
                found.update(end.numpy().tobytes())
        return found.hexdigest()

    def incidence(self, device: torch.device | str | None = None) -> Tensor:
        """The incidence matrix B of parameters and free groups.

        Under a rescaling by ``λ = exp(z)`` each parameter element e is multiplied by ``exp((B z)_e)``: B has +1 at the
        group of its destination neuron and -1 at the group of its source neuron. An element between two neurons of one
        group, or between fixed neurons, has a row of zeros.

        Args:
            device: where to build it; None for the CPU.

        Returns:
            float64 sparse CSR tensor [num_parameters, num_groups]. Rows follow ``model.parameters()``, each flattened
            in its own order; column j is free group j + 1.

        Cost: 2 entries of 16 bytes per parameter element, built without loops over elements.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> graph = dagpath.trace(net, torch.zeros(1, 1)).graph
            >>> graph.incidence().to_dense().tolist()  # two weights, two biases, two weights, one bias
            [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]
        """
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        row_parts, column_parts, value_parts = [nothing], [nothing], [nothing.double()]
        for name, span in Flattened(self.shapes).spans.items():
            ends, shape = self.ends[name], self.shapes[name]
            dst, src = (end.to(device).expand(shape).reshape(-1) for end in (ends.dst, ends.src))
            rows = torch.arange(span.start, span.stop, device=dst.device)
            for end, sign in ((dst, 1.0), (src, -1.0)):
                kept = (end > 0) & (dst != src)
                row_parts.append(rows[kept])
                column_parts.append(end[kept] - 1)
                value_parts.append(torch.full_like(column_parts[-1], sign, dtype=torch.float64))
        indices = torch.stack([torch.cat(row_parts), torch.cat(column_parts)])
        size = (self.num_parameters, self.num_groups)
        with without_csr_warning():
            entries = torch.sparse_coo_tensor(indices, torch.cat(value_parts), size, check_invariants=True)
            return entries.coalesce().to_sparse_csr()

    def structure(self) -> Structure:
        """Which neuron reads which, through which parameter elements, at the model's current values.

        Raises:
            UnsupportedOpError: a weight is made of parameters in a way that no edges have; the message names the
                operation, its module and its source line.

        Cost: a pass over the captured graph, in which what lies between layers is run on ones: 1 s for ResNet-50.
        """
        try:
            return self._structure(self)
        except NoEdgesError as error:
            raise UnsupportedOpError(f"{describe(error.node)} {error.reason}") from None

    def layers(self, structure: Structure) -> list[views.Layer]:
        """The calls that made the nodes of a structure, with readable names."""
        found, used = [], Counter[str]()
        for segment in structure.segments:
            site = Site("", "", "") if segment.call is None else site_of(segment.call)
            label = _label(segment.role, site, segment.call)
            used[label] += 1
            unique = label if used[label] == 1 else f"{label}#{used[label]}"
            found.append(views.Layer(unique, site.module, site.operation, segment.role, segment.start, segment.count))
        return found

    def adjacency(self, weight: str = "l2", device: torch.device | str | None = None) -> Tensor:
        """Which neuron reads which: the weights between neurons as a sparse matrix.

        An entry stands for all parameter elements that join its two neurons: the one weight of a linear layer, the
        kernel of a convolution. It is a norm of the elements, or their number. What reads a residual sum reads every
        neuron that feeds the sum. The edge of a batch norm in eval mode is ``γ / sqrt(var + eps)``. Constants on the
        way, such as the 1/k of a mean, are left out, and so are biases: inputs and the constant are no neurons.

        Args:
            weight: ``"l2"`` (the square root of the sum of squares), ``"l1"`` (the sum of magnitudes), ``"max"`` (the
                largest magnitude) or ``"count"`` (the number of elements).
            device: where to build it; None for the CPU.

        Returns:
            float64 sparse CSR tensor [num_neurons, num_neurons], at the parameters' current values. A row is the
            neuron that reads (destination), a column the neuron that is read (source).

        Raises:
            ValueError: another ``weight``.

        Cost: a pass over the captured graph, in which what lies between layers is run on ones, and 16 bytes per pair of
        neurons.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> _ = torch.nn.init.constant_(net[2].weight, -3.0)
            >>> dagpath.trace(net, torch.zeros(1, 1)).graph.adjacency().to_dense().tolist()
            [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 3.0, 0.0]]
        """
        views.require_weight(weight)
        return views.adjacency(self.structure(), weight, device)

    def to_networkx(self, level: str = "layer", weight: str = "l2", mass: Tensor | None = None) -> nx.DiGraph:
        """The network as a directed graph, for networkx's own algorithms: dominators, cuts, longest paths, centrality.

        Nodes have the attributes ``module``, ``operation`` and ``role``. The role is ``"hidden"`` for neurons,
        ``"join"`` for sums and choices of neurons (residual sums, poolings over several neurons) and for what
        multiplies by a constant (the 1/k of a mean), ``"input"``, ``"output"``, ``"barrier"`` for an operation that
        no path crosses (paths end there and start anew), and ``"constant"`` for the neuron of value 1, the source of
        biases, named ``"(1)"``. At level ``"neuron"`` every neuron and join is a node of its own, named
        ``module.channel``, with its ``channel`` and scale ``group`` (0: fixed). At level ``"layer"`` a node stands for
        the ``size`` neurons that one call makes, ``free`` of which may be rescaled. An input, an output or a barrier is
        one node.

        Edges go with the data and have the attributes ``weight`` (as in :meth:`adjacency`, over all elements between
        the two nodes; without any, the constant factor, 1 for a sum), ``elements`` (how many) and ``parameters``
        (their names).

        Args:
            level: ``"layer"`` or ``"neuron"``.
            weight: ``"l2"``, ``"l1"``, ``"max"`` or ``"count"``.
            mass: a tensor [num_neurons] to be attached to the neurons (summed over layers) as the attribute ``mass``.

        Returns:
            A :class:`networkx.DiGraph` without cycles.

        Raises:
            ValueError: another ``level`` or ``weight``, or a ``mass`` of another shape.

        Cost: as :meth:`adjacency`; at level ``"neuron"`` about 1 kB per pair of neurons that are joined, so that a
        ResNet-20 takes a second and a ResNet-50 does not fit.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> graph = dagpath.trace(net, torch.zeros(1, 1)).graph.to_networkx()
            >>> list(graph.edges)
            [('(1)', '0'), ('(1)', '2'), ('input', '0'), ('0', '2'), ('2', 'output')]
        """
        if mass is not None and mass.shape != (self.num_neurons,):
            raise ValueError(
                f"mass must have one entry for each of {self.num_neurons} neurons, got {tuple(mass.shape)}"
            )
        structure = self.structure()
        return views.to_networkx(structure, self.layers(structure), self.group_of, level, weight, mass)


def _label(role: str, site: Site, call: fx.Node | None) -> str:
    """A readable name: the module's for neurons, with the operation for joins and barriers."""
    if role == "constant":
        return "(1)"
    if role in ("input", "output"):
        return role if role == "output" or call is None else str(call.target)
    names = (site.module,) if role == "hidden" and site.module else (site.module, site.operation)
    return ".".join(name for name in names if name)


def _find_causes(
    flow: NeuronFlow, sites: Sequence[Site], site_of_number: np.ndarray, links: Links
) -> tuple[list[Cause], np.ndarray]:
    """What fixed neurons, and which of these causes fixed each neuron; -1 where it is free."""
    tie_of, partner_of = links.ways_to_zero()
    while (unmade := (partner_of > 0) & (site_of_number[partner_of] < 0)).any():
        partner_of = np.where(unmade, partner_of[partner_of], partner_of)
    is_neuron = site_of_number >= 0
    tie_of, partner_of = tie_of[is_neuron], partner_of[is_neuron]
    fixed = tie_of >= 0
    used, cause_of_fixed = np.unique(tie_of[fixed], return_inverse=True)
    cause_of = np.full(len(tie_of), -1)
    cause_of[fixed] = cause_of_fixed
    partners: list[list[int]] = [[] for _ in used]
    size = len(sites) + 1
    for pair in np.unique(cause_of_fixed * size + site_of_number[partner_of[fixed]] + 1).tolist():
        partners[pair // size].append(pair % size - 1)
    fixing = {tie.node for tie in flow.ties if tie.right is None}
    causes = []
    for tie, together in zip((flow.ties[index] for index in used), partners, strict=True):
        if tie.right is None:
            causes.append(Cause(site_of(tie.node), tie.reason))
            continue
        modules = dict.fromkeys(sites[site].module for site in together if site >= 0)
        others = _origins(tie.fixed, flow.inputs, fixing) if -1 in together else []
        causes.append(Cause(site_of(tie.node), f"tied by {tie.reason}", (*modules, *others)))
    return causes, cause_of


def _origins(nodes: Iterable[fx.Node], inputs: Collection[fx.Node], sources: Collection[fx.Node]) -> list[str]:
    """Where fixed tensors come from: inputs of the model, constants, or the calls among ``sources`` that made them."""
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inputs:
            found["the model's input"] = None
        elif node in sources:
            site = site_of(node)
            found[f"what {site.operation}{site.module and f' in {site.module}'} returns"] = None
        else:
            waiting += node.all_input_nodes
    return sorted(found) or ["a constant" if seen else "something fixed"]


def _known(ends: Ends) -> Ends:
    """The groups at both ends of a parameter's edges: elements that are left alone lead from a group into itself."""
    dst, src = ends.dst.clamp(min=0), ends.src
    if not bool((src == UNKNOWN).any()):
        return Ends(dst, src.clamp(min=0))  # as compact as they are: masses are summed by that
    return Ends(dst, torch.where(src == UNKNOWN, dst, src.clamp(min=0)))
