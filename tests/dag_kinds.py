"""The operations that random networks are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from dag_base import BOTH, Function, Kind, Parameters, Shape
from dag_functions import ACTIVATIONS, JOINS, MODULES, MOVES, NOT_HOMOGENEOUS, NUMBERS, REDUCTIONS, SCALES
from dag_memory import Remember, UseTable
from dag_sizes import EXAMPLES, LENGTHS, TYPES, Recurrence, Table


class Layer(Kind):
    """A module of PyTorch."""

    def settings(self, pick, shape):
        return {"name": pick(list(MODULES))}

    def module(self, shape, name):
        return MODULES[name](shape[0])

    def run(self, module, x, **settings):
        return module(x)


class Linear(Kind):
    def settings(self, pick, shape):
        return {"out": pick((2, 1, 3, 4)), "bias": pick(BOTH), "norm": pick((False, False, False, True))}

    def module(self, shape, out, bias, norm):
        layer = nn.Linear(shape[-1], out, bias)
        return parametrizations.weight_norm(layer) if norm else layer

    def run(self, module, x, **settings):
        return module(x)


class Convolution(Kind):
    """Convolutions and their transposes in one to three dimensions."""

    positions = True

    def settings(self, pick, shape):
        groups = pick([1, 1, *(g for g in (2, 3, 4) if shape[0] % g == 0)])
        return {
            "out": groups * pick((1, 2)),
            "kernel": pick((1, 2, 3)),
            "stride": pick((1, 1, 2)),
            "padding": pick((0, 1)),
            "dilation": pick((1, 1, 2)),
            "groups": groups,
            "bias": pick(BOTH),
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

    forms = ("max", "average", "adaptive average", "adaptive max")

    def settings(self, pick, shape):
        return {
            "form": pick(self.forms),
            "kernel": pick((2, 1, 3)),
            "stride": pick((1, 2, 3)),
            "padding": pick((0, 0, 1)),
            "ceil": pick(BOTH),
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
    def settings(self, pick, shape):
        return {"function": pick(list(REDUCTIONS)), "dim": pick((-1, 1, 2)), "keep": pick(BOTH)}

    def run(self, module, x, function, dim, keep):
        return REDUCTIONS[function](x, dim, keep)


class GlobalMean(Kind):
    positions = True

    def run(self, module, x):
        return x.flatten(2).mean(2)


class Norm(Kind):
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

    def settings(self, pick, shape):
        shapes = [(shape[0], *[1] * (len(shape) - 1)), (1,), shape, shape[-1:]]
        return {"function": pick(list(SCALES)), "sizes": pick(shapes), "constant": pick(BOTH)}

    def module(self, shape, function, sizes, constant):
        if constant:
            return Parameters({"factor": (torch.arange(math.prod(sizes)).reshape(sizes) + 1.0) % 3 - 1})
        return Parameters(factor=sizes)

    def run(self, module, x, function, **settings):
        return SCALES[function](x, module.factor)


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

    def settings(self, pick, shape):
        return {"smooth": pick(BOTH), "size": pick((2, 3, 4)), "corners": pick(BOTH)}

    def run(self, module, x, smooth, size, corners):
        if not smooth:
            return F.interpolate(x, size=(size,) * (x.ndim - 2), mode="nearest")
        mode = ("linear", "bilinear", "trilinear")[x.ndim - 3]
        return F.interpolate(x, size=(size,) * (x.ndim - 2), mode=mode, align_corners=corners)


class Gate(Kind):
    """Squeeze and excite: a product with a sigmoid, or a relu, of a pooled branch."""

    def settings(self, pick, shape):
        return {"sigmoid": pick((True, False)), "hidden": pick((1, 2))}

    def module(self, shape, sigmoid, hidden):
        return nn.Sequential(nn.Linear(shape[0], hidden), nn.ReLU(), nn.Linear(hidden, shape[0]))

    def run(self, module, x, sigmoid, hidden):
        gate = module(x.flatten(2).mean(2) if x.ndim > 2 else x)
        gate = torch.sigmoid(gate) if sigmoid else F.relu(gate)
        return x * gate.reshape(*gate.shape, *[1] * (x.ndim - 2))


class Attention(Kind):
    def module(self, shape):
        return nn.ModuleDict({name: nn.Linear(shape[-1], shape[-1], name != "k") for name in "qkv"})

    def run(self, module, x):
        return F.scaled_dot_product_attention(*(module[name](x) for name in "qkv"))


class ByMode(Kind):
    """One value in eval mode, another in train mode."""

    operands = 2

    def run(self, module, a, b):
        if a.shape != b.shape:
            raise ValueError("both modes have one shape")
        return b if module.training else a


KINDS: dict[str, Kind] = {
    "activation": Function(ACTIVATIONS),
    "linear": Linear(),
    "convolution": Convolution(),
    "join": Function(JOINS, operands=2),
    "norm": Norm(),
    "pool": Pool(),
    "move": Function(MOVES),
    "matrix product": MatrixProduct(),
    "scale": Scale(),
    "reduce": Reduce(),
    "layer": Layer(),
    "number": Function(NUMBERS),
    "pad": Pad(),
    "upsample": Upsample(),
    "global mean": GlobalMean(),
    "gate": Gate(),
    "not homogeneous": Function(NOT_HOMOGENEOUS),
    "attention": Attention(),
    "transposed": Transposed(),
    "by mode": ByMode(),
    "examples": Function(EXAMPLES),
    "lengths": Function(LENGTHS, positions=True),
    "types": Function(TYPES),
    "table": Table(),
    "recurrence": Recurrence(),
    "memory": Remember(),
    "cached": UseTable(),
}

LAYERS = ("linear", "convolution", "norm", "layer", "scale", "matrix product", "gate", "table", "recurrence", "memory")
"""Kinds that have parameters."""

OF_CALLS = ("examples", "lengths", "types", "table", "recurrence", "memory", "cached")
"""Kinds that may make one call of a network differ from the others."""

_OFTEN = {"activation": 5, "linear": 5, "convolution": 7, "join": 7, "move": 4} | dict.fromkeys(
    ("norm", "pool", "matrix product", "scale", "reduce", "number", "examples", "lengths", "table", "recurrence"), 2
)
_OFTEN["memory"] = 5


def drawn(shape: Shape, plain: bool = False) -> list[str]:
    """What is drawn from for a value of a shape: the simplest first, the common kinds more often.

    Args:
        shape: the shape.
        plain: without the kinds that may make one call differ from the others?
    """
    fitting = [
        name
        for name, kind in KINDS.items()
        if (len(shape) > 1 or not kind.positions) and not (plain and name in OF_CALLS)
    ]
    return [*fitting, *(name for name in fitting for _ in range(_OFTEN.get(name, 0)))]
