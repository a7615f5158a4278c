"""The operations that random networks are made of.

A kind draws its settings with ``pick(options)``, the simplest option first, builds its module if it has one, and runs.
Settings need not fit: what PyTorch refuses is left out of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Pick = Callable[[Sequence[Any]], Any]
Shape = tuple[int, ...]
"""Channels and positions, without the batch."""

_BOTH = (False, True)


class Kind:
    """A kind of operation.

    Attributes:
        operands: how many earlier values it reads.
        positions: does it need values that have positions?
        weight: how often it is drawn.
    """

    operands = 1
    positions = False
    weight = 2

    def settings(self, pick: Pick, shape: Shape) -> dict[str, Any]:
        return {}

    def module(self, shape: Shape, **settings: Any) -> nn.Module:
        return nn.Identity()

    def run(self, module: nn.Module, *values: Tensor, **settings: Any) -> Tensor:
        return module(*values)


class Parameters(nn.Module):
    """Parameters and buffers by name."""

    def __init__(self, buffers: dict[str, Tensor] | None = None, **shapes: Shape) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)


class Activation(Kind):
    weight = 6

    functions = {
        "relu": lambda x: F.relu(x),
        "relu in place": lambda x: F.relu_(x.clone()),
        "leaky": lambda x: F.leaky_relu(x, 0.25),
        "abs": lambda x: x.abs(),
        "neg": lambda x: -x,
        "clamp": lambda x: x.clamp(min=0),
        "negative part": lambda x: x.clamp(max=0.0),
    }

    def settings(self, pick, shape):
        return {"function": pick(list(self.functions))}

    def run(self, module, x, *, function):
        return self.functions[function](x)


class NotHomogeneous(Activation):
    weight = 1

    functions = {
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


class Layer(Kind):
    """A module of PyTorch."""

    weight = 2

    modules: dict[str, Callable[..., nn.Module]] = {
        "identity": lambda c: nn.Identity(),
        "dropout": lambda c: nn.Dropout(0.5),
        "channel dropout": lambda c: nn.Dropout1d(0.5),
        "prelu": lambda c: nn.PReLU(),
        "prelu of channels": lambda c: nn.PReLU(c),
        "random leaky": lambda c: nn.RReLU(),
    }

    def settings(self, pick, shape):
        return {"name": pick(list(self.modules))}

    def module(self, shape, name):
        return self.modules[name](shape[0])

    def run(self, module, x, **settings):
        return module(x)


class Linear(Kind):
    weight = 6

    def settings(self, pick, shape):
        return {"out": pick((2, 1, 3, 4)), "bias": pick(_BOTH), "norm": pick((False, False, False, True))}

    def module(self, shape, out, bias, norm):
        layer = nn.Linear(shape[-1], out, bias)
        return parametrizations.weight_norm(layer) if norm else layer

    def run(self, module, x, **settings):
        return module(x)


class Convolution(Kind):
    """Convolutions and their transposes in one to three dimensions."""

    positions = True
    weight = 8

    def settings(self, pick, shape):
        groups = pick([1, 1, *(g for g in (2, 3, 4) if shape[0] % g == 0)])
        return {
            "out": groups * pick((1, 2)),
            "kernel": pick((1, 2, 3)),
            "stride": pick((1, 1, 2)),
            "padding": pick((0, 1)),
            "dilation": pick((1, 1, 2)),
            "groups": groups,
            "bias": pick(_BOTH),
            "transposed": pick((False, False, True)),
            "mode": pick(("zeros", "zeros", "zeros", "reflect", "replicate", "circular")),
            "norm": pick((False, False, False, True)),
        }

    def module(self, shape, out, kernel, stride, padding, dilation, groups, bias, transposed, mode, norm):
        dims = len(shape) - 1
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        kind = (kinds if transposed else (nn.Conv1d, nn.Conv2d, nn.Conv3d))[dims - 1]
        options: dict[str, Any] = {} if transposed else {"padding_mode": mode}
        layer = kind(
            shape[0],
            out,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            **options,
        )
        return parametrizations.weight_norm(layer) if norm else layer

    def run(self, module, x, **settings):
        return module(x)


class MatrixProduct(Kind):
    """Products with parameters, and with constants."""

    weight = 3

    forms = (
        "right",
        "left",
        "einsum",
        "per channel",
        "low rank",
        "addmm",
        "constant",
        "gram",
        "standardized",
        "masked",
    )

    def settings(self, pick, shape):
        return {"form": pick(self.forms), "out": pick((2, 1, 3))}

    def module(self, shape, form, out):
        n = shape[-1]
        if form == "left":
            return Parameters(weight=(out, shape[-2]))
        if form == "per channel":
            return Parameters(weight=(shape[0], n, out))
        if form == "low rank":
            return Parameters(weight=(out, 2), other=(2, n))
        if form == "addmm":
            return Parameters(weight=(n, out), bias=(out,))
        if form in ("constant", "masked"):
            matrix = torch.arange(out * n).reshape(out, n) % 3 - 1.0
            return Parameters({"matrix": matrix}, **({"weight": (out, n)} if form == "masked" else {}))
        return Parameters(weight=(out, n))

    def run(self, module, x, form, out):
        if form == "right":
            return x @ module.weight.t()
        if form == "left":
            return module.weight @ x
        if form == "einsum":
            return torch.einsum("...i,oi->...o", x, module.weight)
        if form == "per channel":
            return x @ module.weight if x.ndim > 3 else torch.einsum("bci,cio->bco", x, module.weight)
        if form == "low rank":
            return F.linear(x, module.weight @ module.other)
        if form == "addmm":
            return torch.addmm(module.bias, x, module.weight)
        if form == "constant":
            return x @ module.matrix.t()
        if form == "gram":
            return F.linear(x, module.weight.t() @ module.weight)
        if form == "masked":
            return F.linear(x, module.weight * module.matrix)
        return F.linear(x, module.weight - module.weight.mean(1, keepdim=True))


class Transposed(Kind):
    """A tied weight: the layer of an earlier linear operation, the other way round."""

    def run(self, module, x, **settings):
        return F.linear(x, module.weight.t())


class Pool(Kind):
    positions = True
    weight = 3

    forms = ("max", "average", "adaptive average", "adaptive max")

    def settings(self, pick, shape):
        return {
            "form": pick(self.forms),
            "kernel": pick((2, 1, 3)),
            "stride": pick((1, 2, 3)),
            "padding": pick((0, 0, 1)),
            "ceil": pick(_BOTH),
            "dilation": pick((1, 1, 2)),
            "counts": pick((True, False)),
        }

    def run(self, module, x, form, kernel, stride, padding, ceil, dilation, counts):
        dims = x.ndim - 2
        if form == "max":
            return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1](x, kernel, stride, padding, dilation, ceil)
        if form == "average":
            return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1](x, kernel, stride, padding, ceil, counts)
        average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        largest = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        return (average if form == "adaptive average" else largest)[dims - 1](x, kernel)


class Reduce(Kind):
    weight = 3

    functions = {
        "mean": lambda x, dim, keep: x.mean(dim, keep),
        "sum": lambda x, dim, keep: x.sum(dim, keep),
        "amax": lambda x, dim, keep: x.amax(dim, keep),
        "amin": lambda x, dim, keep: x.amin(dim, keep),
        "max": lambda x, dim, keep: x.max(dim, keep).values,
        "logsumexp": lambda x, dim, keep: x.logsumexp(dim, keep),
        "norm": lambda x, dim, keep: torch.linalg.vector_norm(x, dim=dim, keepdim=keep),
        "cumsum": lambda x, dim, keep: x.cumsum(dim),
    }

    def settings(self, pick, shape):
        return {"function": pick(list(self.functions)), "dim": pick((-1, 1, 2)), "keep": pick(_BOTH)}

    def run(self, module, x, function, dim, keep):
        return self.functions[function](x, dim, keep)


class GlobalMean(Kind):
    positions = True
    weight = 1

    def run(self, module, x):
        return x.flatten(2).mean(2)


class Norm(Kind):
    weight = 3

    forms = ("batch", "layer", "group", "instance", "rms")

    def settings(self, pick, shape):
        return {"form": pick(self.forms), "affine": pick((True, False)), "stored": pick((True, True, False))}

    def module(self, shape, form, affine, stored):
        if form == "layer":
            return nn.LayerNorm(shape[-1], elementwise_affine=affine)
        if form == "rms":
            return nn.RMSNorm(shape[-1], elementwise_affine=affine, eps=1e-5)
        if form == "group":
            return nn.GroupNorm(2 if shape[0] % 2 == 0 else 1, shape[0], affine=affine)
        if form == "instance":
            if math.prod(shape[1:]) < 2:
                raise ValueError("one position has no variance")
            kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
            return kinds[len(shape) - 2](shape[0], affine=affine, track_running_stats=stored)
        kinds = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return kinds[len(shape) - 1](shape[0], affine=affine, track_running_stats=stored)

    def run(self, module, x, **settings):
        return module(x)


class Scale(Kind):
    """Parameters, and constants, that multiply or are added."""

    weight = 3

    functions = {
        "times": lambda x, p: x * p,
        "plus": lambda x, p: x + p,
        "minus": lambda x, p: x - p,
        "minus, turned": lambda x, p: p - x,
        "times one and": lambda x, p: x * (1 + p),
        "over": lambda x, p: x / (1 + p.abs()),
        "times its relu": lambda x, p: x * F.relu(p),
        "largest of": lambda x, p: torch.maximum(x, p),
    }

    def settings(self, pick, shape):
        shapes = [(shape[0], *[1] * (len(shape) - 1)), (1,), shape, shape[-1:]]
        return {"function": pick(list(self.functions)), "sizes": pick(shapes), "constant": pick(_BOTH)}

    def module(self, shape, function, sizes, constant):
        if constant:
            return Parameters({"factor": (torch.arange(math.prod(sizes)).reshape(sizes) + 1.0) % 3 - 1})
        return Parameters(factor=sizes)

    def run(self, module, x, function, **settings):
        return self.functions[function](x, module.factor)


class Number(Activation):
    weight = 3

    functions = {
        "half": lambda x: 0.5 * x,
        "third": lambda x: x / 3,
        "negative": lambda x: x.mul(-2.0),
        "zero": lambda x: x * 0,
        "plus zeros": lambda x: x + torch.zeros_like(x),
        "plus ones": lambda x: x + torch.ones_like(x),
        "divided, rounded": lambda x: torch.div(x, 0.25, rounding_mode="floor"),
        "other type": lambda x: x.double().to(x.dtype),
        "detached": lambda x: x.detach(),
        "nan to num": lambda x: x.nan_to_num(),
        "masked": lambda x: x.masked_fill(torch.arange(x.shape[-1]) % 2 == 1, 0.0),
        "masked by one": lambda x: x.masked_fill(torch.arange(x.shape[-1]) % 2 == 1, 1.0),
        "expanded mean": lambda x: x.mean(1, keepdim=True).expand_as(x),
    }


class Move(Activation):
    weight = 5

    functions = {
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


def _overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :1] = y[:, -1:] * 2
    return y


class Pad(Kind):
    def settings(self, pick, shape):
        modes = ("constant", "constant", "one", "reflect", "replicate", "circular", "channels")
        return {"mode": pick(modes), "before": pick((1, 0)), "after": pick((0, 1))}

    def run(self, module, x, mode, before, after):
        if mode in ("constant", "one"):
            return F.pad(x, (before, after), value=float(mode == "one"))
        if mode == "channels":
            return F.pad(x, [*[0] * (2 * x.ndim - 4), before, after])
        return F.pad(x, (before, after) * (x.ndim - 2), mode=mode)


class Upsample(Kind):
    positions = True
    weight = 2

    def settings(self, pick, shape):
        return {"smooth": pick(_BOTH), "size": pick((2, 3, 4)), "corners": pick(_BOTH)}

    def run(self, module, x, smooth, size, corners):
        if not smooth:
            return F.interpolate(x, size=(size,) * (x.ndim - 2), mode="nearest")
        mode = ("linear", "bilinear", "trilinear")[x.ndim - 3]
        return F.interpolate(x, size=(size,) * (x.ndim - 2), mode=mode, align_corners=corners)


class Gate(Kind):
    """Squeeze and excite: a product with a sigmoid, or a relu, of a pooled branch."""

    weight = 1

    def settings(self, pick, shape):
        return {"sigmoid": pick((True, False)), "hidden": pick((1, 2))}

    def module(self, shape, sigmoid, hidden):
        return nn.Sequential(nn.Linear(shape[0], hidden), nn.ReLU(), nn.Linear(hidden, shape[0]))

    def run(self, module, x, sigmoid, hidden):
        gate = module(x.flatten(2).mean(2) if x.ndim > 2 else x)
        gate = torch.sigmoid(gate) if sigmoid else F.relu(gate)
        return x * gate.reshape(*gate.shape, *[1] * (x.ndim - 2))


class Attention(Kind):
    weight = 1

    def module(self, shape):
        return nn.ModuleDict({name: nn.Linear(shape[-1], shape[-1], name != "k") for name in "qkv"})

    def run(self, module, x):
        return F.scaled_dot_product_attention(*(module[name](x) for name in "qkv"))


class Join(Kind):
    """An operation of two values."""

    weight = 8

    operands = 2
    functions = {
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

    def settings(self, pick, shape):
        return {"function": pick(list(self.functions))}

    def run(self, module, a, b, function):
        return self.functions[function](a, b)


class ByMode(Kind):
    """One value in eval mode, another in train mode."""

    weight = 1

    operands = 2

    def run(self, module, a, b):
        if a.shape != b.shape:
            raise ValueError("both modes have one shape")
        return b if module.training else a


KINDS: dict[str, Kind] = {
    "activation": Activation(),
    "linear": Linear(),
    "convolution": Convolution(),
    "join": Join(),
    "norm": Norm(),
    "pool": Pool(),
    "move": Move(),
    "matrix product": MatrixProduct(),
    "scale": Scale(),
    "reduce": Reduce(),
    "layer": Layer(),
    "number": Number(),
    "pad": Pad(),
    "upsample": Upsample(),
    "global mean": GlobalMean(),
    "gate": Gate(),
    "not homogeneous": NotHomogeneous(),
    "attention": Attention(),
    "transposed": Transposed(),
    "by mode": ByMode(),
}

LAYERS = ("linear", "convolution", "norm", "layer", "scale", "matrix product", "gate")
"""Kinds that have parameters."""


def drawn(shape: Shape) -> list[str]:
    """What is drawn from for a value of a shape: the common kinds more often, the simplest first."""
    fitting = [name for name, kind in KINDS.items() if len(shape) > 1 or not kind.positions]
    return [*fitting, *(name for name in fitting for _ in range(KINDS[name].weight - 1))]
