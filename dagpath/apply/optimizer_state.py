"""What an optimizer remembers about parameters, and how that moves when the parameters are multiplied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dagpath.apply.multiply import Moving

_TORCH = {
    "SGD": {"momentum_buffer": -1},
    "Adam": {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    "AdamW": {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    "NAdam": {"exp_avg": -1, "exp_avg_sq": -2},
    "RAdam": {"exp_avg": -1, "exp_avg_sq": -2},
    "Adamax": {"exp_avg": -1, "exp_inf": -1},
    "RMSprop": {"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0},
    "Adagrad": {"sum": -2},
    "Adadelta": {"square_avg": -2, "acc_delta": 0},
    "Rprop": {"prev": -1, "step_size": 0},
    "ASGD": {"ax": 1},
    "Muon": {"momentum_buffer": -1},
}
"""{optimizer of torch.optim: {buffer: power}}. Not every version of PyTorch has all of them."""
_POWERS: dict[type[Optimizer], dict[str, float]] = {
    getattr(torch.optim, name): dict(powers) for name, powers in _TORCH.items() if hasattr(torch.optim, name)
}


_IMPOSSIBLE = {
    "LBFGS": "it keeps inner products over all parameters",
    "Adafactor": "it keeps sums of squared gradients over rows and columns",
}
_REFUSED = {getattr(torch.optim, name): why for name, why in _IMPOSSIBLE.items() if hasattr(torch.optim, name)}
"""{optimizer of torch.optim: why its state cannot be computed for the rescaled network}."""


def register_state(optimizer_class: type[Optimizer], powers: Mapping[str, float]) -> None:
    """Say how the state of an optimizer moves when its parameters are multiplied by μ.

    Each buffer is multiplied by μ to a power, element by element. When θ is multiplied by μ, its gradient g is divided
    by it, and the buffer should be what the optimizer would have computed from the gradients g / μ:

    - ``-1`` for what is linear in past gradients, such as momentum;
    - ``-2`` for what is made of their squares;
    - ``1`` for what is made of past parameters, such as their average;
    - ``0`` for what does not move, such as a momentum of steps g / sqrt(v), which are the same for g / μ. Buffers of
      any type and shape may stay.

    Numbers and tensors of dimension 0 that are not named stay as they are: they count steps. Everything else that is
    not named is refused by :meth:`dagpath.Rescaling.apply_to_optimizer_`.

    Args:
        optimizer_class: a subclass of ``torch.optim.Optimizer``. Subclasses of it count as the same, unless they are
            registered themselves; registering a class again replaces what was said of it.
        powers: {name of the buffer in ``optimizer.state[parameter]``: power}; empty for an optimizer without state.

    Raises:
        TypeError: it is no class of optimizers, or a power is no number.
        ValueError: a power is not finite.

    Source: the chain rule.

    Example:
        >>> import torch, dagpath
        >>> class SignMomentum(torch.optim.Optimizer):
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, {"lr": lr})
        ...     @torch.no_grad()
        ...     def step(self):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 m = self.state[p].setdefault("momentum", torch.zeros_like(p))
        ...                 m.mul_(0.9).add_(p.grad)
        ...                 p.sub_(group["lr"] * m.sign())
        >>> dagpath.optim.register_state(SignMomentum, {"momentum": -1})
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"expected a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
    for buffer, power in powers.items():
        if not isinstance(power, (int, float)):
            raise TypeError(f"the power of {buffer!r} must be a number, got {type(power).__name__}")
        if not math.isfinite(power):
            raise ValueError(f"the power of {buffer!r} must be finite, got {power}")
    _POWERS[optimizer_class] = dict(powers)


def moving_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> list[Moving]:
    """State and gradients of those of the parameters that the optimizer holds; nothing is changed.

    Raises:
        TypeError: it is no optimizer.
        ValueError: state that is not known, or not of the parameter's shape.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    powers = _powers_of(optimizer)
    for key in optimizer.state:
        if not isinstance(key, Tensor):
            raise ValueError(
                f"{_kind(optimizer)} keeps state under {key!r}, which is no parameter, so that a rescaling cannot "
                "carry it along; balance before training instead; nothing was changed"
            )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moving = []
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            continue
        if parameter.grad is not None:
            moving.append(
                _checked(Moving(name, f"the gradient of {name!r}", parameter.grad, -1, kept=False), parameter)
            )
        for buffer, value in optimizer.state.get(parameter, {}).items():
            label = f"{buffer!r} of {name!r} in {_kind(optimizer)}"
            if buffer not in powers:
                _check_uncounted(label, value, optimizer)
            elif powers[buffer] and value is not None:
                moving.append(_checked(Moving(name, label, value, powers[buffer], kept=False), parameter))
    return moving


def _kind(optimizer: Optimizer) -> str:
    return type(optimizer).__qualname__


def _powers_of(optimizer: Optimizer) -> Mapping[str, float]:
    for base in type(optimizer).__mro__:
        if base in _POWERS:
            return _POWERS[base]
        if base in _REFUSED:
            raise ValueError(
                f"the state of {_kind(optimizer)} cannot be carried along with a rescaling: {_REFUSED[base]}; "
                "rescale before it is made; nothing was changed"
            )
    buffers = sorted({str(buffer) for state in optimizer.state.values() for buffer in state})
    found = f", which keeps {', '.join(map(repr, buffers))}," if buffers else ""
    raise ValueError(
        f"it is not known how the state of {_kind(optimizer)}{found} moves with a rescaling: if its buffers "
        "have the shape of their parameter, say so with "
        f"dagpath.optim.register_state({_kind(optimizer)}, {{buffer: power}}); nothing was changed"
    )


def _check_uncounted(label: str, value: Any, optimizer: Optimizer) -> None:
    if value is None or isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.ndim == 0):
        return
    raise ValueError(
        f"{label}: it is not known how this buffer moves with a rescaling: say so, and of the other buffers too, with "
        f"dagpath.optim.register_state({_kind(optimizer)}, {{buffer: power}}); nothing was changed"
    )


def _checked(moving: Moving, parameter: Tensor) -> Moving:
    tensor: object = moving.tensor
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{moving.label} is no tensor but of type {type(tensor).__name__}; nothing was changed")
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{moving.label} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}: it cannot be "
            "multiplied element by element; nothing was changed"
        )
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ValueError(
            f"{moving.label} is {tensor.layout} of {tensor.dtype}; only dense tensors of floating-point numbers can be "
            "multiplied in place; nothing was changed"
        )
    return moving
