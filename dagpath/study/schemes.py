"""Initialization schemes: the second moments of freshly drawn parameters, and the drawing itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Scheme:
    """How the weights of linear and convolutional layers are drawn.

    Attributes:
        variance: of a weight's elements, from its shape ``[out, in, *kernel]``.
        draw_: draws a weight in place.
        draws_bias: are biases uniform of variance ``1 / (3 fan_in)``, as PyTorch draws them, or zero?
    """

    variance: Callable[[torch.Size], float]
    draw_: Callable[[Tensor], object]
    draws_bias: bool = False


def _fan_in(shape: torch.Size) -> int:
    return math.prod(shape[1:])


def _fans(shape: torch.Size) -> int:
    return (shape[0] + shape[1]) * math.prod(shape[2:])


SCHEMES = {
    "default": Scheme(
        lambda shape: 1 / (3 * _fan_in(shape)), lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), draws_bias=True
    ),
    "kaiming": Scheme(lambda shape: 2 / _fan_in(shape), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
    "xavier": Scheme(lambda shape: 2 / _fans(shape), nn.init.xavier_normal_),
    "lecun": Scheme(lambda shape: 1 / _fan_in(shape), lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear")),
    "orthogonal": Scheme(lambda shape: 1 / max(shape[0], _fan_in(shape)), nn.init.orthogonal_),
}
"""Name of an initialization scheme -> how it draws weights. ``"default"`` is that of PyTorch's layers; the others are
those of :mod:`torch.nn.init` in the names of their authors, with normal distributions, for ReLU where that matters, and
biases of zero."""


def checked_scheme(scheme: str, gain: float) -> Scheme:
    """The scheme of a name.

    Raises:
        ValueError: there is none, or the gain is not positive and finite.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be positive and finite, got {gain}")
    return SCHEMES[scheme]


def second_moments(model: nn.Module, scheme: str = "default", gain: float = 1.0) -> dict[str, Tensor]:
    """``E[θ²]`` of every parameter, under a scheme for the weights and biases of linear and convolutional layers.

    Weights meet in sums over the inputs of a neuron, which hardly vary where there are many. A bias stands alone, so
    the biases of a layer do not all get the mean: they get squares spread like those of a uniform distribution, evenly,
    around that mean.

    All other parameters (those of normalizations, embeddings, parameters of one's own) have the mean of their squares
    in the model as it is, which is exact for constants such as the ones and zeros of a batch norm.

    Args:
        model: any model; only the shapes of what the scheme draws are read.
        scheme: ``"default"``, ``"kaiming"``, ``"xavier"``, ``"lecun"`` or ``"orthogonal"`` (as its variance).
        gain: factor of the weights; biases have none.

    Returns:
        parameter name -> float64 tensor of its shape, for :func:`dagpath.expected_gram_diagonal`.

    Raises:
        ValueError: an unknown scheme, or a gain that is not positive and finite.

    Example:
        >>> import torch
        >>> from dagpath.study import second_moments
        >>> moments = second_moments(torch.nn.Linear(2, 2))
        >>> moments["weight"], moments["bias"].mean()
        (tensor([[0.1667, 0.1667],
                [0.1667, 0.1667]], dtype=torch.float64), tensor(0.1667, dtype=torch.float64))
    """
    rule = checked_scheme(scheme, gain)
    drawn: dict[int, Tensor] = {}
    for layer in _layers(model):
        weight, bias = layer.weight, layer.bias
        drawn[id(weight)] = torch.full(weight.shape, rule.variance(weight.shape) * gain**2, dtype=torch.float64)
        if bias is not None:
            squares = (torch.arange(bias.numel(), dtype=torch.float64) + 0.5).square()
            drawn[id(bias)] = squares / squares.mean() * (rule.draws_bias / (3 * _fan_in(weight.shape)))
    return {
        name: drawn[id(parameter)] if id(parameter) in drawn else _mean_square(parameter)
        for name, parameter in model.named_parameters()
    }


def _mean_square(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().double().square().mean().expand(parameter.shape)


@torch.no_grad()
def initialize_(model: nn.Module, scheme: str = "default", gain: float = 1.0, seed: int | None = None) -> nn.Module:
    """Draw the weights and biases of linear and convolutional layers anew, in place.

    Args:
        model: the model; its other parameters and its buffers stay.
        scheme, gain: as for :func:`second_moments`.
        seed: of the draws, which then leave PyTorch's own generator as it was; None to draw from that.

    Returns:
        The model.

    Raises:
        ValueError: as for :func:`second_moments`.

    Example:
        >>> import torch
        >>> from dagpath.study import initialize_, mlp
        >>> net = initialize_(mlp(64, 32, 10), "kaiming", gain=0.5, seed=0)
        >>> net[0].bias.abs().max().item(), round(net[0].weight.std().item(), 2)  # 0.5 · sqrt(2 / 64)
        (0.0, 0.09)
    """
    rule = checked_scheme(scheme, gain)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for layer in _layers(model):
            rule.draw_(layer.weight)
            layer.weight.mul_(gain)
            if layer.bias is not None:
                bound = rule.draws_bias / math.sqrt(_fan_in(layer.weight.shape))
                layer.bias.uniform_(-bound, bound)
    return model


def _layers(model: nn.Module) -> list[nn.Linear | _ConvNd]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))]
