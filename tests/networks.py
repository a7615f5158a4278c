"""Random small networks, and their paths by brute force.

Nothing here uses dagpath: :func:`scalar_edges` builds the graph of scalar activations entry by entry from the modules'
settings, and :class:`BruteForce` walks every path of it.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONSTANT = -1


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers = [module for sizes in itertools.pairwise(widths) for module in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass
class Step:
    """One instruction: apply an operation to earlier values; the result is the next value."""

    kind: str
    inputs: tuple[int, ...]
    layer: int = -1
    settings: dict = field(default_factory=dict)


class Net(nn.Module):
    """A function of the module and its inputs, with parts: modules, and tensors, which become parameters."""

    def __init__(self, function, **parts) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class RandomNet(nn.Module):
    """A random ReLU network with skips, concatenations, strides, padding, pooling, biases and batch norm."""

    def __init__(self, seed: int, max_convolutions: int = 3) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.input_shape = (rng.randint(1, 2), rng.randint(3, 4), rng.randint(3, 4))
        self._shapes = [self.input_shape]
        for _ in range(rng.randint(1, max_convolutions)):
            self._convolution(rng)
            for _ in range(rng.randint(0, 2)):
                rng.choice([self._join, self._activation, self._pool, self._pad, self._norm])(rng)
            self._activation(rng)
        self._head(rng)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.5)
                    module.running_var.uniform_(0.5, 2)
                    module.weight.normal_()
                    module.bias.normal_()
        self.eval()

    # -- building ------------------------------------------------------------------------------------------------

    def _add(self, kind: str, inputs: tuple[int, ...], layer: nn.Module | None = None, **settings: object) -> None:
        if layer is not None:
            self.layers.append(layer)
        self.steps.append(Step(kind, inputs, len(self.layers) - 1 if layer is not None else -1, settings))
        with torch.no_grad():
            probe = [torch.zeros(1, *shape) for shape in self._shapes]
            self._shapes.append(tuple(self.eval()._run_step(self.steps[-1], probe).shape[1:]))

    @property
    def _last(self) -> int:
        return len(self._shapes) - 1

    def _convolution(self, rng: random.Random) -> None:
        channels, height, width = self._shapes[-1]
        groups = channels if channels > 1 and rng.random() < 0.3 else 1
        kernel = rng.randint(1, min(3, height, width))
        dilation = 2 if kernel == 2 and min(height, width) > 2 and rng.random() < 0.3 else 1
        layer = nn.Conv2d(
            channels,
            groups * rng.randint(1, 2),
            kernel,
            stride=rng.randint(1, 2),
            padding=rng.randint(0, 1),
            dilation=dilation,
            groups=groups,
            bias=rng.random() < 0.5,
        )
        self._add("layer", (self._last,), layer)

    def _norm(self, rng: random.Random) -> None:
        self._add("layer", (self._last,), nn.BatchNorm2d(self._shapes[-1][0]))

    def _activation(self, rng: random.Random) -> None:
        kind = rng.choice(["relu", "relu", "leaky", "prelu"])
        layer = {"relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "prelu": nn.PReLU()}[kind]
        self._add("layer", (self._last,), layer)

    def _pool(self, rng: random.Random) -> None:
        if min(self._shapes[-1][1:]) < 2:
            return
        options = [
            nn.MaxPool2d(2, stride=1),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AvgPool2d(2, stride=1),
            nn.AvgPool2d(2, padding=1, count_include_pad=rng.random() < 0.5),
            nn.AdaptiveAvgPool2d((2, 1)),
            nn.AdaptiveMaxPool2d((1, 2)),
        ]
        self._add("layer", (self._last,), rng.choice(options))

    def _pad(self, rng: random.Random) -> None:
        self._add("pad", (self._last,), pad=(0, 1, 1, 0))

    def _join(self, rng: random.Random) -> None:
        last = self._shapes[-1]
        same = [index for index, shape in enumerate(self._shapes[:-1]) if shape == last and index > 0]
        if same and rng.random() < 0.7:
            self._add("add", (self._last, rng.choice(same)))
            return
        near = [i for i, s in enumerate(self._shapes[:-1]) if s[1:] == last[1:] and s[0] + last[0] <= 4]
        if near:
            self._add("cat", (self._last, rng.choice(near)))

    def _head(self, rng: random.Random) -> None:
        self._add("flatten", (self._last,))
        size = self._shapes[-1][0]
        if rng.random() < 0.5:
            self._add("layer", (self._last,), nn.Linear(size, 2, bias=rng.random() < 0.5))
            self._add("layer", (self._last,), nn.ReLU())
            size = 2
        self._add("layer", (self._last,), nn.Linear(size, 2, bias=rng.random() < 0.5))

    # -- running -------------------------------------------------------------------------------------------------

    def _run_step(self, step: Step, values: list[Tensor]) -> Tensor:
        inputs = [values[index] for index in step.inputs]
        if step.kind == "layer":
            return self.layers[step.layer](inputs[0])
        if step.kind == "add":
            return inputs[0] + inputs[1]
        if step.kind == "cat":
            return torch.cat(inputs, 1)
        if step.kind == "pad":
            return F.pad(inputs[0], step.settings["pad"])
        return inputs[0].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(self._run_step(step, values))
        return values[-1]

    def example(self, batch: int = 1) -> Tensor:
        return torch.randn(batch, *self.input_shape, dtype=next(self.parameters()).dtype)


class ScalarGraph:
    """Edges between scalar activations: ``into[v] = [(u, value, {(parameter, index): derivative})]``."""

    def __init__(self, net: RandomNet) -> None:
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.into: dict[int, list[tuple[int, float, dict]]] = {}
        self._count = itertools.count()
        values = [self._new(net.input_shape)]
        self.inputs = set(values[0].ravel().tolist())
        for step in net.steps:
            inputs = [values[index] for index in step.inputs]
            values.append(self._apply(net.layers[step.layer] if step.kind == "layer" else step, inputs))
        self.outputs = values[-1].ravel().tolist()

    def _new(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.array([next(self._count) for _ in range(int(np.prod(shape)))]).reshape(shape)

    def _edge(self, u: int | None, v: int, value: float, *derivatives: tuple[Tensor, tuple, float]) -> None:
        if u is not None:
            terms = {(self.names[id(p)], index): d for p, index, d in derivatives}
            self.into.setdefault(v, []).append((u, value, terms))

    def _weight(self, u: int | None, v: int, parameter: Tensor, index: tuple) -> None:
        self._edge(u, v, float(parameter.detach()[index]), (parameter, index, 1.0))

    def _apply(self, layer: object, inputs: list[np.ndarray]) -> np.ndarray:
        x = inputs[0]
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.PReLU)):
            return x
        if isinstance(layer, Step):
            return self._apply_step(layer, inputs)
        return getattr(self, "_" + type(layer).__name__)(layer, x)

    def _apply_step(self, step: Step, inputs: list[np.ndarray]) -> np.ndarray:
        if step.kind == "cat":
            return np.concatenate(inputs)
        if step.kind == "flatten":
            return inputs[0].ravel()
        if step.kind == "pad":
            left, right, top, bottom = step.settings["pad"]
            padded = inputs[0].astype(object)
            return np.pad(padded, ((0, 0), (top, bottom), (left, right)), constant_values=None)
        result = self._new(inputs[0].shape)
        for operand in inputs:
            for u, v in zip(operand.ravel(), result.ravel(), strict=True):
                self._edge(u, v, 1.0)
        return result

    def _Linear(self, layer: nn.Linear, x: np.ndarray) -> np.ndarray:
        result = self._new((layer.out_features,))
        for j, i in itertools.product(range(layer.out_features), range(layer.in_features)):
            self._weight(x[i], result[j], layer.weight, (j, i))
        self._bias(layer, result)
        return result

    def _bias(self, layer: nn.Module, result: np.ndarray) -> None:
        if layer.bias is not None:
            for channel, row in enumerate(result):
                for v in np.ravel(row):
                    self._weight(CONSTANT, v, layer.bias, (channel,))

    def _Conv2d(self, layer: nn.Conv2d, x: np.ndarray) -> np.ndarray:
        (k, _), (s, _), (p, _), (d, _) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        _, height, width = x.shape
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n in (height, width)]
        result = self._new((layer.out_channels, *size))
        per_group, out_per_group = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for o, r, c in itertools.product(*map(range, result.shape)):
            for i, a, b in itertools.product(range(per_group), range(k), range(k)):
                row, column = r * s - p + a * d, c * s - p + b * d
                if 0 <= row < height and 0 <= column < width:
                    source = x[o // out_per_group * per_group + i, row, column]
                    self._weight(source, result[o, r, c], layer.weight, (o, i, a, b))
        self._bias(layer, result)
        return result

    def _BatchNorm2d(self, layer: nn.BatchNorm2d, x: np.ndarray) -> np.ndarray:
        result = self._new(x.shape)
        for (channel, *_), v in np.ndenumerate(result):
            inverse = 1 / float((layer.running_var[channel] + layer.eps).sqrt())
            mean, gamma, beta = (float(t.detach()[channel]) for t in (layer.running_mean, layer.weight, layer.bias))
            u = x.reshape(-1)[np.flatnonzero(result.ravel() == v)[0]]
            self._edge(u, v, gamma * inverse, (layer.weight, (channel,), inverse))
            terms = ((layer.bias, (channel,), 1.0), (layer.weight, (channel,), -mean * inverse))
            self._edge(CONSTANT, v, beta - mean * gamma * inverse, *terms)
        return result

    def _windows(self, x: np.ndarray, rows: list, columns: list, values: np.ndarray) -> np.ndarray:
        result = self._new((len(x), len(rows), len(columns)))
        for channel, r, c in itertools.product(*map(range, result.shape)):
            for row, column in itertools.product(rows[r], columns[c]):
                self._edge(x[channel, row, column], result[channel, r, c], float(values[r, c]))
        return result

    def _MaxPool2d(self, layer: nn.MaxPool2d, x: np.ndarray) -> np.ndarray:
        rows, columns = (_windows_of(n, 2, layer.stride, 0, layer.ceil_mode)[0] for n in x.shape[1:])
        return self._windows(x, rows, columns, np.ones((len(rows), len(columns))))

    def _AvgPool2d(self, layer: nn.AvgPool2d, x: np.ndarray) -> np.ndarray:
        (rows, all_rows), (columns, all_columns) = (
            _windows_of(n, 2, layer.stride, layer.padding, False) for n in x.shape[1:]
        )
        counts = [[len(q) for q in (sizes if not layer.count_include_pad else whole)] for sizes, whole in
                  ((rows, all_rows), (columns, all_columns))]  # fmt: skip
        return self._windows(x, rows, columns, 1 / np.outer(*counts))

    def _adaptive(self, layer: nn.Module, x: np.ndarray, average: bool) -> np.ndarray:
        rows, columns = (
            [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
            for n, m in zip(x.shape[1:], layer.output_size, strict=True)
        )
        counts = np.outer([len(q) for q in rows], [len(q) for q in columns])
        return self._windows(x, rows, columns, 1 / counts if average else np.ones(counts.shape))

    def _AdaptiveAvgPool2d(self, layer: nn.Module, x: np.ndarray) -> np.ndarray:
        return self._adaptive(layer, x, average=True)

    def _AdaptiveMaxPool2d(self, layer: nn.Module, x: np.ndarray) -> np.ndarray:
        return self._adaptive(layer, x, average=False)


def _windows_of(n: int, kernel: int, stride: int, padding: int, ceil: bool) -> tuple[list, list]:
    """For each window the positions inside the tensor, and those inside the tensor with its padding."""
    span = n + 2 * padding - kernel
    count = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (count - 1) * stride >= n + padding:
        count -= 1
    whole = [range(i * stride - padding, i * stride - padding + kernel) for i in range(count)]
    whole = [[q for q in window if -padding <= q < n + padding] for window in whole]
    return [[q for q in window if 0 <= q < n] for window in whole], whole


class BruteForce:
    """Every path of a network: its value, and the sum over paths of squared derivatives for every parameter."""

    def __init__(self, net: RandomNet) -> None:
        self.graph = ScalarGraph(net)
        self.values: list[float] = []
        self.gram = {name: np.zeros(tuple(parameter.shape)) for name, parameter in net.named_parameters()}
        for output in self.graph.outputs:
            self._walk(output, [])

    @staticmethod
    def count(net: RandomNet) -> int:
        graph = ScalarGraph(net)
        known: dict[int, int] = {CONSTANT: 1, **dict.fromkeys(graph.inputs, 1)}
        for v in sorted(graph.into):
            known[v] = sum(known.get(u, 0) for u, _, _ in graph.into[v])
        return sum(known.get(v, 0) for v in graph.outputs)

    def _walk(self, node: int, edges: list) -> None:
        if node == CONSTANT or node in self.graph.inputs:
            self._finish(edges)
            return
        for u, value, terms in self.graph.into.get(node, []):
            self._walk(u, [*edges, (value, terms)])

    def _finish(self, edges: list) -> None:
        values = [value for value, _ in edges]
        self.values.append(float(np.prod(values)))
        derivative: dict = {}
        for position, (_, terms) in enumerate(edges):
            others = float(np.prod(values[:position] + values[position + 1 :]))
            for key, slope in terms.items():
                derivative[key] = derivative.get(key, 0.0) + slope * others
        for (name, index), slope in derivative.items():
            self.gram[name][index] += slope**2

    def norm(self, p: float) -> float:
        return float((np.abs(self.values) ** p).sum() ** (1 / p))
