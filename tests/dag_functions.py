"""Functions of one value or two that random networks are made of, by name."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": lambda x: F.relu(x),
    "relu in place": lambda x: F.relu_(x.clone()),
    "leaky": lambda x: F.leaky_relu(x, 0.25),
    "abs": lambda x: x.abs(),
    "neg": lambda x: -x,
    "clamp": lambda x: x.clamp(min=0),
    "negative part": lambda x: x.clamp(max=0.0),
}
"""Positively homogeneous functions."""

NOT_HOMOGENEOUS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(1),
    "relu6": F.relu6,
    "silu": F.silu,
    "constant added": lambda x: x + 0.5,
    "bounded": lambda x: F.hardtanh(x),
    "square": lambda x: x * x,
    "root": lambda x: (x.abs() + 1).sqrt(),
    "own gate": lambda x: x * torch.sigmoid(x),
    "divided by its size": lambda x: x / (1 + x.abs().sum(1, keepdim=True)),
    "divided by its norm": lambda x: F.normalize(x, dim=1),
    "its largest place": lambda x: x * (x == x.amax(1, keepdim=True)),
    "its sign": lambda x: x.sign(),
    "where it is positive": lambda x: torch.where(x > 0, x, 0.5 * x),
    "rounded": lambda x: x.round(),
}
"""Functions that are not positively homogeneous."""

NUMBERS = {
    "half": lambda x: 0.5 * x,
    "third": lambda x: x / 3,
    "negative": lambda x: x.mul(-2.0),
    "zero": lambda x: x * 0,
    "plus zeros": lambda x: x + torch.zeros_like(x),
    "plus ones": lambda x: x + torch.ones_like(x),
    "divided, rounded": lambda x: torch.div(x, 0.25, rounding_mode="floor"),
    "other type": lambda x: x.double().to(x.dtype),
    "detached": lambda x: x.detach(),
    "nan to num": lambda x: x.nan_to_num(0.0, math.inf, -math.inf),
    "masked": lambda x: x.masked_fill(torch.arange(x.shape[-1]) % 2 == 1, 0.0),
    "masked by one": lambda x: x.masked_fill(torch.arange(x.shape[-1]) % 2 == 1, 1.0),
    "expanded mean": lambda x: x.mean(1, keepdim=True).expand_as(x),
}
"""With numbers, constants and other types."""

REDUCTIONS = {
    "mean": lambda x, dim, keep: x.mean(dim, keep),
    "sum": lambda x, dim, keep: x.sum(dim, keep),
    "amax": lambda x, dim, keep: x.amax(dim, keep),
    "amin": lambda x, dim, keep: x.amin(dim, keep),
    "max": lambda x, dim, keep: x.max(dim, keep).values,
    "logsumexp": lambda x, dim, keep: x.logsumexp(dim, keep),
    "norm": lambda x, dim, keep: torch.linalg.vector_norm(x, dim=dim, keepdim=keep),
    "cumsum": lambda x, dim, keep: x.cumsum(dim),
}
"""Of a value, a dimension, and whether it is kept."""

SCALES = {
    "times": lambda x, p: x * p,
    "plus": lambda x, p: x + p,
    "minus": lambda x, p: x - p,
    "minus, turned": lambda x, p: p - x,
    "times one and": lambda x, p: x * (1 + p),
    "over": lambda x, p: x / (1 + p.abs()),
    "times its relu": lambda x, p: x * F.relu(p),
    "largest of": lambda x, p: torch.maximum(x, p),
}
"""Of a value and a parameter or a constant."""

JOINS = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "concatenation": lambda a, b: torch.cat([a, b], 1),
    "sum with a factor": lambda a, b: torch.add(a, b, alpha=2),
    "difference with a factor": lambda a, b: torch.sub(a, b, alpha=0.5),
    "largest": torch.maximum,
    "smallest": torch.minimum,
    "by condition": lambda a, b: torch.where(torch.arange(a.shape[-1]) % 2 == 0, a, b),
    "by sign": lambda a, b: torch.where(a > 0, a, b),
    "by comparison": lambda a, b: torch.where(a > b, a, b),
    "concatenation of positions": lambda a, b: torch.cat([a, b], -1),
    "stack": lambda a, b: torch.stack([a, b], 1),
    "sum in place": lambda a, b: a.clone().add_(b),
    "product": lambda a, b: a * b,
    "product with a relu": lambda a, b: a * F.relu(b),
    "product with a sigmoid": lambda a, b: a * torch.sigmoid(b),
    "quotient": lambda a, b: a / (1 + b.abs()),
    "matrix product": lambda a, b: a @ b.mT,
    "blend": lambda a, b: torch.lerp(a, b, 0.25),
    "mean of both": lambda a, b: (a + b) / 2,
    "mean of a stack": lambda a, b: torch.stack([a, b]).mean(0),
    "shape of the other": lambda a, b: a.reshape_as(b),
    "copied into": lambda a, b: torch.zeros_like(b).copy_(a),
}
"""Of two values."""


def _overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :1] = y[:, -1:] * 2
    return y


MOVES = {
    "flip": lambda x: x.flip(1),
    "flip positions": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "transposed": lambda x: x.transpose(1, -1),
    "permuted": lambda x: x.permute(0, *range(x.ndim - 1, 0, -1)),
    "positions swapped": lambda x: x.transpose(-1, -2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "flatten": lambda x: x.flatten(1),
    "flatten positions": lambda x: x.flatten(2),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "reshape": lambda x: x.reshape(x.shape[0], -1, 2),
    "new position": lambda x: x.unsqueeze(-1),
    "new channel": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x.squeeze(-1),
    "first half": lambda x: x.chunk(2, 1)[0],
    "last half": lambda x: x.chunk(2, 1)[-1],
    "halves swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: x.split((1, x.shape[1] - 1), 1)[1],
    "every second": lambda x: x[:, ::2],
    "without the first": lambda x: x[..., 1:],
    "one": lambda x: x[..., 0],
    "picked": lambda x: x[:, torch.arange(x.shape[1]) // 2],
    "gathered": lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)),
    "repeated": lambda x: x.repeat(1, 2, *[1] * (x.ndim - 2)),
    "interleaved": lambda x: x.repeat_interleave(2, -1),
    "stacked": lambda x: torch.stack([x, x.flip(1)], -1),
    "unbound": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "triangle": lambda x: x.tril(),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "patches": lambda x: F.unfold(x, 2),
    "patches and back": lambda x: F.fold(F.unfold(x, 2, padding=1), x.shape[2:], 2, padding=1),
    "windows": lambda x: x.unfold(-1, 2, 1),
    "partly replaced": lambda x: torch.slice_scatter(x, x[:, :1].flip(-1), 1, 0, 1),
    "partly overwritten": lambda x: _overwritten(x),
}
"""Data movement."""

MODULES = {
    "identity": lambda c: nn.Identity(),
    "dropout": lambda c: nn.Dropout(0.5),
    "channel dropout": lambda c: nn.Dropout1d(0.5),
    "prelu": lambda c: nn.PReLU(),
    "prelu of channels": lambda c: nn.PReLU(c),
    "random leaky": lambda c: nn.RReLU(),
}
"""Modules, given the number of channels."""
