"""Do the graphs of several calls of a model put its parameters between the same neurons?

Each graph alone says which neurons share a scale. Where a second graph ties others, or ties them otherwise, what is
right for one call would be wrong for another one: these neurons keep their scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csgraph, csr_array
from torch import Tensor

from dagpath.passes.neurons import UNKNOWN, UNUSED, Ends, NeuronFlow
from dagpath.passes.ties import Links
from dagpath.passes.values import FIXED, broadcast, compact


@dataclass(frozen=True)
class Grouped:
    """What a pass says of scales.

    Attributes:
        flow: the pass.
        group_of: the group of each neuron number.
        ends: parameter name -> groups at both ends of its edges; negative where they are not used, or not known.
    """

    flow: NeuronFlow
    group_of: Tensor
    ends: Mapping[str, Ends]


def grouped(flow: NeuronFlow) -> Grouped:
    """The groups of a pass that has run its graphs."""
    numbers = flow.ends()
    flow.settle()
    group_of = torch.from_numpy(Links(flow.ties, flow.num_numbers + 1).groups())
    ends = {name: Ends(_looked_up(group_of, e.dst), _looked_up(group_of, e.src)) for name, e in numbers.items()}
    return Grouped(flow, group_of, ends)


def _looked_up(group_of: Tensor, numbers: Tensor) -> Tensor:
    groups: Tensor = torch.where(numbers < FIXED, numbers, group_of[numbers.clamp(min=FIXED)])
    return groups


def _pairs(a: Grouped, b: Grouped) -> Tensor:
    """The pairs of free groups that stand at the same ends of parameters, [2, number of pairs]."""
    found = [torch.zeros(2, 0, dtype=torch.int64)]
    for name, ends in a.ends.items():
        for one, other in ((ends.dst, b.ends[name].dst), (ends.src, b.ends[name].src)):
            one, other = broadcast(compact(one), compact(other))
            free = (one > FIXED) & (other > FIXED)
            found.append(torch.unique(torch.stack([one[free], other[free]]), dim=1))
    pairs: Tensor = torch.unique(torch.cat(found, 1), dim=1)
    return pairs


def conflicts(a: Grouped, b: Grouped) -> tuple[Tensor, Tensor]:
    """The groups of each that the other one divides or unites otherwise."""
    pairs = _pairs(a, b).numpy()
    size = len(a.group_of) + len(b.group_of) + 1
    links = csr_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1] + len(a.group_of))), shape=(size, size))
    _, component = csgraph.connected_components(links, directed=False)
    ones, others = np.unique(pairs[0]), np.unique(pairs[1])
    counts = [np.bincount(component[groups], minlength=size) for groups in (ones, others + len(a.group_of))]
    apart = (counts[0] > 1) | (counts[1] > 1)
    return (
        torch.from_numpy(ones[apart[component[ones]]]),
        torch.from_numpy(others[apart[component[others + len(a.group_of)]]]),
    )


def _differing(a: Grouped, b: Grouped) -> list[tuple[str, str]]:
    """The ends of parameters, by name and ``"dst"`` or ``"src"``, at which two calls do not agree.

    An element leads to a neuron that is fixed in the one and free in the other, or to groups that the two calls divide
    or unite otherwise.
    """
    ours, theirs = conflicts(a, b)
    found = []
    for name in a.ends:
        for side in ("dst", "src"):
            one, other = broadcast(*(compact(getattr(each.ends[name], side)) for each in (a, b)))
            known = (one >= FIXED) & (other >= FIXED)
            differ = ((one > FIXED) != (other > FIXED)) | torch.isin(one, ours) | torch.isin(other, theirs)
            if bool((known & differ).any()):
                found.append((name, side))
    return found


def agree(a: Grouped, b: Grouped) -> bool:
    """Do both graphs join the same elements of parameters to neurons of the same groups, by the same operations?"""
    targets = [[node.target for node in each.flow.graph_inputs.module.graph.nodes] for each in (a, b)]
    if targets[0] != targets[1] or bool(a.flow.cut) != bool(b.flow.cut):
        return False
    return not _differing(a, b) and all(_reaches_alike(a, b, name) for name in a.ends)


def reconciled(flow: NeuronFlow, families: Sequence[Sequence[Grouped]]) -> Grouped:
    """The groups of a pass over the graphs of several calls.

    Where two calls do not agree on an end of a parameter, a third one may differ in yet another way: all neurons at
    that end are fixed.

    Args:
        flow: a pass that has run all of the graphs.
        families: for each mode, what the graph of each of its calls says alone.
    """
    if not families:
        return grouped(flow)
    numbers = flow.ends()
    varying: dict[str, None] = {}
    for first, *others in families:
        pairs = [(first, other) for other in others]
        more = [other for other in others if _uses_more(other, first)]  # what the first call does not use
        for one, other in [*pairs, *itertools.combinations(more, 2)]:
            for name, side in _differing(one, other):
                met = getattr(numbers[name], side)
                _fix(flow, met, f"meets other neurons in {other.flow.graph_inputs.call}")
            varying |= dict.fromkeys(name for name in one.ends if not _reaches_alike(one, other, name))
    found = grouped(flow)
    for name in varying:
        reason = f"is reached by {name}, of which other calls use other elements"
        whole = _completed(numbers[name], found.ends[name], flow.parameters[name].shape)
        if whole is None:
            _fix(flow, numbers[name].dst, reason)
            _fix(flow, numbers[name].src, reason)
            continue
        flow.complete(name, whole)
        dst, src = broadcast(*(compact(end) for end in (numbers[name].dst, numbers[name].src)))
        _fix(flow, dst[src == UNKNOWN], reason)
    if varying:
        found, read = grouped(flow), "is read by nothing in the calls that were looked at"
        sources = torch.cat([end.src.reshape(-1) for end in map(_compact, found.ends.values())])
        for name, ends in found.ends.items():
            _fix(flow, flow.ends()[name].dst[~torch.isin(ends.dst, sources)], read)
    return grouped(flow)


def _compact(ends: Ends) -> Ends:
    return Ends(compact(ends.dst), compact(ends.src))


def _fix(flow: NeuronFlow, numbers: Tensor, reason: str) -> None:
    """Fix neurons, and say so at the calls that made them."""
    met = torch.unique(compact(numbers))
    for node, its in flow.makers_of(met[met > FIXED]):
        flow.node = node
        flow.fix(its, reason)


def _reaches_alike(a: Grouped, b: Grouped, name: str) -> bool:
    """Do both calls use the same elements of a parameter, and is it known of the same ones where they come from?"""
    used = [broadcast(each.ends[name].dst >= FIXED, each.ends[name].src >= FIXED) for each in (a, b)]
    return all(torch.equal(*broadcast(one, other)) for one, other in zip(*used, strict=True))


def _uses_more(a: Grouped, b: Grouped) -> bool:
    """Does one call use an element of a parameter that the other one does not use?"""
    for name, ends in a.ends.items():
        ours, theirs = broadcast(*(compact(end.dst) >= FIXED for end in (ends, b.ends[name])))
        if bool((ours & ~theirs).any()):
            return True
    return False


def _completed(numbers: Ends, groups: Ends, shape: torch.Size) -> Ends | None:
    """The ends of all elements of a parameter, those that no call used like their neighbours along a dimension.

    None where neighbours lead to different groups, so that they do not say.
    """
    dst, src = (end.expand(shape).clone() for end in (numbers.dst, numbers.src))
    labels = [end.expand(shape).clone() for end in (groups.dst, groups.src)]
    for _ in range(len(shape)):
        for dim in range(len(shape)):
            used = labels[0] != UNUSED
            if used.all():
                return Ends(dst, src)
            lines = [torch.where(used, label, -10).amax(dim, keepdim=True) for label in labels]
            if any(bool((used & (label != line)).any()) for label, line in zip(labels, lines, strict=True)):
                continue
            first = used.int().argmax(dim, keepdim=True)
            new = ~used & used.any(dim, keepdim=True)
            for end in (dst, src, *labels):
                end.copy_(torch.where(new, end.gather(dim, first).expand(shape), end))
    return Ends(dst, src) if bool((labels[0] != UNUSED).all()) else None
