"""Balancing a model again and again while it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dagpath.apply.optimizer_state import moving_state
from dagpath.apply.rescaling import Rescaling
from dagpath.balance import BalanceOptions
from dagpath.criteria import Criterion, EquiNorm
from dagpath.optim.groups import check_steps, is_count
from dagpath.runtime.distributed import reshard, warn_if_alone
from dagpath.trace import TracedModel, require_traced


class Rebalance:
    """Balance a model after every k-th step of its optimizer, and carry the optimizer's state along.

    After step k, 2k, 3k, …, each parameter is multiplied by the factors μ of :func:`dagpath.balance`, and the state of
    the optimizer, and gradients that are still there, by the powers of μ in the table of
    :meth:`dagpath.Rescaling.apply_to_optimizer_`. The function of the model stays, in train and eval mode; what changes
    is where the next steps lead. If anything fails, parameters and state are what they were after the step.

    This is a handle. The optimizer stays your own and is used as ever; its step calls the handle (a hook made with
    ``optimizer.register_step_post_hook``). So learning-rate schedulers, closures, gradient clipping and accumulation,
    ``GradScaler``, autocast, parameter groups and compiled models need nothing else.

    Args:
        traced: the trace of the model that is trained.
        optimizer: the optimizer of its parameters, or several, if parts of the model have different ones; then the
            steps of the last one count, which should be the one that steps last.
        every: k, the number of steps from one balancing to the next.
        criterion: as in :func:`dagpath.balance`.
        **balance_options: its other options, such as ``power_of_two=True``, with which outputs stay bitwise the same.

    Attributes:
        traced: what was given.
        optimizers: what was given, as a tuple.
        every: what was given.
        options: the options of balancing.
        steps: steps taken so far.
        rescaling: the last :class:`dagpath.Rescaling` that was applied, or None.

    Raises:
        TypeError: no trace, no optimizer, or an option that does not exist.
        ValueError: a bad option; an optimizer whose state is not known (:func:`dagpath.optim.register_state` makes it
            known); a trainable parameter that the rescaling may move and that none of the optimizers holds, since the
            state of one that does would be left behind. A step can raise the last two also.
        BalanceError: (a step) a parameter is not finite, or a product leaves the range of its type.

    Warns:
        UserWarning: (a step) the solver stopped before it reached its tolerance; once, and not where you set
            ``max_iter``.

    Cost: what :func:`dagpath.balance` and :meth:`dagpath.Rescaling.apply_` cost, every k-th step; nothing between.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> rebalance = dagpath.optim.Rebalance(dagpath.trace(net, torch.zeros(1, 4)), optimizer, every=2)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(6, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> rebalance.steps, rebalance.rescaling.converged
        (5, True)
        >>> rebalance.remove()
    """

    def __init__(
        self,
        traced: TracedModel,
        optimizer: Optimizer | Iterable[Optimizer],
        every: int,
        criterion: str | Criterion = BalanceOptions.criterion,
        **balance_options: Any,
    ) -> None:
        require_traced(traced)
        check_steps("every", every)
        self.traced = traced
        self.optimizers = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
        self.every = every
        self.options = BalanceOptions(criterion, **balance_options)
        self.steps = 0
        self.rescaling: Rescaling | None = None
        self._stepping = False
        self._warned = False
        if not self.optimizers:
            raise ValueError("no optimizer was given")
        for one in self.optimizers:
            moving_state(one, {})
        self._check_all_held()
        warn_if_alone(traced.peers)
        last = self.optimizers[-1]
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))  # a step may be compiled
        self._hooks = last.register_step_pre_hook(before), last.register_step_post_hook(after)

    def remove(self) -> None:
        """Balance no more. The model and the optimizer stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken: with the states of the model and of the optimizer, all that a restart needs."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is something else. Nothing is changed.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"steps"}:
            found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"expected a dictionary with the key 'steps' alone, got {found}")
        if not is_count(state_dict["steps"]):
            raise ValueError(f"'steps' must be a number of steps, got {state_dict['steps']!r}")
        self.steps = state_dict["steps"]

    def _before_step(self, *_: object) -> None:
        self._stepping = True

    def _after_step(self, *_: object) -> None:
        if not self._stepping:  # PyTorch calls hooks twice where the step of a subclass calls that of its parent
            return
        self._stepping = False
        self.steps += 1
        if self.steps % self.every:
            return
        self._check_all_held()
        rescaling = self.options.minimize(self.traced)
        rescaling.apply_(optimizers=self.optimizers)
        self.rescaling = rescaling
        if not (rescaling.converged or self._warned or self.options.max_iter is not None):
            self._warned = True
            warnings.warn(self.options.shortfall(rescaling), stacklevel=4)  # the line that calls optimizer.step()

    def _check_all_held(self) -> None:
        reshard(self.traced.model)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        held = {id(parameter) for group in groups for parameter in group["params"]}
        for name, parameter in self.traced.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in held and name in self.traced.graph.movable:
                raise ValueError(
                    f"parameter {name!r} is trainable, but the optimizer does not hold it. If another one does, give a "
                    "list of both, so that the state of both is carried along; otherwise freeze the parameter with "
                    "requires_grad_(False) (it is rescaled all the same)"
                )


class EquiNormCycle(Rebalance):
    """One cycle of ENorm after every step of an optimizer: norms in and out of each neuron are made more equal.

    A cycle goes once through the free scale groups, from the first layer to the last. Each group gets the factor that,
    with all others as they are, makes the sums of p-th powers of the parameters that enter it and of those that leave
    it equal, which is where the sum over all parameters is the smallest::

        λ = (Σ_out |θ|^p / Σ_in |θ|^p)^(1 / 2p)

    Biases are incoming. Many cycles lead to the minimum of :class:`dagpath.EquiNorm`; in training, one after each step
    keeps up with it. Everything else is as in :class:`Rebalance`: the optimizer's state is carried along.

    Args:
        traced: the trace of the model that is trained.
        optimizer: the optimizer of its parameters, or several.
        p: the exponent, at least 1.
        every: the number of steps from one cycle to the next.

    Attributes and errors: those of :class:`Rebalance`.

    Cost: some passes over the parameters in float64, and a few operations per channel.

    Source: Stock, Graham, Gribonval, Jégou 2019 (ENorm).

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> cycle = dagpath.optim.EquiNormCycle(dagpath.trace(net, torch.zeros(1, 4)), optimizer)
        >>> net(torch.randn(6, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> incoming = net[0].weight.square().sum(1) + net[0].bias.square()
        >>> torch.allclose(incoming, net[2].weight.square().sum(0))
        True
    """

    def __init__(
        self, traced: TracedModel, optimizer: Optimizer | Iterable[Optimizer], p: float = 2.0, every: int = 1
    ) -> None:
        super().__init__(traced, optimizer, every, EquiNorm(p), solver="coordinate", max_iter=1)
