"""Linear layers: convolutions, matrix products and tables of embeddings. With a parameter they make new neurons."""

from __future__ import annotations

import functools
import math
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import PathFlow, Places
from dagpath.passes.values import FIXED, ZERO, Call, Weight, compact
from dagpath.rules.base import Operation, Unknown, all_parameters, register
from dagpath.rules.elementwise import sum_of_weights
from dagpath.rules.windows import Windows

_WEIGHTS = "weights that they share"
_PRODUCT = Unknown("is a factor of a product of two tensors that could both be rescaled")


def add_bias(flow: NeuronFlow, bias: Any, dst: Tensor) -> None:
    """Record the edges of a bias into the neurons ``dst``."""
    if isinstance(bias, Weight):
        flow.use(bias, dst, torch.tensor(FIXED))
    elif isinstance(bias, Tensor):
        flow.tie(dst, bias, "a constant bias")


class Convolution(Operation):
    """A convolution or its transpose: new neurons, one per output channel.

    A channel is one neuron: its positions share their weights, so they share a scale. A weight that is not made of
    parameters (a constant, a normalized weight) has no factor to give: it ties the inputs it joins to their outputs.
    """

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        x, weight, bias = flow.activation(call["input"]), call["weight"], call.get("bias")
        if isinstance(weight, Tensor) and (compact(weight) > FIXED).any():
            return _PRODUCT.neurons(flow, call)
        groups = call.get("groups", 1)
        transposed = call.get("transposed", self.transposed)
        axis = 1 - len(weight.shape)
        src = flow.per_channel(x, axis, _WEIGHTS).reshape(groups, -1)
        count = weight.shape[1] * groups if transposed else weight.shape[0]
        if isinstance(weight, Weight):
            dst = flow.fresh(count, weight)
            rows, columns = dst.view(groups, -1), src
            if transposed:  # weight[i, o]: each source meets the destinations of its group
                rows = rows.repeat_interleave(columns.shape[1], 0) if groups > 1 else rows
                columns = columns.reshape(-1, 1)
            else:
                columns = columns.repeat_interleave(rows.shape[1], 0) if groups > 1 else columns
                rows = rows.reshape(-1, 1)
            ones = [1] * (len(weight.shape) - 2)
            flow.use(weight, rows.reshape(*rows.shape, *ones), columns.reshape(*columns.shape, *ones))
        else:
            dst = flow.mix(src, [1], "weights that are not rescaled").repeat_interleave(count // groups, 0).view(count)
        if bias is not None:
            dst = dst.clamp(min=FIXED)  # zeros are none once a bias is added
        add_bias(flow, bias, dst)
        return dst.view(count, *[1] * (-1 - axis)).expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        call = call.apart()
        operands = call["input"], call["weight"], call.get("bias")
        return flow.bilinear(
            call.output.shape, operands, call.as_function_of(*operands), functools.partial(self._places, call)
        )

    def _places(self, call: Call) -> tuple[Places, Places, Places, Places, int]:
        """Where entries meet: batch, group, channel of the center, center, channel of the window, kernel."""
        x, weight = call["input"], call["weight"]
        groups, kernel = call.get("groups", 1), weight.shape[2:]
        dims, batch, shape = len(kernel), x.shape[: -1 - len(kernel)], call.output.shape
        transposed = call.get("transposed", self.transposed)
        centers, windows = (x.shape, shape) if transposed else (shape, x.shape)
        window = Windows.of(call, windows[-dims:], centers[-dims:], kernel)

        def as_centers(entries: Tensor) -> Tensor:
            return entries.reshape(*batch, groups, -1, *centers[-dims:], *[1] * (1 + dims))

        def as_windows(entries: Tensor) -> Tensor:
            seen = window.gathered(entries.reshape(*batch, groups, 1, -1, *windows[-dims:]))
            return seen.movedim(-1 - 2 * dims, -1 - dims)

        def as_weight(entries: Tensor) -> Tensor:
            return entries.reshape(groups, len(entries) // groups, *[1] * dims, *entries.shape[1:])

        def as_bias(entries: Tensor) -> Tensor:
            return entries.view(-1, *[1] * dims)

        dst, src = (as_windows, as_centers) if transposed else (as_centers, as_windows)
        return dst, src, as_weight, as_bias, 1 + dims


@dataclass(frozen=True)
class Labels:
    """A product of two tensors as an einsum: one letter per dimension of the operands and of the result."""

    a: str
    b: str
    out: str


class Contraction(Operation):
    """A matrix product in any of its forms, seen as ``einsum(labels, a, b)`` plus a bias on the last dimension.

    With a parameter it makes new neurons; with a fixed tensor it ties the entries that it sums. A product of two
    parameters is a weight that leads through hidden units of its own (the rank of a low-rank factorization).
    """

    def keeps_weights(self, call: Call) -> bool:
        a, b, bias = self.operands(call)
        return all_parameters(a, b, *([] if bias is None else [bias])) and self.labels(call) is not None

    def operands(self, call: Call) -> tuple[Any, Any, Any]:
        """(a, b, bias)"""
        raise NotImplementedError

    def labels(self, call: Call) -> Labels | None:
        """The einsum that the call is; None if it is none of two operands."""
        raise NotImplementedError

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b, bias = self.operands(call)
        labels = self.labels(call)
        if labels is None:
            return Unknown().neurons(flow, call)
        if isinstance(a, Weight) and isinstance(b, Weight):
            return self._composed(flow, call, a, b, bias, labels)
        if isinstance(a, Weight):
            a, b, labels = b, a, Labels(labels.b, labels.a, labels.out)
        if isinstance(b, Weight):
            dst = self._weighted(flow, a, b, labels)
        else:
            swapped = Labels(labels.b, labels.a, labels.out)
            dst = flow.product((a, b), (self._mixed(flow, a, labels), self._mixed(flow, b, swapped)))
        if bias is not None:
            dst = dst.clamp(min=FIXED)  # zeros are none once a bias is added
        numbers = dst.expand(call.output.shape)
        if bias is not None:
            last = flow.mix(dst, range(dst.ndim - 1), "a bias that they share").reshape(-1).expand(numbers.shape[-1])
            add_bias(flow, bias, last)
        return numbers

    @staticmethod
    def _composed(flow: NeuronFlow, call: Call, a: Weight, b: Weight, bias: Any, labels: Labels) -> Any:
        """A product of parameters: one factor leads into hidden units, one for each entry of the dimensions that both
        have, the other out of them. Which does which is seen at the ends of the product.
        """
        dims = list(zip(labels.a + labels.b, (*a.shape, *b.shape), strict=True))
        sizes = dict(dims)
        if isinstance(bias, Tensor) or any(sizes[label] != size for label, size in dims):
            return Unknown("enters a product of parameters").neurons(flow, call)
        shape = torch.Size(sizes[label] for label in labels.out)
        shared = "".join(label for label in labels.a if label in labels.b)

        def spread(dst: Tensor, src: Tensor) -> None:
            ways = [(a, labels.a, b, labels.b), (b, labels.b, a, labels.a)]
            last, outer, first, inner = min(
                ways, key=lambda way: _differ(dst, labels.out, way[1]) + _differ(src, labels.out, way[3])
            )
            numbers = flow.fresh(math.prod(sizes[label] for label in shared), None, standing=False)
            units = numbers.view([sizes[label] for label in shared])
            flow.use(last, end(dst, outer), _arranged(units, shared, outer))
            flow.use(first, _arranged(units, shared, inner), end(src, inner))

        def end(numbers: Tensor, wanted: str) -> Tensor:
            others = [dim for dim, label in enumerate(labels.out) if label not in wanted]
            return _arranged(flow.mix(numbers, others, "a product of parameters"), labels.out, wanted)

        product = flow.computed(f"product {labels}", shape, [a, b], spread)
        return product if bias is None else sum_of_weights(flow, [product, bias], shape)

    @staticmethod
    def _weighted(flow: NeuronFlow, x: Tensor, weight: Weight, labels: Labels) -> Tensor:
        """Fresh neurons for the dimensions of the weight that the result keeps."""
        x = flow.mix(x, [d for d, label in enumerate(labels.a) if label not in labels.b], _WEIGHTS)
        src = _arranged(x, labels.a, labels.b)
        sizes = [size if label in labels.out else 1 for label, size in zip(labels.b, weight.shape, strict=True)]
        dst = flow.fresh(torch.Size(sizes).numel(), weight).view(sizes)
        flow.use(weight, dst, src)
        return _arranged(dst, labels.b, labels.out)

    @staticmethod
    def _mixed(flow: NeuronFlow, x: Tensor, labels: Labels) -> Tensor:
        """A product with a fixed tensor: the entries that are summed become one."""
        summed = [d for d, label in enumerate(labels.a) if label not in labels.out]
        return _arranged(flow.mix(x, summed, "weights that are not rescaled"), labels.a, labels.out)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        call = call.apart()
        labels, operands = self.labels(call), self.operands(call)
        if labels is None:
            return flow.barrier(call)
        summed = "".join(sorted(set(labels.a + labels.b) - set(labels.out)))

        def places() -> tuple[Places, Places, Places, Places, int]:
            ends = (labels.out, labels.a, labels.b)
            dst, a, b = (functools.partial(_arranged, labels=end, wanted=labels.out + summed) for end in ends)
            return dst, a, b, lambda bias: bias, len(summed)

        run = call.as_function_of(*operands)
        return flow.bilinear(call.output.shape, operands, run, places, isinstance(self, Linear))


def _differ(numbers: Tensor, labels: str, wanted: str) -> bool:
    """Do entries differ along dimensions that are not wanted?"""
    dims = [dim for dim, label in enumerate(labels) if label not in wanted]
    small = compact(numbers, dims)
    return bool(dims) and bool(((small != small.amax(dims, keepdim=True)) & (small > ZERO)).any())


def _arranged(x: Tensor, labels: str, wanted: str) -> Tensor:
    """``x`` with its dimensions in the wanted order: others (of one number) dropped, missing ones of size 1."""
    for dim in reversed([dim for dim, label in enumerate(labels) if label not in wanted]):
        x = x.select(dim, 0)
    kept = [label for label in labels if label in wanted]
    x = x.permute([kept.index(label) for label in wanted if label in kept])
    for dim, label in enumerate(wanted):
        if label not in kept:
            x = x.unsqueeze(dim)
    return x


class Linear(Contraction):
    """A matrix product with a weight on the last axis, plus a bias: new neurons, one per output unit."""

    def operands(self, call: Call) -> tuple[Any, Any, Any]:
        return call["input"], call["weight"], call.get("bias")

    def labels(self, call: Call) -> Labels | None:
        batch = string.ascii_uppercase[: len(_shape(call["input"])) - 1]
        if len(_shape(call["weight"])) == 1:
            return Labels(batch + "i", "i", batch)
        return Labels(batch + "i", "oi", batch + "o")


class MatrixProduct(Contraction):
    """A matrix product: with a parameter, new neurons; with a fixed tensor, the entries that it sums are tied."""

    def operands(self, call: Call) -> tuple[Any, Any, Any]:
        for names in (("mat1", "mat2", "input"), ("batch1", "batch2", "input")):
            if names[0] in call.arguments:
                a, b, bias = (call[name] for name in names)
                return a, b, bias
        if "sparse" in call.arguments:
            return call["sparse"], call["dense"], None
        return call["input"], call.get("mat2", call.get("other")), None

    def labels(self, call: Call) -> Labels | None:
        if call.get("alpha", 1) != 1 or call.get("beta", 1) != 1:
            return None
        a, b, _ = (_shape(operand) for operand in self.operands(call))
        batch = torch.broadcast_shapes(a[:-2], b[:-2])  # type: ignore[no-untyped-call]
        letters = string.ascii_uppercase[: len(batch)]
        left = _batch_labels(a[:-2], batch, letters, "abcdefgh") + ("ni" if len(a) > 1 else "i")
        right = _batch_labels(b[:-2], batch, letters, "pqrstuvw") + ("im" if len(b) > 1 else "i")
        return Labels(left, right, letters + ("n" if len(a) > 1 else "") + ("m" if len(b) > 1 else ""))


def _batch_labels(sizes: tuple[int, ...], batch: torch.Size, shared: str, own: str) -> str:
    """The letters of an operand's batch dimensions; those of size 1 that are broadcast have letters of its own."""
    places = range(len(batch) - len(sizes), len(batch))
    return "".join(shared[at] if size == batch[at] else own[at] for size, at in zip(sizes, places, strict=True))


class Einsum(Contraction):
    """A product of two tensors written with letters: treated as the matrix product that it is."""

    def operands(self, call: Call) -> tuple[Any, Any, Any]:
        tensors = call["tensors"]
        return tensors[0], tensors[1] if len(tensors) == 2 else None, None

    def labels(self, call: Call) -> Labels | None:
        if len(call["tensors"]) != 2:
            return None
        shapes = [_shape(operand) for operand in call["tensors"]]
        inputs, arrow, out = _spelled_out(call["equation"].replace(" ", ""), *shapes).partition("->")
        a, _, b = inputs.partition(",")
        if not arrow:
            letters = a + b
            out = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
        plain = all(term.isalpha() or not term for term in (a, b, out))
        repeated = any(len(set(term)) < len(term) for term in (a, b))
        return Labels(a, b, out) if plain and not repeated else None


def _spelled_out(equation: str, *shapes: tuple[int, ...]) -> str:
    """An equation with letters of their own in place of ``...``; unchanged where those do not simply agree."""
    inputs, arrow, _ = equation.partition("->")
    hidden = []
    for term, shape in zip(inputs.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        if dots:
            hidden.append(shape[len(before) : len(shape) - len(after)])
    if not hidden or not arrow or any(sizes != hidden[0] for sizes in hidden):
        return equation
    letters = [letter for letter in string.ascii_letters if letter not in equation][: len(hidden[0])]
    return equation.replace("...", "".join(letters))


def _shape(operand: Any) -> tuple[int, ...]:
    if operand is None:
        return ()
    return tuple(operand.shape)


register(Convolution(), "conv1d", "conv2d", "conv3d", "convolution")
register(Convolution(transposed=True), "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
register(Linear(), "linear")
register(MatrixProduct(), "matmul", "mm", "bmm", "addmm", "baddbmm", "_sparse_mm")
register(Einsum(), "einsum")
