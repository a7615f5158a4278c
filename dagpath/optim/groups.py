"""Which parameters of a traced model an optimizer moves in path space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dagpath.runtime.distributed import is_spread, reshard
from dagpath.trace import TracedModel
from dagpath.words import counted


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


def check_state(optimizer: Optimizer, state: object, buffers: Mapping[str, type[Tensor] | type[int]]) -> None:
    """Raise ValueError for what cannot be the state of an optimizer of the same kind and architecture.

    Args:
        optimizer: the one that is to take the state over; it is not changed.
        state: what ``state_dict`` returned, or anything else.
        buffers: what is kept for a parameter: a tensor of its shape and kind, or a number.
    """
    kind = type(optimizer).__name__
    kept, groups = (state.get(part) if isinstance(state, Mapping) else None for part in ("state", "param_groups"))
    if not isinstance(kept, Mapping) or not isinstance(groups, list):
        raise ValueError(f"this is no state of a {kind}: expected what its state_dict() returned")
    own = optimizer.param_groups
    if len(groups) != len(own):
        raise ValueError(
            f"this is no state of this {kind}: it has {counted(len(groups), 'parameter group')}, not {len(own)}"
        )
    known: dict[object, Tensor] = {}
    for index, (group, mine) in enumerate(zip(groups, own, strict=True)):
        where = f"parameter group {index} of the state"
        missing = [name for name in ("params", *optimizer.defaults) if not isinstance(group, dict) or name not in group]
        if missing:
            raise ValueError(f"this is no state of a {kind}: {where} has no {missing[0]!r}")
        numbers = group["params"]
        if not (isinstance(numbers, list) and all(map(is_count, numbers)) and len(numbers) == len(mine["params"])):
            raise ValueError(f"{where} is for other parameters: this {kind} has {len(mine['params'])} in it")
        if bool(group["paths"]) != bool(mine["paths"]):
            raise ValueError(f"{where} is for other parameters: whether they are edges of paths differs")
        check_group(group, where)
        known |= dict(zip(numbers, mine["params"], strict=True))
    for number, entries in kept.items():
        if number not in known or not isinstance(entries, Mapping):
            raise ValueError(f"the state of parameter {number!r} is none that a {kind} has")
        for name, value in entries.items():
            wanted, shape = buffers.get(str(name)), tuple(known[number].shape)
            if wanted is None or not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f"the state of parameter {number!r} has {name!r}, none that a {kind} has")
            if isinstance(value, Tensor) and (tuple(value.shape) != shape or not value.is_floating_point()):
                raise ValueError(
                    f"{name!r} of parameter {number!r} is {value.dtype} of shape {tuple(value.shape)}, for a parameter "
                    f"of shape {shape}: this is the state of another architecture"
                )


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for options of a parameter group that are out of range or of a wrong type."""
    try:
        check_rates(float(group["lr"]), float(group.get("momentum", 0.0)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if "steps" in group and not is_count(group["steps"]):
        raise ValueError(f"{where}: 'steps' must be a number of steps, got {group['steps']!r}")


def is_count(value: object) -> bool:
    """Is it a whole number of at least 0?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
