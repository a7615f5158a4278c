"""Which parameters of a traced model an optimizer moves in path space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dagpath.distributed import is_spread, reshard
from dagpath.trace import TracedModel


def check_rates(lr: float, momentum: float = 0.0) -> None:
    """Raise ValueError for a learning rate or a momentum out of range."""
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")


def check_steps(name: str, steps: object) -> None:
    """Raise for what is no positive number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{name} must be a number of steps, got {steps!r}")
    if steps < 1:
        raise ValueError(f"{name} must be at least 1, got {steps}")


def inverse_of(values: Tensor) -> Tensor:
    """1 / values, and zero where that is infinite."""
    inverse = 1 / values
    return torch.where(inverse.isinf(), 0.0, inverse)


def trained_edges(traced: TracedModel) -> dict[str, Tensor]:
    """The parameters that are edges between neurons and require gradients, by name."""
    named = traced.model.named_parameters()
    return {name: p for name, p in named if p.requires_grad and name not in traced.graph.not_edges}


def parameter_groups(traced: TracedModel) -> list[dict[str, Any]]:
    """One group of the trained edges, ``paths`` set; another of the other parameters that require gradients.

    Raises:
        TypeError: a parameter is spread over processes.
    """
    reshard(traced.model)
    for name, parameter in traced.model.named_parameters():
        if is_spread(parameter):
            raise TypeError(
                f"the parameter {name!r} is spread over processes (a DTensor), whose paths no optimizer here follows; "
                "dagpath.optim.Rebalance works on such models, with any optimizer of torch.optim"
            )
    edges = trained_edges(traced)
    others = [p for name, p in traced.model.named_parameters() if p.requires_grad and name not in edges]
    return [{"params": list(edges.values()), "paths": True}, *([{"params": others}] if others else [])]


def evaluate(optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step returns, None without one; the gradients are there then.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if any(p.grad is not None and p.grad.is_sparse for group in optimizer.param_groups for p in group["params"]):
        kind = type(optimizer).__name__
        raise RuntimeError(f"{kind} does not take sparse gradients: make the embedding with sparse=False")
    return loss
