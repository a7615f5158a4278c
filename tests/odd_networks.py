"""Small networks written in odd ways: weights made of parameters, integers, barriers, no parameters at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Odd(nn.Module):
    """A function of a module with many small parts, and of its inputs."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.head, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        shapes = {"p": (4, 4), "q": (4, 4), "r": (4, 4), "v": (4,), "w": (4,), "u": (4, 2), "low": (4, 1), "s": ()}
        for name, shape in {**shapes, "g": (4, 1), "table": (5, 4)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("order", torch.tensor([1, 0, 3, 2]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("whole", torch.tensor([2, 1, 3, 1]))
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)

    def forward(self, *inputs: Tensor) -> object:
        return self.function(self, *inputs)


def first(m: Odd, x: Tensor) -> Tensor:
    return F.relu(m.a(x))


def layer(weight: Callable, bias: Callable | None = None) -> Callable:
    """A layer of this weight between two others."""
    return lambda m, x: m.head(F.relu(F.linear(first(m, x), weight(m), None if bias is None else bias(m))))


def shifted(bias: Callable) -> Callable:
    return lambda m, x: m.head(F.relu(m.a(x) + bias(m)))


def of_hidden(function: Callable) -> Callable:
    return lambda m, x: m.head(function(m, first(m, x)))


def twice(weight: Callable) -> Callable:
    def forward(m: Odd, x: Tensor) -> Tensor:
        shared = weight(m)
        return m.head(F.relu(F.linear(F.relu(F.linear(first(m, x), shared)), shared)))

    return forward


WEIGHTS = {
    "two factors": layer(lambda m: m.p @ m.q),
    "three factors": layer(lambda m: m.p @ m.q @ m.r),
    "three factors from the right": layer(lambda m: m.p @ (m.q @ m.r)),
    "a product of products": layer(lambda m: (m.p @ m.q) @ (m.r @ m.p)),
    "a weight and three factors": layer(lambda m: m.b.weight + m.p @ m.q @ m.r),
    "a sum times a factor": layer(lambda m: (m.b.weight + m.p @ m.q) @ m.r),
    "a factor and its transpose": layer(lambda m: m.p.t() @ m.p),
    "a square": layer(lambda m: m.p @ m.p),
    "an einsum of three": layer(lambda m: torch.einsum("ij,jk,kl->il", m.p, m.q, m.r)),
    "a sum": layer(lambda m: m.p + m.q + m.r),
    "a weighted sum": layer(lambda m: torch.sub(m.p, m.q, alpha=2) + 0.3 * m.r),
    "a parameter and itself": layer(lambda m: m.p + m.p),
    "a symmetric weight": layer(lambda m: m.p + m.p.t()),
    "a scaled update": layer(lambda m: m.b.weight + 0.5 * (m.p @ m.q)),
    "a scaled product": layer(lambda m: 2 * (m.p @ m.q) / 3),
    "a product with gains": layer(lambda m: m.v[:, None] * (m.p @ m.q)),
    "a product with gains of its inputs": layer(lambda m: m.v * (m.p @ m.q)),
    "a masked product": layer(lambda m: torch.eye(4) * (m.p @ m.q)),
    "rows of a product": layer(lambda m: torch.cat([(m.p @ m.q)[:2], m.r[:2]])),
    "one row of a product twice": layer(lambda m: (m.p @ m.q)[[0, 0, 2, 3]]),
    "a whole product added": layer(lambda m: torch.addmm(m.r, m.p, m.q)),
    "a product used twice": twice(lambda m: m.p @ m.q),
    "a sum used twice": twice(lambda m: m.p + m.q),
    "padded": layer(lambda m: F.pad(m.u, (0, 2))),
    "padded with a number": layer(lambda m: F.pad(m.u, (1, 1), value=0.5)),
    "a lower triangle": layer(lambda m: m.p.tril()),
    "a skew weight": layer(lambda m: m.p.triu(1) - m.p.triu(1).t()),
    "a diagonal": layer(lambda m: torch.diag(m.v)),
    "joined": layer(lambda m: torch.cat([m.u, m.low, m.low], 1)),
    "joined with zeros": layer(lambda m: torch.cat([m.u, torch.zeros(4, 2, dtype=m.u.dtype)], 1)),
    "stacked": layer(lambda m: torch.stack([m.v, m.w, 2 * m.v, m.w], 1)),
    "sliced": layer(lambda m: m.p[:, [1, 0, 2, 3]]),
    "an outer product": layer(lambda m: torch.outer(m.v, m.w)),
    "weight norm": layer(lambda m: m.g * m.p / m.p.norm(dim=1, keepdim=True)),
    "the operation of weight norm": layer(lambda m: 3 * torch._weight_norm(m.p, m.g, 0)),
    "a standardized weight": layer(lambda m: (m.p - m.p.mean(1, keepdim=True)) / m.p.std(1, keepdim=True)),
    "minus a parameter": layer(lambda m: -m.p),
    "a positive weight": layer(lambda m: m.p.abs()),
    "a choice of weights": layer(lambda m: torch.where(m.mask, m.p, m.q)),
    "in other types": layer(lambda m: m.p.float().double()),
    "twice a bias": shifted(lambda m: 2 * m.v),
    "a third of a bias": shifted(lambda m: m.v / 3),
    "thrice a scalar bias": shifted(lambda m: 3 * m.s),
    "a product of biases": shifted(lambda m: m.v * m.w),
    "a computed bias": shifted(lambda m: m.p @ (m.q @ m.v)),
    "minus a bias": lambda m, x: m.head(F.relu(-m.v + m.a(x))),
    "a bias with a factor": lambda m, x: m.head(F.relu(torch.add(m.a(x), m.v, alpha=2))),
    "a bias of a layer": layer(lambda m: m.p, lambda m: m.v + 2 * m.w),
    "a layer of a parameter": lambda m, x: m.head(first(m, x)) + m.head(m.v),
    "a divisor": of_hidden(lambda m, y: y / m.v),
    "a gain with a factor": of_hidden(lambda m, y: 2 * m.v * y),
    "a constant matrix": of_hidden(lambda m, y: y @ torch.arange(16.0, dtype=y.dtype).view(4, 4)),
    "weights 1, 1, 4": of_hidden(lambda m, y: F.linear(y, torch.tensor([[1.0, 1, 4, 0]] * 4, dtype=y.dtype))),
    "a constant and twice a layer": of_hidden(lambda m, y: torch.add(torch.arange(4.0).to(y), y, alpha=2)),
}

OTHERS = {
    "an index": of_hidden(lambda m, y: y[:, m.order].masked_fill(torch.arange(4) > 2, 0.0)),
    "a mask": of_hidden(lambda m, y: y * m.mask),
    "integers": of_hidden(lambda m, y: (y * m.whole + m.whole) / torch.arange(1, 5)),
    "a gathered order": of_hidden(lambda m, y: y.gather(1, m.order[None].expand(len(y), 4))),
    "a weight times integers": layer(lambda m: m.p * m.whole),
    "a comparison": of_hidden(lambda m, y: y * (y > 0)),
    "the largest": of_hidden(lambda m, y: y + F.one_hot(y.argmax(1), 4)),
    "a barrier in the middle": of_hidden(lambda m, y: torch.sigmoid(y)),
    "a barrier at the end": lambda m, x: torch.sigmoid(m.head(first(m, x))),
    "a barrier at the start": lambda m, x: m.head(first(m, torch.sigmoid(x))),
    "two barriers": lambda m, x: m.head(torch.sigmoid(m.b(torch.tanh(m.a(x))))),
    "a gate": of_hidden(lambda m, y: y * torch.sigmoid(m.b(y))),
    "a stored normalization": lambda m, x: m.head(F.relu(m.norm(m.a(x)))),
    "no parameter": lambda m, x: F.relu(x),
    "constants alone": lambda m, x: torch.ones(len(x), 2, dtype=x.dtype),
    "no path": lambda m, x: m.head(first(m, x)) * 0,
    "booleans": lambda m, x: m.head(first(m, x)) > 0,
    "several outputs": lambda m, x: (m.head(first(m, x)), first(m, x).argmax(1)),
}

DIRECT = {
    "times weights": lambda m, x: F.linear(F.relu(x * m.a.weight[0]), m.a.weight[1:]),
    "times weights and a bias": lambda m, x: F.relu(x * m.a.weight[0] + m.a.weight[1]) * 2,
    "times weights twice": lambda m, x: F.relu(x * m.a.weight[0]) * m.a.weight[1],
    "minus, times weights": lambda m, x: -(x * m.a.weight[0]),
    "the mean, times weights": lambda m, x: (x * m.a.weight[0]).mean(1),
    "shifted, times weights": lambda m, x: F.linear((x - 1) * m.a.weight[0], m.a.weight[1:]),
    "one of them, times weights": lambda m, x: m.head(F.relu(x[:, :1] * m.v)),
    "normalized": lambda m, x: F.linear(F.relu(F.layer_norm(x, (3,), m.a.weight[0], m.a.weight[1])), m.a.weight[2:]),
}
"""Inputs that enter something else than a linear layer."""

OF_INTEGERS = {
    "an embedding": lambda m, i: m.head(F.relu(F.embedding(i, m.table))),
    "a computed embedding": lambda m, i: m.head(F.relu(F.embedding(i, m.p @ m.q))),
    "a table by its numbers": lambda m, i: m.head(F.relu(m.table[i])),
    "ones and zeros": lambda m, i: m.head(F.relu(F.linear(F.one_hot(i, 4).to(m.p.dtype), m.p))),
    "a parameter times a condition": lambda m, i: m.head(m.v * (i > 1)[:, None]),
    "integers alone": lambda m, i: i + 1,
}


def all_networks() -> dict[str, tuple[Callable, Tensor]]:
    x, i = torch.linspace(-1, 2, 3, dtype=torch.float64)[None], torch.tensor([2])
    real = {name: (function, x) for name, function in {**WEIGHTS, **OTHERS, **DIRECT}.items()}
    return real | {name: (function, i) for name, function in OF_INTEGERS.items()}
