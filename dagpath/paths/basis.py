"""Basis paths: as many independent paths as a network has degrees of freedom up to rescaling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array, csgraph, csr_array
from torch import Tensor

from dagpath.passes.structure import Edges, Links, Structure
from dagpath.paths.alive import alive_elements
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced
from dagpath.words import counted

_NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True, repr=False)
class BasisPaths:
    """Basis paths of a network, one for each class of parameter elements.

    Every free scale group γ has a skeleton: an element ``s(γ)`` that leads into it and an element ``t(γ)`` that leads
    out of it. Following them, ``in(γ)`` is a chain from a source to γ and ``out(γ)`` one from γ to a sink. The basis
    path of an element e from α to β is ``p_e = in(α) · e · out(β)``; fixed ends (group 0) need no chain. Then
    ``p_{s(γ)} = p_{t(γ)} = q_γ``, and no others are equal. Every path P of the network is, as a vector that counts
    elements, ``Σ_{e ∈ P} p_e − Σ q_γ``, the last sum over its visits to free groups.

    Where an inner neuron is fixed (in front of a batch norm), chains end there. What the basis spans are then pieces of
    paths from one fixed neuron, input or output to the next. Every path is a sum of pieces, but paths may span less.
    Where every hidden neuron is free, the pieces are the paths.

    All tensors are on the CPU; elements are numbered over ``model.parameters()``, each flattened.

    Attributes:
        dst: int32 [num_parameters], the group that each element leads into, 0 for fixed.
        src: int32 [num_parameters], the group that it leads out of.
        class_of: int64 [num_parameters], the basis path of each element, -1 where no path meets the element.
        entering: int64 [groups + 1], ``s(γ)`` of each free group; -1 for group 0 and for groups that no path meets.
        leaving: int64 [groups + 1], ``t(γ)``, alike.
        log_values: float64 [num_paths], natural logarithm of the magnitude of each path's value when it was chosen.
        signs: float64 [num_paths], the sign of the value.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.paths.basis import basis_paths
        >>> layers = torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False)
        >>> basis = basis_paths(dagpath.trace(torch.nn.Sequential(*layers), torch.zeros(1, 2)))
        >>> basis
        BasisPaths(4 paths of 6 parameters)
        >>> basis.to_scipy().toarray().sum(0).tolist()  # each path has two elements
        [2, 2, 2, 2]
    """

    dst: Tensor
    src: Tensor
    class_of: Tensor
    entering: Tensor
    leaving: Tensor
    log_values: Tensor
    signs: Tensor

    def __repr__(self) -> str:
        return f"BasisPaths({counted(self.num_paths, 'path')} of {counted(len(self.class_of), 'parameter')})"

    @property
    def num_paths(self) -> int:
        """Number of basis paths, which is that of elements on paths less that of free groups on paths.

        It is the dimension that pieces of paths between fixed neurons span, those of paths if no inner neuron is fixed.
        """
        return len(self.log_values)

    @property
    def group_class(self) -> Tensor:
        """Which basis path ``q_γ`` is, int64 [groups + 1]; -1 where there is none."""
        return torch.where(self.entering >= 0, self.class_of[self.entering.clamp(min=0)], -1)

    def path_flows(self, flows: Tensor) -> Tensor:
        """``y_p``, from which the gradient in path space is ``∂L/∂v_p = y_p / v_p``.

        With ``f_e = θ_e ∂L/∂θ_e`` and ``F_γ`` its sum over the elements that lead into γ, ``y_p`` is the sum of ``f_e``
        over the elements of the class less that of ``F_γ`` over the groups whose ``q_γ`` is p.

        Args:
            flows: f, [num_parameters].

        Returns:
            float64 [num_paths].
        """
        flows = flows.detach().to("cpu", torch.float64)
        on_path = self.class_of >= 0
        result = torch.zeros(self.num_paths, dtype=torch.float64)
        result.index_add_(0, self.class_of[on_path], flows[on_path])
        through = torch.zeros(len(self.entering), dtype=torch.float64)
        through.index_add_(0, self.dst[on_path], flows[on_path])
        chosen = self.entering >= 0
        return result.index_add_(0, self.group_class[chosen], through[chosen], alpha=-1.0)

    def multipliers(self, ratios: Tensor) -> Tensor:
        """Factors of all elements that multiply the value of each basis path by its ratio.

        The elements ``s(γ)`` stay as they are: that picks one of the networks that differ by a rescaling. All others
        are multiplied by ``μ_e = R_{p_e} / R_{q_β}``, with β the group that e leads into and ``R_{q_0} = 1``.

        Args:
            ratios: R, [num_paths].

        Returns:
            float64 [num_parameters], 1 for elements that no path meets.
        """
        ratios = torch.cat([ratios.detach().to("cpu", torch.float64), torch.ones(1, dtype=torch.float64)])
        return ratios[self.class_of] / torch.where(self.class_of >= 0, ratios[self.group_class][self.dst], 1.0)

    def to_scipy(self) -> csr_array:
        """How often each element is on each basis path.

        Returns:
            int64 SciPy CSR array [num_parameters, num_paths].

        Cost: as many entries as the paths have elements together; for small networks.
        """
        elements = np.flatnonzero(self.class_of.numpy() >= 0)
        classes, first = np.unique(self.class_of.numpy()[elements], return_index=True)
        chosen = elements[first]
        src, dst = self.src.numpy()[chosen], self.dst.numpy()[chosen]
        shape = (len(classes), len(self.class_of))
        own = csr_array((np.ones(len(chosen), np.int64), (classes, chosen)), shape=shape)
        into, out_of = self._chains(self.entering, self.src), self._chains(self.leaving, self.dst)
        return csr_array((own + into[src] + out_of[dst]).T)

    @staticmethod
    def _chains(skeleton: Tensor, other_end: Tensor) -> csr_array:
        """int64 [groups + 1, num_parameters]: the elements of each group's chain."""
        groups = np.flatnonzero(skeleton.numpy() >= 0)
        elements = skeleton.numpy()[groups]
        following = other_end.numpy()[elements]
        size = len(skeleton)
        ones = np.ones(len(groups), np.int64)
        step = csr_array((ones, (groups, elements)), shape=(size, len(other_end)))
        onward = csr_array((ones, (groups, following)), shape=(size, size))
        result = step
        while step.nnz:
            step = onward @ step
            result = result + step
        return result


