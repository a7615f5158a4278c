"""Stochastic gradient descent in the space of path values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dagpath.apply.optimizer_state import register_state
from dagpath.optim.groups import (
    check_rates,
    check_state,
    check_steps,
    evaluate,
    inverse_of,
    is_count,
    parameter_groups,
    trained_edges,
)
from dagpath.optim.skeleton import Skeleton, require_skeleton
from dagpath.passes.flattened import Flattened
from dagpath.paths.basis import ElementOrder, choose_skeleton, element_order
from dagpath.trace import TracedModel, require_traced
from dagpath.words import counted

_ATTRIBUTES = {
    *("_max_ratio", "_refresh", "_order", "_ends", "_skeleton"),
    *("_momentum", "_steps", "_chosen_at", "_any_zero"),
}
"""What copies and pickles of a GSGD have besides what those of every optimizer have."""


class GSGD(Optimizer):
    """G-SGD: gradient descent on the values of basis paths, for any traced network.

    The function of a ReLU network depends on its parameters through the values of its paths, and those follow from the
    values ``v_p`` of the basis paths (:meth:`dagpath.PathLifting.basis`), which no rescaling of neurons changes. A step
    is ``v_p ← v_p − lr · ∂L/∂v_p``, with momentum ``b ← momentum · b + ∂L/∂v_p`` in place of the gradient. So two
    networks that differ by a rescaling have the same function after any number of steps.

    Each free scale group γ has an element ``s(γ)`` that leads into it and ``t(γ)`` that leads out of it; their chains
    from the inputs and to the outputs have values ``I_γ`` and ``O_γ``, which are 1 at fixed ends. The basis path of an
    element from α to β has the value ``v_e = I_α θ_e O_β``, so that ``∂L/∂v_e = (∂L/∂θ_e) / (I_α O_β)``. The elements
    ``s(γ)`` stay as they are, which picks one of the networks that differ by a rescaling; ``t(γ)`` takes the value that
    the path of both needs; every other element becomes ``(v_e − lr · ∂L/∂v_e) / (I_α O_β)``, with β's new chain.

    What could go wrong, and what happens:

    - An ordinary element may be zero and may change its sign: the step is a sum, nothing is divided by ``θ_e``.
    - The path of ``s(γ)`` and ``t(γ)`` carries the scale of its group, and all other paths through the group answer to
      it: it may neither vanish nor change its sign, and its slope is that of a whole neuron. So its value changes in
      one step by a factor from ``1 / max_ratio`` to ``max_ratio``. Every ``refresh`` steps the skeleton is chosen anew,
      at the heaviest chains, so that a path that withers gives its place to a stronger one; momentum is carried over to
      the new basis exactly. Where chains are equally heavy but for rounding, rounding decides, and rescaled copies may
      choose differently: weights that are all alike (constant initializations) need a little noise first.
    - A chain of value zero (a layer that is initialized with zeros): the elements before it wait, and the skeleton is
      chosen anew after 1, 2, 4, … steps until there is another chain.
    - A parameter that is frozen (``requires_grad`` false when the optimizer is made) keeps its values: its neurons keep
      their scale, as the inputs and outputs of the network do. One that is frozen later still follows the scale of its
      neurons, and its momentum; to hold it, freeze it and make the optimizer anew.

    All elements with the same basis paths take part, whether batch norm trains or not: in training mode a batch norm
    starts new paths, whose scale groups are the same.

    Args:
        traced: the traced model. All of its parameters are optimized: those that are edges in path space, the others
            (the slope of a PReLU, layers that do not stand on paths) by ordinary SGD, in a parameter group of their
            own. Parameters from elsewhere may be added by ``add_param_group``, for ordinary SGD.
        lr: the learning rate, positive or zero. Its unit is that of squared path values, so it compares to that of SGD
            only where skeletons are near one.
        momentum: from 0 to 1, without 1.
        skeleton: ``"heaviest"``: the chains of the largest values, which is the same choice in networks that differ by
            a rescaling. A positive number: these elements are set to it when the optimizer is made, and ``"ones"``
            to 1, as published; that changes the function of the model, so it is meant for a model that is not trained
            yet. To resume such a training, load the states of the model and of the optimizer after the optimizer is
            made.
        max_ratio: above 1; the largest factor by which the value of a skeleton path may change in one step.
        refresh: after how many steps the skeleton is chosen anew; None for never.

    Raises:
        TypeError: ``traced`` is no traced model, or ``refresh`` no number of steps.
        ValueError: an option is out of range.
        RuntimeError: a gradient is sparse.

    Cost: per step, three passes over the parameters more than SGD, and sums over them by group. Choosing the skeleton
    takes a few passes over the parameters on the CPU (``benchmarks/train.py`` counts it in); making the optimizer also
    a pass over the network's structure, seconds for a ResNet-50. Source: Meng et al., ICLR 2019, for chains of layers
    of one width; here for the scale groups of any network.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.optim import GSGD
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = GSGD(dagpath.trace(net, torch.zeros(1, 4)), lr=0.01, momentum=0.9)
        >>> x, target = torch.randn(16, 4), torch.randn(16, 2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = (net(x) - target).square().mean()
        ...     loss.backward()
        ...     _ = optimizer.step()
    """

    def __init__(
        self,
        traced: TracedModel,
        lr: float,
        momentum: float = 0.0,
        skeleton: str | float = "heaviest",
        max_ratio: float = 1.01,
        refresh: int | None = 100,
    ) -> None:
        require_traced(traced)
        check_rates(lr, momentum)
        named = dict(traced.model.named_parameters())
        members = _member_value(skeleton, list(named.values()))
        if not 1 < max_ratio < math.inf:
            raise ValueError(f"max_ratio must be finite and above 1, got {max_ratio}")
        if refresh is not None:
            check_steps("refresh", refresh)
        super().__init__(parameter_groups(traced), {"lr": lr, "momentum": momentum, "paths": False})
        self._max_ratio = max_ratio
        self._refresh = refresh
        self._order, self._ends = _restricted(traced, named, trained_edges(traced))
        self._steps = 0
        self._chosen_at = 0
        self._any_zero = False
        self._momentum: Tensor | None = None
        self._skeleton = self._choose()
        if members is not None:
            with torch.no_grad():
                parameters = self._parameters
                self._skeleton.write_(parameters, torch.full_like(self._skeleton.read(parameters), members))

    @property
    def _parameters(self) -> list[Tensor]:
        """The parameters that are edges, in the order in which their elements are numbered."""
        return next(group["params"] for group in self.param_groups if group["paths"])

    @torch.no_grad()
    def _choose(self) -> Skeleton:
        parameters = self._parameters
        values = torch.cat([torch.zeros(0), *(p.detach().cpu().double().reshape(-1) for p in parameters)])
        return Skeleton(self._order, *choose_skeleton(self._order, values), parameters)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model and returns the loss, with its gradients computed.

        Returns:
            What the closure returned; None without one.
        """
        loss = evaluate(self, closure)
        for group in self.param_groups:
            if group["paths"]:
                self._step_on_paths(group)
            else:
                self._plain_step(group)
        self._steps += 1
        return loss

    def _plain_step(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            step = parameter.grad
            if group["momentum"]:
                step = self._buffer(parameter).mul_(group["momentum"]).add_(step)
            parameter.sub_(step, alpha=float(group["lr"]))

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _step_on_paths(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = group["params"]
        gradients = [parameter.grad for parameter in parameters]
        if all(gradient is None for gradient in gradients):
            return
        if self._is_due():
            self.choose_skeleton()
        lr, momentum, skeleton = float(group["lr"]), group["momentum"], self._skeleton
        members = skeleton.read(parameters)
        inward, outward = skeleton.chains(members)
        current = skeleton.of_classes(inward * outward)
        ratios = self._ratios(group, members, gradients, current)
        of_groups = torch.cat([ratios, ratios.new_ones(1)])[skeleton.class_of_group]
        damped_in, damped_out = (inverse_of(chain.square()) for chain in (inward, outward))
        for parameter, gradient, (dst, src) in zip(parameters, gradients, self._ends, strict=True):
            scale = (lr * damped_out[dst] * damped_in[src]).to(_wide(parameter.dtype))  # without lr it may overflow
            change = of_groups[dst].to(parameter.dtype)
            if momentum:  # the buffer is I b O, in the units of the gradient
                buffer = self._buffer(parameter).mul_(momentum)
                gradient = buffer if gradient is None else buffer.add_(gradient)
            if gradient is not None:
                parameter.addcmul_(gradient, scale, value=-1.0)
            parameter.div_(change)
            if momentum:
                buffer.mul_(change)
        skeleton.write_(parameters, members * (ratios[skeleton.class_of] / of_groups[skeleton.dst]))

    def _ratios(
        self, group: dict[str, Any], members: Tensor, gradients: list[Tensor | None], current: Tensor
    ) -> Tensor:
        """The factor of the value of each skeleton path, [classes]."""
        through = self._through(gradients)
        flows = self._skeleton.path_flows(members * self._skeleton.read(gradients), through)
        step = flows * inverse_of(current)
        if group["momentum"]:
            if self._momentum is None:
                self._momentum = torch.zeros_like(step)
            step = self._momentum.mul_(group["momentum"]).add_(step)
        self._any_zero = bool((current == 0).any())
        ratios = 1 - float(group["lr"]) * step * inverse_of(current)
        return ratios.clamp(1 / self._max_ratio, self._max_ratio)

    def _through(self, slopes: Sequence[Tensor | None], at: int = 0) -> Tensor:
        """Sums of ``θ_e · slope_e`` over the elements into each group (or, at 1, out of it), float64 [groups + 1]."""
        sums = torch.zeros(self._order.num_groups + 1, dtype=torch.float64, device=self._skeleton.class_of.device)
        for parameter, slope, ends in zip(self._parameters, slopes, self._ends, strict=True):
            if slope is not None:
                part = (parameter.to(_wide(parameter.dtype)) * slope).sum_to_size(ends[at].shape)
                sums.index_add_(0, ends[at].reshape(-1), part.reshape(-1).to(torch.float64))
        return sums

    # -- choosing the skeleton anew ------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        age = self._steps - self._chosen_at
        if not age:
            return False
        return (self._refresh is not None and age >= self._refresh) or (self._any_zero and age.bit_count() == 1)

    @torch.no_grad()
    def choose_skeleton(self) -> None:
        """Choose the skeleton anew, at the heaviest chains, and carry the momentum over to its basis paths."""
        old, new = self._skeleton, self._choose()
        self._skeleton, self._chosen_at = new, self._steps
        if torch.equal(old.entering, new.entering) and torch.equal(old.leaving, new.leaving):
            self._skeleton = old
        elif self._momentum is not None:
            parameters = self._parameters
            buffers = [self._buffer(parameter) for parameter in parameters]
            members = old.read(parameters)
            old.write_(buffers, torch.zeros_like(members))
            inward, outward = old.chains(members)
            flows = old.member_flows(
                self._momentum * old.of_classes(inward * outward), self._through(buffers), self._through(buffers, at=1)
            )
            old.write_(buffers, flows * inverse_of(members))
            through = self._through(buffers)
            members = new.read(parameters)
            inward, outward = new.chains(members)
            flows = new.path_flows(members * new.read(buffers), through)
            self._momentum = flows * inverse_of(new.of_classes(inward * outward))

    # -- state ---------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name in _ATTRIBUTES}
        return {**super().__getstate__(), **own}

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, and with ``"skeleton"``: which elements it has, their momentum, and the steps taken."""
        skeleton = {"entering": self._skeleton.entering, "leaving": self._skeleton.leaving}
        counts = {"steps": self._steps, "chosen_at": self._chosen_at, "any_zero": self._any_zero}
        return {**super().state_dict(), "skeleton": {**skeleton, "momentum": self._momentum, **counts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another GSGD of the same architecture.

        Raises:
            ValueError: it is the state of something else, of another architecture, or a damaged one. Nothing is
                changed.
        """
        own = state_dict.get("skeleton") if isinstance(state_dict, Mapping) else None
        parts = ("entering", "leaving", "momentum", "steps", "chosen_at", "any_zero")
        if not isinstance(own, Mapping) or any(part not in own for part in parts):
            raise ValueError(
                f"this is no state of a GSGD of a network with {counted(self._order.num_groups, 'free scale group')}: "
                f"it has no 'skeleton' with {', '.join(map(repr, parts))}"
            )
        check_state(self, state_dict, {"momentum_buffer": Tensor})
        if not (is_count(own["steps"]) and is_count(own["chosen_at"]) and own["chosen_at"] <= own["steps"]):
            raise ValueError(f"the state's numbers of steps are none: {own['steps']!r}, {own['chosen_at']!r}")
        if not isinstance(own["any_zero"], bool):
            raise ValueError(f"'any_zero' of the state must be a bool, got {own['any_zero']!r}")
        require_skeleton(self._order, own["entering"], own["leaving"])
        skeleton = Skeleton(self._order, own["entering"].cpu(), own["leaving"].cpu(), self._parameters)
        momentum = own["momentum"]
        if momentum is not None and not (
            isinstance(momentum, Tensor)
            and momentum.dtype == torch.float64
            and momentum.shape == (skeleton.num_classes,)
        ):
            raise ValueError(
                f"'momentum' of the state must be a float64 tensor with one entry for each of the "
                f"{skeleton.num_classes:,} paths of its skeleton, got {getattr(momentum, 'shape', momentum)}"
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "skeleton"})
        self._skeleton, device = skeleton, skeleton.class_of.device
        self._momentum = None if momentum is None else momentum.to(device, copy=True)
        self._steps, self._chosen_at, self._any_zero = own["steps"], own["chosen_at"], own["any_zero"]


def _member_value(skeleton: object, parameters: Sequence[Tensor]) -> float | None:
    """What the elements of the skeleton are set to; None to keep them."""
    if isinstance(skeleton, str) and skeleton in ("heaviest", "ones"):
        return 1.0 if skeleton == "ones" else None
    if isinstance(skeleton, bool) or not isinstance(skeleton, (int, float)) or not skeleton > 0:
        raise ValueError(f"skeleton must be 'heaviest', 'ones' or a positive number, got {skeleton!r}")
    for dtype in {parameter.dtype for parameter in parameters if parameter.is_floating_point()}:
        if not torch.finfo(dtype).tiny <= skeleton <= torch.finfo(dtype).max:
            raise ValueError(f"skeleton must be in the range of the parameters' {dtype}, got {skeleton!r}")
    return float(skeleton)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which to compute with parameters of a type: float32 for the shorter ones."""
    return torch.promote_types(dtype, torch.float32)


def _restricted(
    traced: TracedModel, named: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> tuple[ElementOrder, list[tuple[Tensor, Tensor]]]:
    """Where the elements of the trained parameters stand, and the groups at their ends; what others touch is fixed."""
    ends = traced.graph.ends
    group_of = torch.arange(traced.graph.num_groups + 1)
    for name in named:
        if name not in trained:
            group_of[ends[name].dst.reshape(-1)] = 0
            group_of[ends[name].src.reshape(-1)] = 0
    order = element_order(traced)
    elements = Flattened(traced.graph.shapes)

    def kept(numbers: Tensor) -> Tensor:
        parts = elements.split(numbers).items()
        return torch.cat([numbers[:0], *(part.reshape(-1) for name, part in parts if name in trained)])

    found = [
        (group_of[ends[name].dst].to(parameter.device), group_of[ends[name].src].to(parameter.device))
        for name, parameter in trained.items()
    ]
    dst, src = (group_of[kept(end).long()].to(torch.int32) for end in (order.dst, order.src))
    return ElementOrder(dst, src, kept(order.entry), kept(order.leave), order.num_groups), found


register_state(GSGD, {"momentum_buffer": -1})
