"""The skeleton of a model's basis paths, on the tensors of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dagpath.passes.flattened import Flattened
from dagpath.paths.basis import ElementOrder, identified
from dagpath.words import counted


class Skeleton:
    """The elements ``s(γ)`` and ``t(γ)`` that begin the chains of each free scale group.

    ``in(γ)`` is the chain ``s(γ), s(src s(γ)), …`` back to a fixed end, ``out(γ)`` the chain ``t(γ), t(dst t(γ)), …``
    on to one. The elements that share a basis path, ``s(γ)`` and ``t(γ)`` among them, are a class.

    Args:
        order: where the elements stand.
        entering, leaving: ``s`` and ``t``, int64 [groups + 1], -1 where there is none.
        parameters: the parameters whose elements are numbered.

    Attributes:
        entering, leaving: as given.
        members: int64, the elements of the skeleton.
        class_of: int64 [members], their classes.
        dst: int64 [members], the groups that they lead into.
        class_of_group: int64 [groups + 1], the class of ``s(γ)`` and ``t(γ)``; ``num_classes`` where there is none.
        num_classes: how many classes there are.
    """

    def __init__(self, order: ElementOrder, entering: Tensor, leaving: Tensor, parameters: Sequence[Tensor]) -> None:
        device = parameters[0].device if parameters else torch.device("cpu")
        self.entering, self.leaving = entering, leaving
        groups = torch.nonzero(entering >= 0)[:, 0]
        self.members, representative = identified(entering[groups], leaving[groups])
        kinds, class_of = torch.unique(representative, return_inverse=True)
        self.num_classes = len(kinds)
        self._in_step, self._out_step = (self._place(element).to(device) for element in (entering, leaving))
        self._in_parents = _doublings(_other_end(order.src, entering), device)
        self._out_parents = _doublings(_other_end(order.dst, leaving), device)
        class_of_group = torch.full((len(entering),), self.num_classes)
        class_of_group[groups] = class_of[self._place(entering)[groups]]
        one_group = torch.zeros(self.num_classes, dtype=torch.int64)
        one_group[class_of_group[groups]] = groups
        self.class_of, self.class_of_group = class_of.to(device), class_of_group.to(device)
        self._one_group = one_group.to(device)
        self.dst = order.dst[self.members].long().to(device)
        first = torch.full((self.num_classes,), -1).index_put_((class_of.flip(0),), torch.arange(len(class_of)).flip(0))
        self._first = first.to(device)
        self._src = order.src[self.members].long().to(device)
        self._stored: list[tuple[int, tuple[Tensor, ...], slice]] = []
        shapes = {index: parameter.shape for index, parameter in enumerate(parameters)}
        for index, span in Flattened(shapes).spans.items():
            low, high = torch.searchsorted(self.members, torch.tensor([span.start, span.stop])).tolist()
            if high > low:
                places = torch.unravel_index((self.members[low:high] - span.start).to(device), shapes[index])
                self._stored.append((index, places, slice(low, high)))
        self._device = device

    def _place(self, elements: Tensor) -> Tensor:
        """Where elements stand among the members; after the last for -1."""
        return torch.where(elements >= 0, torch.searchsorted(self.members, elements), len(self.members))

    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The members' entries of tensors in the shapes of the parameters, float64 [members]; zero for None."""
        values = torch.zeros(len(self.members), dtype=torch.float64, device=self._device)
        for index, places, here in self._stored:
            tensor = tensors[index]
            if tensor is not None:
                values[here] = tensor[places].to(torch.float64)
        return values

    def write_(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Put values [members] into tensors in the shapes of the parameters."""
        for index, places, here in self._stored:
            tensors[index][places] = values[here].to(tensors[index].dtype)

    def chains(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values of ``in(γ)`` and ``out(γ)``, float64 [groups + 1], from those of the members; 1 for no chain."""
        padded = torch.cat([values, values.new_ones(1)])
        return _products(padded[self._in_step], self._in_parents), _products(padded[self._out_step], self._out_parents)

    def of_classes(self, per_group: Tensor) -> Tensor:
        """What is the same for all groups of a class, [classes], from its values by group."""
        return per_group[self._one_group]

    def path_flows(self, flows: Tensor, through: Tensor) -> Tensor:
        """``y`` of each class: the members' flows less what flows into its groups, [classes].

        Args:
            flows: ``θ_e ∂L/∂θ_e`` of the members.
            through: its sum over the elements that lead into each group, [groups + 1].
        """
        result = torch.zeros(self.num_classes + 1, dtype=torch.float64, device=self._device)
        result.index_add_(0, self.class_of, flows)
        return result.index_add_(0, self.class_of_group, through, alpha=-1.0)[:-1]

    def member_flows(self, path_flows: Tensor, heads: Tensor, tails: Tensor) -> Tensor:
        """The flows ``Σ_{p ∋ e} y_p`` of the members, float64 [members], from those of the basis paths.

        Args:
            path_flows: ``y`` of each class.
            heads, tails: [groups + 1], sums of ``y`` of the other basis paths by the groups that their own element
                leads into, and leads out of.
        """
        own = torch.zeros(len(self.members), dtype=torch.float64, device=self._device)
        own[self._first] = path_flows
        result = torch.cat([own, own.new_zeros(1)])
        for ends, sums, step, parents in (
            (self._src, tails, self._in_step, self._in_parents),
            (self.dst, heads, self._out_step, self._out_parents),
        ):
            arriving = sums.index_add(0, ends, own)
            result.index_add_(0, step, _accumulated(arriving, parents))
        return result[:-1]


def require_skeleton(order: ElementOrder, entering: object, leaving: object) -> None:
    """Raise ValueError for what is no skeleton of a network: chains through other elements, or without an end."""
    size = order.num_groups + 1
    for name, chosen, near, far in (
        ("entering", entering, order.dst, order.src),
        ("leaving", leaving, order.src, order.dst),
    ):
        where = f"{name!r} of the state's skeleton"
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.int64 or chosen.shape != (size,):
            raise ValueError(f"{where} is not of a network with {counted(size - 1, 'free scale group')}")
        chosen = chosen.cpu()
        if bool(((chosen < -1) | (chosen >= len(near))).any()) or int(chosen[0]) != -1:
            raise ValueError(f"{where} names elements that the network does not have")
        groups = torch.nonzero(chosen >= 0)[:, 0]
        elements = chosen[groups]
        if bool((near[elements].long() != groups).any()) or bool((order.entry[elements] < 0).any()):
            raise ValueError(
                f"{where} is that of another architecture: elements are not at the groups that they are for"
            )
        parents = _other_end(far, chosen)
        if bool((parents > 0).logical_and(chosen[parents] < 0).any()):
            raise ValueError(f"{where} has chains that break off before they reach a fixed end")
        for _ in range(size.bit_length()):
            parents = parents[parents]
        if bool(parents.any()):
            raise ValueError(f"{where} has chains that go in a circle")
    assert isinstance(entering, Tensor)
    assert isinstance(leaving, Tensor)
    if not torch.equal(entering.cpu() >= 0, leaving.cpu() >= 0):
        raise ValueError("the state's skeleton enters other groups than it leaves")


def _accumulated(sums: Tensor, parents: Sequence[Tensor]) -> Tensor:
    """For each group the sum over those whose chains it is on, itself among them."""
    for further in parents:
        sums = sums.index_fill(0, torch.zeros(1, dtype=torch.int64, device=sums.device), 0.0)
        sums = sums.index_add(0, further, sums)
    return sums


def _other_end(ends: Tensor, elements: Tensor) -> Tensor:
    found = torch.zeros_like(elements)
    chosen = elements >= 0
    found[chosen] = ends[elements[chosen]].long()
    return found


def _doublings(parents: Tensor, device: torch.device) -> list[Tensor]:
    """The groups 1, 2, 4, … steps on along the chains, until all have ended."""
    found = []
    while bool(parents.any()):
        found.append(parents.to(device))
        parents = parents[parents]
    return found


def _products(steps: Tensor, parents: Sequence[Tensor]) -> Tensor:
    for further in parents:
        steps = steps * steps[further]
    return steps