@dataclass(frozen=True)
class ElementOrder:
    """Where each element of the parameters stands, whatever their values. All tensors are on the CPU.

    Attributes:
        dst, src: int32 [m], the groups at the ends of each element, 0 for fixed ends.
        entry: int32 [m], when the neuron that the element leads into is computed: numbers that grow along paths.
            Negative where no path meets the element.
        leave: int32 [m], when the neuron that it reads is computed.
        num_groups: how many free groups there are.
    """

    dst: Tensor
    src: Tensor
    entry: Tensor
    leave: Tensor
    num_groups: int


def choose_skeleton(order: ElementOrder, values: Tensor) -> tuple[Tensor, Tensor]:
    """``s(γ)`` and ``t(γ)`` of :func:`choose_basis`, int64 [groups + 1] each; -1 where there is none."""
    logs, elements = _candidates(order, values)
    entering = _chains(elements, order.dst, order.src, order.entry, logs, values, order.num_groups)[0]
    leaving = _chains(elements, order.src, order.dst, -order.leave, logs, values, order.num_groups)[0]
    return entering, leaving


def _candidates(order: ElementOrder, values: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of all elements, and those that a chain may begin with."""
    return values.to(torch.float64).abs().log(), torch.nonzero((order.entry >= 0) & (order.dst != order.src))[:, 0]


def choose_basis(order: ElementOrder, values: Tensor) -> BasisPaths:
    """Basis paths whose chains are the heaviest among those that enter each group first and leave it last.

    A group may stand at several places of the network (a residual stream). It is entered where it begins, and left
    where it is read last, so that a chain into it goes on as any chain out of it. Among the elements that do so, the
    one that makes the heaviest chain is chosen, which is the same in all networks that differ by a rescaling.

    Args:
        order: where the elements stand.
        values: [m], the elements.
    """
    dst, src, entry, leave = order.dst, order.src, order.entry, order.leave
    logs, elements = _candidates(order, values)
    entering, log_in, sign_in = _chains(elements, dst, src, entry, logs, values, order.num_groups)
    leaving, log_out, sign_out = _chains(elements, src, dst, -leave, logs, values, order.num_groups)
    groups = torch.nonzero(entering >= 0)[:, 0]
    class_of = torch.arange(len(dst))
    skeleton, representative = identified(entering[groups], leaving[groups])
    class_of[skeleton] = representative
    class_of[entry < 0] = -1
    is_first = class_of == torch.arange(len(dst))
    first = torch.nonzero(is_first)[:, 0]
    number = torch.cumsum(is_first, 0) - 1
    class_of = torch.where(class_of >= 0, number[class_of.clamp(min=0)], -1)
    alpha, beta = src[first], dst[first]
    return BasisPaths(
        dst,
        src,
        class_of,
        entering,
        leaving,
        log_in[alpha] + logs[first] + log_out[beta],
        sign_in[alpha] * values[first].to(torch.float64).sign() * sign_out[beta],
    )


def _chains(
    elements: Tensor, end: Tensor, other_end: Tensor, when: Tensor, logs: Tensor, values: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each group the element by which its heaviest chain begins, the chain's logarithm and its sign.

    Only elements that meet the group first, in the order of ``when``, may begin its chain.
    """
    groups = end[elements].long()
    first = torch.full((num_groups + 1,), _NEVER, dtype=torch.int32).scatter_reduce(0, groups, when[elements], "amin")
    kept = (groups > 0) & (when[elements] == first[groups])
    elements, groups = elements[kept], groups[kept]
    order = torch.argsort(when[elements], stable=True)
    elements, groups = elements[order], groups[order]
    _, counts = torch.unique_consecutive(when[elements], return_counts=True)
    chosen = torch.full((num_groups + 1,), -1)
    log_chain = torch.zeros(num_groups + 1, dtype=torch.float64)
    sign_chain = torch.ones(num_groups + 1, dtype=torch.float64)
    for found, into in zip(*(torch.split(part, counts.tolist()) for part in (elements, groups)), strict=True):
        totals = logs[found] + log_chain[other_end[found]]
        best = torch.full((num_groups + 1,), -torch.inf, dtype=torch.float64).scatter_reduce(0, into, totals, "amax")
        heaviest = found[totals == best[into]]
        begun = end[heaviest].long().flip(0)  # of equals, the first is written last
        chosen[begun] = heaviest.flip(0)
        begun = torch.unique(begun)
        log_chain[begun] = best[begun]
        sign_chain[begun] = values[chosen[begun]].to(torch.float64).sign() * sign_chain[other_end[chosen[begun]]]
    return chosen, log_chain, sign_chain


def identified(entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """The skeleton's elements and for each the first of those that it shares its basis path with."""
    skeleton, inverse = torch.unique(torch.cat([entering, leaving]), return_inverse=True)
    rows, columns = inverse.view(2, -1).numpy()
    size = len(skeleton)
    _, component = csgraph.connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size)))
    _, first, place = np.unique(component, return_index=True, return_inverse=True)
    return skeleton, skeleton[torch.from_numpy(first[place])]


