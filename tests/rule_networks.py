"""Small networks that use every rule: for each, how many scale groups are free."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from networks import Net

relu = torch.relu
matrix = functools.partial(torch.tensor, dtype=torch.float64)
ones = functools.partial(torch.ones, dtype=torch.float64)


class Case(NamedTuple):
    """A network's forward, its parts, the shapes of its inputs without the batch, and its free groups."""

    function: Callable[..., Any]
    parts: dict[str, Callable[[], Any]]
    shapes: tuple[tuple[int, ...], ...]
    groups: int

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The network and its inputs: float64, parameters and statistics drawn."""
        generator = torch.Generator().manual_seed(0)
        net = Net(self.function, **{name: part() for name, part in self.parts.items()}).double().eval()
        inputs = tuple(torch.randn(2, *shape, generator=generator).double() for shape in self.shapes)
        with torch.no_grad():
            net(*inputs)  # lazy layers get their shapes
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            for name, buffer in net.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        return net, inputs


def layer(*sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes, **options)


def conv(dims: int, *sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*sizes, **options)


def parameter(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


VECTORS = {"a": layer(3, 4), "b": layer(3, 4), "head": layer(4, 2)}


def vectors(function: Callable[..., Any], groups: int, **parts: Any) -> Case:
    """Layers ``a`` and ``b`` from 3 inputs to 4 units, ``head`` from these to 2 outputs."""
    return Case(function, {**VECTORS, **parts}, ((3,),), groups)


def images(dims: int, function: Callable[[Tensor], Tensor]) -> Case:
    """A layer to 4 channels, a function, and a layer that tells all positions apart."""
    parts = {"a": conv(dims, 1, 4, 1), "head": lambda: nn.LazyLinear(1)}
    return Case(
        lambda m, x: m.head(function(relu(m.a(x))).flatten(1)), parts, ((1, *[5 - dims + (dims > 2)] * dims),), 4
    )


def convolutions(dims: int, size: int, middle: Callable[[], nn.Module], groups: int) -> Case:
    """A layer to 4 channels, a layer, and one that tells all positions apart."""
    parts = {"a": conv(dims, 1, 4, 1), "b": middle, "head": lambda: nn.LazyLinear(1)}
    return Case(lambda m, x: m.head(relu(m.b(relu(m.a(x)))).flatten(1)), parts, ((1, *[size] * dims),), groups)


def written(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.empty(len(x), 4, dtype=x.dtype)
    y[:, :2] = relu(m.a(x))[:, :2]
    y[:, 2:] = m.b(x)[:, 2:]
    return m.head(y)


def filled(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[:, :1] = 0.5
    return m.head(relu(y))


def attended(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(relu(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))))


MEAN = (
    lambda x: F.adaptive_avg_pool1d(x, 3),
    lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    lambda x: F.adaptive_avg_pool3d(x, (3, 1, 2)),
)
LARGEST = (
    lambda x: F.adaptive_max_pool1d(x, 3),
    lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    lambda x: F.adaptive_max_pool3d(x, (3, 1, 2)),
)

COLUMNS = (
    lambda y: torch.sigmoid(y)[:, 1:2],
    lambda y: relu(y)[:, 1:2],
    lambda y: y.flip(1)[:, :1],
    lambda y: y[:, 1:2].detach(),
    lambda y: y.gather(1, torch.tensor([[2], [1]])),
    lambda y: y[:, :1].masked_fill(y[:, 1:2] > 0, 0.0),
    lambda y: y[:, :1].nan_to_num(0.0, math.inf, -math.inf),
    lambda y: y[:, :1] / 2,
    lambda y: y[:, :1] / y[:, 1:2].abs(),
    lambda y: y[:, :1] - y[:, 1:2],
    lambda y: y[:, :1] + y[:, 1:2],
    lambda y: y[:, :1] * 2,
    lambda y: y[:, :1].clamp(min=0.0),
    lambda y: torch.maximum(y[:, :1], y[:, 1:2]),
    lambda y: (y > 0).double()[:, 1:2],
    lambda y: y.max(1, keepdim=True).indices.double(),
    lambda y: F.layer_norm(y, (4,))[:, :1],
    lambda y: F.group_norm(y, 2)[:, :1],
    lambda y: y.cumsum(1)[:, :1],
    lambda y: torch.cat([y[:, :1], y[:, 1:2]], 1)[:, :1],
    lambda y: F.pad(y, (0, 1))[:, :1],
    lambda y: y[:, :1].expand_as(y)[:, 1:2],
    lambda y: y.sum(1, keepdim=True),
    lambda y: y.mean(1, keepdim=True),
    lambda y: torch.full_like(y[:, :1], 0.5),
    lambda y: torch.ones_like(y[:, :1]),
    lambda y: torch.zeros_like(y[:, :1]).copy_(y[:, :1]),
    lambda y: F.adaptive_max_pool1d(y[:, None], 2, True)[1][:, 0, :1].double(),
    lambda y: F.adaptive_max_pool2d(y.view(-1, 1, 2, 2), 1, True)[1].flatten(1).double(),
    lambda y: F.adaptive_max_pool3d(y.view(-1, 1, 1, 2, 2), 1, True)[1].flatten(1).double(),
    lambda y: y.max(1, keepdim=True).values,
    lambda y: y.amax(1, keepdim=True),
    lambda y: F.adaptive_max_pool1d(y[:, None], 2)[:, 0, :1],
    lambda y: F.adaptive_max_pool2d(y.view(-1, 1, 2, 2), 1).flatten(1),
    lambda y: F.adaptive_max_pool3d(y.view(-1, 1, 1, 2, 2), 1).flatten(1),
    lambda y: F.max_pool2d(y.view(-1, 1, 2, 2), 2, return_indices=True)[0].flatten(1),
    lambda y: F.adaptive_avg_pool1d(y[:, None], 2)[:, 0, :1],
    lambda y: F.max_pool2d(y.view(-1, 1, 2, 2), 2, return_indices=True)[1].flatten(1).double(),
    lambda y: F.interpolate(y[:, None], 2, mode="linear")[:, 0, :1],
    lambda y: torch.diag_embed(y)[:, 0, :1],
    lambda y: y @ ones(4, 1),
    lambda y: torch.einsum("bi,ij->bj", y, ones(4, 1)),
    lambda y: F.linear(y, ones(1, 4)),
    lambda y: F.conv1d(y[:, None], ones(1, 1, 4))[:, 0],
)
"""What keeps its scale, made of an input of 4 entries: a column."""

CASES: dict[str, Case] = {
    "constants of every kind": Case(
        lambda m, x, y: m.head(relu(m.a(x) + torch.cat([column(y) for column in COLUMNS], 1))),
        {"a": layer(3, len(COLUMNS)), "head": layer(len(COLUMNS), 2)},
        ((3,), (4,)),
        0,
    ),
    "chain": vectors(lambda m, x: m.head(relu(m.b(x))) + m.head(F.leaky_relu(m.a(x), 0.25)), 4),
    "residual": vectors(lambda m, x: (lambda y: m.head(relu(y + m.c(relu(y)))))(m.a(x)), 4, c=layer(4, 4)),
    "difference": vectors(lambda m, x: m.head(relu(m.a(x) - m.b(x)) - 2 * m.b(x)), 4),
    "sum with alpha": vectors(lambda m, x: m.head(torch.add(m.a(x), relu(m.b(x)), alpha=3)), 4),
    "difference with alpha": vectors(lambda m, x: m.head(torch.sub(m.a(x), relu(m.b(x)), alpha=3)), 4),
    "shift by a parameter": vectors(
        lambda m, x: m.head(relu(m.a(x) + m.p)) + m.head(relu(m.b(x) - m.p)), 4, p=parameter(4)
    ),
    "shift by one parameter": vectors(lambda m, x: m.head(relu(m.a(x) + m.p)), 1, p=parameter(1)),
    "constant added": vectors(lambda m, x: m.head(relu(relu(m.a(x)) + 1.5) + m.b(x)), 0),
    "constant added to other": vectors(lambda m, x: m.c(relu(m.head(relu(m.a(x))) - 1.5)), 4, c=layer(2, 2)),
    "choice": vectors(lambda m, x: m.head(torch.maximum(m.a(x), relu(m.b(x)))), 4),
    "smaller": vectors(lambda m, x: m.head(torch.minimum(m.a(x), -relu(m.b(x)))), 4),
    "by condition": vectors(lambda m, x: m.head(torch.where(x[:, :1] > 0, m.a(x), relu(m.b(x)))), 4),
    "by comparison": vectors(lambda m, x: m.head(torch.where(m.a(x) > m.b(x), m.a(x), 0.0)), 4),
    "by sign": vectors(lambda m, x: m.head(relu(m.a(x)) * (m.b(x) > 0)), 8),
    "by size": vectors(lambda m, x: m.head(relu(m.a(x)) * (m.b(x) > 0.5)), 4),
    "clamp": vectors(lambda m, x: m.head(m.a(x).clamp(min=0) + m.b(x).clamp(max=0.0)), 4),
    "bounded": vectors(lambda m, x: m.head(relu(m.a(x)).clamp(max=0.5) + m.c(m.b(x))), 4, c=layer(4, 4)),
    "numbers for nan": vectors(lambda m, x: m.head(m.a(x).nan_to_num(0.0, math.inf, -math.inf)), 4),
    "other numbers for nan": vectors(lambda m, x: m.head(m.a(x).nan_to_num(1.0)), 0),
    "masked": vectors(lambda m, x: m.head(m.a(x).masked_fill(torch.arange(4) > 1, 0.0)), 4),
    "masked by one": vectors(lambda m, x: m.head(m.a(x).masked_fill(torch.arange(4) > 1, 1.0)), 0),
    "masked by values": vectors(lambda m, x: m.head(m.a(x).masked_fill(m.b(x) > 0, 0.0)), 8),
    "gate": vectors(lambda m, x: m.head(relu(m.a(x)) * torch.sigmoid(m.b(x))), 4),
    "two factors": vectors(lambda m, x: m.head(relu(m.a(x)) * relu(m.b(x))), 4),
    "layer scale": vectors(lambda m, x: m.head(relu(m.a(x)) * m.p + m.b(x)), 8, p=parameter(4)),
    "one scale": vectors(lambda m, x: m.head(relu(m.a(x)) * m.p), 4, p=parameter(1)),
    "gained weight": vectors(
        lambda m, x: m.head(relu(F.linear(relu(m.a(x)), m.p * m.g))), 4 + 4, p=parameter(4, 4), g=parameter(4, 4)
    ),
    "halved": vectors(lambda m, x: m.head(relu(0.5 * m.a(x)) / 3 * -1), 4),
    "times constants": vectors(lambda m, x: m.head(relu(m.a(x)) * matrix([1.0, -2.0, 0.0, 0.5])), 4),
    "quotient": vectors(lambda m, x: m.head(relu(m.a(x)) / (1 + m.b(x).abs())), 4),
    "over constants": vectors(lambda m, x: m.head(relu(m.a(x)) / matrix([1.0, -2.0, 4.0, 0.5])), 4),
    "over a parameter": vectors(lambda m, x: m.head(relu(m.a(x)) / m.p), 4, p=parameter(4)),
    "rounded": vectors(lambda m, x: m.head(torch.div(relu(m.a(x)), 0.5, rounding_mode="floor")), 0),
    "weight over constants": vectors(lambda m, x: m.head(relu(F.linear(x, m.a.weight / 4))), 4),
    "sigmoid": vectors(lambda m, x: m.c(relu(m.head(torch.sigmoid(m.a(x))))), 2, c=layer(2, 2)),
    "moved": vectors(lambda m, x: m.head(relu(m.a(x).flip(1)[:, torch.tensor([1, 0, 3, 2])])), 4),
    "gathered": vectors(lambda m, x: m.head(m.a(x).gather(1, x.new_tensor([[3, 1, 0, 2]] * 2).long())), 4),
    "indexed by values": vectors(lambda m, x: m.head(m.a(x).gather(1, m.b(x).argsort(1))), 1),
    "added by index": vectors(lambda m, x: m.head(m.a(x).index_add(1, torch.tensor([3, 2, 1, 0]), m.b(x))), 4),
    "chosen by the input": vectors(lambda m, x: m.c(m.a(x).gather(1, x.argsort(1))), 1, c=layer(3, 2)),
    "added by indices that repeat": vectors(  # the last of each place is zero
        lambda m, x: m.head(m.a(x).index_add(1, torch.tensor([1, 3, 1, 3]), F.pad(m.b(x)[:, :2], (0, 2)))),
        6,
    ),
    "added to zeros by indices that repeat": vectors(
        lambda m, x: m.head(
            F.pad(x[:, :1] * 0, (1, 2)).index_add(1, torch.tensor([1, 3, 1, 3]), F.pad(m.b(x)[:, :2], (0, 2))) + m.a(x)
        ),
        5,
    ),
    "added where the input says": vectors(  # the last unit of b is read by nothing
        lambda m, x: m.head(m.a(x).index_add(1, x[0].argsort(), m.b(x)[:, :3], alpha=2)), 2
    ),
    "added to zeros where the input says": vectors(
        lambda m, x: m.head(F.pad(m.a(x)[:, :2], (0, 2)).index_add(1, x[0].argsort(), m.b(x)[:, :3])), 4
    ),
    "zeros added where the input says": vectors(
        lambda m, x: m.head(m.a(x).index_add(1, x[0].argsort(), torch.zeros_like(m.b(x))[:, :3])),
        5,
    ),
    "read as another type": vectors(lambda m, x: m.head(m.a(x).view(torch.int64).to(x.dtype) * 2.0**-62 + m.b(x)), 0),
    "halves swapped": vectors(lambda m, x: m.head(relu(torch.cat(m.a(x).chunk(2, 1)[::-1], 1))), 4),
    "concatenated": vectors(lambda m, x: m.c(relu(torch.cat([m.a(x), m.b(x)], 1))), 8, c=layer(8, 2)),
    "moved weight": vectors(lambda m, x: m.head(relu(F.linear(x, torch.cat([m.a.weight[2:], m.a.weight[:2]])))), 4),
    "tied": vectors(
        lambda m, x: m.head(relu(F.linear(relu(m.a(m.b(x)[:, :3])), m.a.weight.t())[:, :1].expand(-1, 4))), 2
    ),
    "padded": vectors(lambda m, x: m.head(F.pad(m.a(x)[:, :3], (1, 0)) + m.b(x)), 5),
    "padded apart": vectors(lambda m, x: m.head(F.pad(m.a(x)[:, :2], (0, 2)) + F.pad(m.b(x)[:, :2], (2, 0))), 8),
    "padded by one": vectors(lambda m, x: m.head(F.pad(m.a(x)[:, :3], (1, 0), value=1.0) + relu(m.b(x))), 4),
    "triangle": vectors(
        lambda m, x: m.head((m.a(x)[:, :, None] * m.eye).tril().sum(1) + m.b(x)), 14, eye=lambda: torch.eye(4)
    ),
    "constant triangle": vectors(lambda m, x: m.head((m.a(x)[:, :, None] * ones(4, 4)).tril().sum(1) + m.b(x)), 1),
    "full": vectors(lambda m, x: m.head(relu(m.a(x) * torch.full_like(m.b(x), 2.0)) + torch.full_like(m.b(x), 0.0)), 8),
    "full of ones": vectors(lambda m, x: m.c(relu(m.head(m.a(x) + torch.full_like(m.b(x), 0.5)))), 6, c=layer(2, 2)),
    "diagonal": vectors(lambda m, x: m.head(relu(torch.diag_embed(m.a(x))[:, 0] + torch.diag_embed(m.b(x))[:, 1])), 8),
    "copied": vectors(lambda m, x: m.head(relu(torch.zeros_like(m.b(x)).copy_(m.a(x)))), 8),
    "written": vectors(written, 8),
    "filled": vectors(filled, 3),
    "zeros": vectors(
        lambda m, x: m.head(torch.cat([relu(m.a(x))[:, :2], torch.zeros(len(x), 2, dtype=torch.float64)], 1) + m.b(x)),
        6,
    ),
    "ones": vectors(lambda m, x: m.head(relu(m.a(x)[:, :2].repeat(1, 2) * ones(2, 4)) + torch.ones_like(m.b(x))), 6),
    "like": vectors(lambda m, x: m.head(relu(m.a(x)).reshape(len(x), 2, 2).reshape_as(m.b(x))), 8),
    "expanded": vectors(lambda m, x: m.head(relu(m.a(x)[:, :1].expand_as(m.b(x)) - m.b(x))), 4),
    "weight like": vectors(lambda m, x: m.head(relu(F.linear(x, m.p.reshape_as(m.a.weight)))), 4, p=parameter(3, 4)),
    "other type": vectors(lambda m, x: m.head(relu(m.a(x)).to(torch.float32).to(torch.float64).detach()), 4),
    "in integers": vectors(lambda m, x: m.head(relu(m.a(x)).to(torch.int64).double()), 0),
    "matrix product": vectors(lambda m, x: m.head(relu(relu(m.a(x)) @ m.p)), 8, p=parameter(4, 4)),
    "constant matrix": vectors(lambda m, x: m.head(relu(relu(m.a(x)) @ matrix([[1.0, 2], [-1, 1]]).repeat(2, 2))), 1),
    "addmm": vectors(
        lambda m, x: m.head(relu(torch.addmm(m.q, relu(m.a(x)), m.p))), 8, p=parameter(4, 4), q=parameter(4)
    ),
    "two tensors": vectors(
        lambda m, x: m.head(relu(torch.bmm(m.a(x)[:, :, None], torch.sigmoid(m.b(x))[:, None])).sum(1)), 1
    ),
    "einsum": vectors(lambda m, x: m.head(relu(torch.einsum("bi,oi->bo", relu(m.a(x)), m.p))), 8, p=parameter(4, 4)),
    "einsum of tensors": vectors(
        lambda m, x: m.head(torch.einsum("bi,bj->bj", relu(m.a(x)), torch.sigmoid(m.b(x)))), 1
    ),
    "low rank": vectors(
        lambda m, x: m.head(relu(F.linear(relu(m.a(x)), m.p @ m.q))), 4 + 2 + 4, p=parameter(4, 2), q=parameter(2, 4)
    ),
    "sum of weights": vectors(lambda m, x: m.head(relu(F.linear(x, m.a.weight + m.b.weight))), 4),
    "constant weight": vectors(lambda m, x: m.head(F.linear(relu(m.a(x)), ones(4, 4), m.b.bias)), 1),
    "embedding": Case(
        lambda m, x: m.head(relu(m.table((x > 0).long()))),
        {"table": lambda: nn.Embedding(2, 4), "head": layer(4, 2)},
        ((3,),),
        4,
    ),
    "attention": Case(attended, {**{n: layer(3, 4) for n in "qkv"}, "head": layer(4, 2)}, ((5, 3),), 4),
    "layer norm": vectors(lambda m, x: m.head(relu(m.n(m.a(x)))), 4, n=lambda: nn.LayerNorm(4)),
    "batch norm": vectors(lambda m, x: m.head(relu(m.n(relu(m.a(x))))), 4, n=lambda: nn.BatchNorm1d(4)),
    "plain batch norm": vectors(
        lambda m, x: m.c(m.head(relu(m.n(m.a(x))))), 2, n=lambda: nn.BatchNorm1d(4, affine=False), c=layer(2, 2)
    ),
    "group norm": vectors(lambda m, x: m.head(relu(m.n(m.a(x)))), 4, n=lambda: nn.GroupNorm(2, 4)),
    "norm of a norm": vectors(
        lambda m, x: m.head(relu(m.k(m.n(x)))), 4, n=lambda: nn.LayerNorm(3, elementwise_affine=False), k=layer(3, 4)
    ),
    "weight norm": vectors(
        lambda m, x: m.head(relu(m.n(relu(m.a(x))))),
        1 + 3,
        n=lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        head=layer(3, 2),
    ),
    "mean": Case(lambda m, x: m.head(relu(m.a(x)).mean(2)), {"a": conv(1, 2, 4, 2), "head": layer(4, 2)}, ((2, 5),), 4),
    "mean of units": vectors(lambda m, x: m.c(relu(m.a(x)).mean(1, keepdim=True)), 1, c=layer(1, 2)),
    "sum of units": vectors(lambda m, x: m.c(relu(m.a(x)).sum(1, keepdim=True)), 1, c=layer(1, 2)),
    "largest unit": vectors(
        lambda m, x: m.c(m.a(x).amax(1, keepdim=True) + m.b(x).min(1, keepdim=True).values), 1, c=layer(1, 2)
    ),
    "cumulative sum": vectors(lambda m, x: m.head(relu(m.a(x)).cumsum(1)), 1),
    "cumulative sum of rows": Case(
        lambda m, x: m.head(relu(m.a(x)).cumsum(1)), {"a": layer(3, 4), "head": layer(4, 2)}, ((5, 3),), 4
    ),
    "patches": images(2, lambda x: F.unfold(x, 2)),
    "patches and back": images(2, lambda x: F.fold(F.unfold(x, 2, padding=1), x.shape[2:], 2, padding=1)),
    "patches of rows": Case(
        lambda m, x: m.head(F.fold(relu(m.a(x)), (2, 3), (1, 2)).flatten(1)),
        {"a": layer(4, 4), "head": lambda: nn.LazyLinear(1)},
        ((4, 4),),
        1,
    ),
    **{
        f"mean {n}d": images(n, lambda x, n=n: (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1](x, 2, 1, 1))
        for n in (1, 2, 3)
    },
    **{
        f"largest {n}d": images(n, lambda x, n=n: (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1](x, 2, 1))
        for n in (1, 2, 3)
    },
    **{f"adaptive mean {n}d": images(n, MEAN[n - 1]) for n in (1, 2, 3)},
    **{f"adaptive largest {n}d": images(n, LARGEST[n - 1]) for n in (1, 2, 3)},
    **{
        f"{mode} interpolation": images(n, lambda x, mode=mode: F.interpolate(x, scale_factor=1.5, mode=mode))
        for n, mode in enumerate(("linear", "bilinear", "trilinear"), 1)
    },
    **{f"convolution {n}d": convolutions(n, 3, conv(n, 4, 4, 2, groups=2), 8) for n in (1, 2, 3)},
    "transposed convolution": convolutions(2, 2, lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), 10),
    "transposed convolution of signals": convolutions(
        1, 3, lambda: nn.ConvTranspose1d(4, 3, 3, padding=1, bias=False), 7
    ),
    "constant kernel": Case(
        lambda m, x: m.head(F.conv1d(relu(m.a(x)), matrix([[[1.0, 2.0], [-1.0, 0.5]]])).flatten(1)),
        {"a": conv(1, 2, 2, 1), "head": lambda: nn.LazyLinear(1)},
        ((2, 3),),
        1,
    ),
    "shift by a difference": vectors(lambda m, x: m.head(relu(m.a(x) - m.p)), 4, p=parameter(4)),
    "padded, then subtracted": vectors(
        lambda m, x: m.head(F.pad(m.a(x)[:, :2], (0, 2)) - F.pad(m.b(x)[:, :2], (2, 0))), 8
    ),
    "larger of padded": vectors(
        lambda m, x: m.head(torch.maximum(F.pad(m.a(x)[:, :2], (0, 2)), F.pad(m.b(x)[:, :2], (2, 0)))), 8
    ),
    "zeros and zeros": vectors(
        lambda m, x: m.head(F.pad(m.a(x)[:, :2], (0, 2)) + F.pad(m.b(x)[:, :2], (0, 2)) + m.c(x)), 8, c=layer(3, 4)
    ),
    "relu of zeros": vectors(lambda m, x: m.head(relu(F.pad(m.a(x)[:, :2], (0, 2))) + m.b(x)), 6),
    "zeros moved": vectors(lambda m, x: m.head(F.pad(m.a(x)[:, :2], (0, 2)).flip(1) + m.b(x)), 6),
    "stacked with a parameter": vectors(
        lambda m, x: m.head(torch.stack([relu(m.a(x)), m.p.expand(len(x), -1)]).sum(0)), 4, p=parameter(4)
    ),
    "functions of the input": Case(
        lambda m, x, y: m.head(torch.sigmoid(y) + (y > 0).double() + relu(m.a(x))), VECTORS, ((3,), (4,)), 0
    ),
    "weights over positions": Case(
        lambda m, x: m.head(relu(m.b(relu(m.a(x)))).flatten(1)),
        {"a": conv(1, 2, 4, 1), "b": layer(3, 3), "head": layer(12, 2)},
        ((2, 3),),
        1 + 3,
    ),
    "beside constants": vectors(
        lambda m, x: m.head(relu(torch.cat([m.a(x)[:, :2], matrix([[1.0, 2.0]]).expand(len(x), 2)], 1))), 4
    ),
    "plus zeros": vectors(lambda m, x: m.head(relu(m.a(x)) + torch.zeros_like(m.b(x))), 8),
    "prelu": vectors(lambda m, x: m.head(F.prelu(m.a(x), m.p) + relu(m.b(x)) * m.p), 4, p=parameter(4)),
    "divisor that is a scale": vectors(
        lambda m, x: m.head(relu(m.a(x)) / m.p + m.c(relu(m.b(x)) * m.p)), 8, p=parameter(4), c=layer(4, 4)
    ),
    "gain that is a weight": vectors(
        lambda m, x: m.head(relu(F.linear(relu(m.a(x)), m.p * m.g)) + F.linear(relu(m.b(x)), m.g)),
        5,
        p=parameter(4, 4),
        g=parameter(4, 4),
    ),
    "direction that is a weight": vectors(
        lambda m, x: m.head(
            relu(m.n(relu(m.a(x)))) + m.c(relu(F.linear(m.b(x), m.n.parametrizations.weight.original1)))
        ),
        6,
        n=lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        c=layer(4, 4),
    ),
    "gates of the input": Case(
        lambda m, x, y: m.head(relu(m.a(x)) * torch.sigmoid(y) + relu(m.b(x)) * (y > 0)),
        {**VECTORS},
        ((3,), (4,)),
        4,
    ),
    "over the input": Case(lambda m, x, y: m.head(relu(m.a(x)) / (1 + y.abs())), VECTORS, ((3,), (4,)), 4),
    "times the input": Case(lambda m, x, y: m.head(torch.bmm(y, relu(m.a(x)))), VECTORS, ((5, 3), (2, 5)), 4),
    "einsum with the input": Case(
        lambda m, x, y: m.head(torch.einsum("bij,bjk->bik", y, relu(m.a(x)))), VECTORS, ((5, 3), (2, 5)), 4
    ),
    "weight norm of the input": vectors(
        lambda m, x: m.head(relu(m.n(x))), 4, n=lambda: parametrizations.weight_norm(nn.Linear(3, 4, bias=False))
    ),
    "attention of the input": Case(
        lambda m, x, y: m.head(F.scaled_dot_product_attention(y, y.flip(1), relu(m.a(x)))), VECTORS, ((5, 3), (5, 2)), 4
    ),
}
