"""What the callbacks for all training loops have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from dagpath.balance import BalanceOptions
from dagpath.criteria import Criterion
from dagpath.optim.rebalance import Rebalance
from dagpath.runtime.state import unwrap
from dagpath.trace import trace


class Rebalancing:
    """A :class:`dagpath.optim.Rebalance` that is made once a training loop has a model and its optimizers.

    Args:
        example_inputs: as in :func:`dagpath.trace`: a tensor, or the tuple of positional arguments of the model's
            ``forward``. Tensors are moved to the device of the model.
        every: the number of steps of the optimizer from one balancing to the next.
        criterion: as in :func:`dagpath.balance`.
        kwargs: keyword arguments of ``forward``.
        submodule: the path of the part of the model that is traced, such as ``"backbone"``, whose ``forward`` takes the
            inputs; empty for the whole. Whatever outside of it shares its parameters would not be known.
        **balance_options: the other options of :func:`dagpath.balance`, such as ``power_of_two=True``.

    Attributes:
        rebalance: the handle of the training that runs or ran last, or None. Its ``steps`` and ``rescaling`` say what
            was done.

    What :func:`dagpath.trace` and :class:`dagpath.optim.Rebalance` raise is raised when training starts.

    Cost: a trace at the start of training; then what :class:`dagpath.optim.Rebalance` costs.

    Example:
        >>> import torch
        >>> from dagpath.integrations.rebalancing import Rebalancing
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> rebalancing = Rebalancing(torch.zeros(1, 4), every=2)
        >>> rebalancing.start(net, optimizer, steps=0)  # which a callback does when training starts
        >>> for _ in range(4):
        ...     optimizer.step()
        >>> rebalancing.stop()
        >>> rebalancing.rebalance.steps, rebalancing.rebalance.rescaling.converged
        (4, True)
    """

    def __init__(
        self,
        example_inputs: Tensor | tuple[Any, ...],
        every: int,
        criterion: str | Criterion = BalanceOptions.criterion,
        *,
        kwargs: Mapping[str, Any] | None = None,
        submodule: str = "",
        **balance_options: Any,
    ) -> None:
        self.example_inputs = example_inputs
        self.kwargs = dict(kwargs or {})
        self.every = every
        self.criterion = criterion
        self.submodule = submodule
        self.balance_options = balance_options
        self.rebalance: Rebalance | None = None

    def start(self, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], steps: int) -> None:
        """Trace the model and balance it after the optimizers' steps.

        Args:
            model: the model, or what it is part of.
            optimizers: one or several; the steps of the last one count.
            steps: how many of them were taken before.
        """
        self.stop()  # a training that was interrupted has left its hooks in the optimizer
        part = unwrap(model).get_submodule(self.submodule)
        device = next(part.parameters()).device
        inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.example_inputs, self.kwargs))
        self.rebalance = Rebalance(trace(part, *inputs), optimizers, self.every, self.criterion, **self.balance_options)
        self.rebalance.load_state_dict({"steps": steps})

    def stop(self) -> None:
        """Balance no more."""
        if self.rebalance is not None:
            self.rebalance.remove()