@plain_computation()
def basis_paths(traced: TracedModel) -> BasisPaths:
    """The basis paths of a model at its parameters' current values.

    There are as many as the elements that paths meet less the free scale groups that they meet: the values of all paths
    follow from those of the basis paths, which are independent of each other. Where an inner neuron is fixed, they are
    pieces of paths that end there (:class:`BasisPaths`). A batch norm in eval mode is the element γ of each channel,
    and β for its constant.

    Args:
        traced: the traced model.

    Returns:
        The :class:`BasisPaths`.

    Cost: one forward and one backward pass, and a few over the parameters, with 60 bytes per element; seconds for a
    ResNet-50. Source: Meng et al., ICLR 2019, for chains of layers of one width; here for the scale groups of any
    network.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.paths.basis import basis_paths
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> basis_paths(dagpath.trace(net, torch.zeros(1, 3))).num_paths  # 26 parameters, 4 hidden neurons
        22
    """
    require_traced(traced)
    parts = (parameter.cpu().reshape(-1) for parameter in traced.values.values())
    values = torch.cat([torch.zeros(0), *parts])
    return choose_basis(element_order(traced), values)


@plain_computation()
def element_order(traced: TracedModel) -> ElementOrder:
    """Where each parameter element of a model stands.

    Cost: one forward and one backward pass and the structure of the network; seconds for a ResNet-50.
    """
    structure = traced.graph.structure()
    alive = alive_elements(traced, structure)
    computed = _times(structure)
    shapes = traced.graph.shapes
    entry, leave = (
        {name: torch.full((shape.numel(),), -1, dtype=torch.int32) for name, shape in shapes.items()} for _ in "ab"
    )
    for edges in structure.edges:
        shape, name = edges.values.shape, edges.parameter
        index = slice(None) if edges.index is None else edges.index
        on_path = alive[name].reshape(-1)[index]
        entered, left = (computed[end].expand(shape).reshape(-1) for end in (edges.dst, edges.src))
        known = entry[name][index]
        entered = torch.where(known < 0, entered, torch.minimum(known, entered))
        entry[name][index] = torch.where(on_path, entered, known)
        leave[name][index] = torch.where(on_path, torch.maximum(leave[name][index], left), leave[name][index])
    ends = traced.graph.ends
    none = torch.zeros(0, dtype=torch.int32)
    dst, src = (
        torch.cat(
            [
                none,
                *(getattr(ends[name], end).to(torch.int32).expand(shape).reshape(-1) for name, shape in shapes.items()),
            ]
        )
        for end in ("dst", "src")
    )
    entered, left = (torch.cat([none, *times.values()]) for times in (entry, leave))
    return ElementOrder(dst, src, entered, left, traced.graph.num_groups)


def _times(structure: Structure) -> Tensor:
    """int32 [nodes + 1]: when each node is computed, 0 for those that paths start from; -1 for no node."""
    records: list[Edges | Links] = sorted([*structure.links, *structure.edges], key=lambda record: record.order)
    times = torch.zeros(structure.num_nodes + 1, dtype=torch.int32)
    for index, record in enumerate(records, 1):
        nodes = torch.unique(record.dst[record.dst >= 0])
        times[nodes] = torch.where(times[nodes] == 0, index, times[nodes])
    times[-1] = -1
    return times
