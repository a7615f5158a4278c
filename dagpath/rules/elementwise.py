"""Elementwise operations: homogeneous functions of one tensor, sums, products and quotients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import Gate, PathFlow
from dagpath.passes.values import FIXED, ZERO, Call, Operand, Weight, compact, is_scaleless, plain
from dagpath.rules.base import Operation, Unknown, all_parameters, register

_CONSTANT = "a constant is added to it"


class Homogeneous(Operation):
    """A positively homogeneous function, entry by entry: its output has the neurons of its input."""

    def applies(self, call: Call) -> bool:
        return True

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        value, *others = call.leaves((Tensor, Weight))
        if not self.applies(call) or any(isinstance(other, Tensor) and (other > FIXED).any() for other in others):
            return Unknown("enters a function that is not positively homogeneous").neurons(flow, call)
        for slope in others:
            if isinstance(slope, Weight):
                flow.pin(slope)
        return flow.activation(value)

    def slope(self, call: Call) -> float | None:
        """The slope of the function; None if it is another one on both sides of zero, or depends on other tensors."""
        return None

    def paths(self, flow: PathFlow, call: Call) -> Any:
        if not self.applies(call):
            return flow.barrier(call)
        x, slope = call.leaves(Operand)[0], self.slope(call)
        if slope is not None:
            return flow.sum(x.shape, [(x, slope)])
        return flow.sum(x.shape, [(x, 1.0)], Gate(lambda real: self._gate(real)[None]))

    @staticmethod
    def _gate(real: Call) -> Tensor:
        """``f(x) / x``: the slope on the side of zero where x is."""
        x = real.leaves(Tensor)[0]
        sign = torch.where(x > 0, 1.0, -1.0).to(x)
        gate: Tensor = sign * real.run(lambda leaf: sign if leaf is x else leaf)
        return gate + 0.0  # no negative zeros


class Negative(Homogeneous):
    """The negative of its input."""

    def slope(self, call: Call) -> float | None:
        return -1.0


class Clamp(Homogeneous):
    """Bounds that are zero, infinite or absent: a positively homogeneous function. Other bounds fix the input."""

    def applies(self, call: Call) -> bool:
        bounds = [call.get(name) for name in ("min", "max", "min_val", "max_val")]
        return not any(
            isinstance(bound, (Tensor, Weight, Operand)) or not is_scaleless(plain(bound))
            for bound in bounds
            if bound is not None
        )


class NanToNum(Homogeneous):
    """Numbers in place of NaN and of infinite ones: homogeneous if those are zero or infinite. Others fix the input.

    By default infinite entries become the largest numbers of the type.
    """

    def applies(self, call: Call) -> bool:
        numbers = (call.get("nan") or 0.0, call.get("posinf"), call.get("neginf"))
        return all(number is not None and is_scaleless(plain(number)) for number in numbers)


def sum_of_weights(flow: NeuronFlow, parts: list[Weight], shape: torch.Size) -> Weight:
    """A sum of parameters is a weight whose parts are parallel edges: they have its ends, entry by entry."""

    def spread(dst: Tensor, src: Tensor) -> None:
        for part in parts:
            whole = part if part.shape == shape else Weight(shape, elements=flow.elements(part).expand(shape))
            flow.use(whole, dst, src)

    return flow.computed("sum", shape, parts, spread)


class Sum(Operation):
    """A sum: both operands share a scale, entry by entry; a parameter among them is a bias.

    A sum of parameters is a weight; to paths each of them is an edge of its own.
    """

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign

    def operands(self, call: Call) -> list[Any]:
        """Both tensors, or a tensor and a number."""
        return [call["input"], call["other"]]

    def keeps_weights(self, call: Call) -> bool:
        a, b = self.operands(call)
        return all_parameters(a, b) or (not isinstance(b, Operand) and plain(b) == 0)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = self.operands(call)
        if isinstance(a, Weight) and isinstance(b, Weight):
            return sum_of_weights(flow, [a, b], call.output.shape)
        if not isinstance(b, (Tensor, Weight)):
            return a if plain(b) == 0 else Unknown(_CONSTANT).neurons(flow, call)
        a, b = self._operand(flow, a, b), self._operand(flow, b, a)
        return flow.join(a, b, "a sum", plain(call.get("alpha", 1)) or 1.0).expand(call.output.shape)

    @staticmethod
    def _operand(flow: NeuronFlow, value: Any, other: Any) -> Tensor:
        """``value`` as neurons; a parameter that is added to neurons everywhere is a bias of those."""
        if not isinstance(value, Weight):
            neurons: Tensor = value
            return neurons
        if len(value.shape) > other.ndim or (compact(other) == ZERO).any():
            return flow.as_neurons(value)
        return flow.bias(other, value)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        a, b = self.operands(call)
        alpha = plain(call.get("alpha", 1))
        factor = self.sign * (1.0 if alpha is None else alpha)
        return flow.sum(call.output.shape, [(a, 1.0), (flow.operand(b, "other"), factor)])


class Choice(Operation):
    """One of two tensors in each entry: they share a scale."""

    def operands(self, call: Call) -> list[Any]:
        """Both tensors, or a tensor and a number."""
        return [call["input"], call["other"]]

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = self.operands(call)
        a, b = self._operand(flow, a), self._operand(flow, b)
        if isinstance(call.get("condition"), Tensor):
            flow.fix(call["condition"], "is the condition of a choice")
        return flow.join(a, b, "a choice between them").expand(call.output.shape)

    @staticmethod
    def _operand(flow: NeuronFlow, value: Any) -> Tensor:
        if not isinstance(value, (Tensor, Weight)):
            return torch.tensor(ZERO if is_scaleless(plain(value)) else FIXED)
        numbers: Tensor = flow.activation(value)
        return numbers

    def paths(self, flow: PathFlow, call: Call) -> Any:
        a, b = self.operands(call)
        shape = call.output.shape

        def is_chosen(real: Call) -> Tensor:
            first = real["condition"] if "condition" in real.arguments else real.result == self.operands(real)[0]
            first = first.bool().expand(shape)
            return torch.stack([first, ~first])

        return flow.sum(shape, [(flow.operand(a, "input"), 1.0), (flow.operand(b, "other"), 1.0)], Gate(is_chosen))


class Comparison(Operation):
    """A comparison with zero, or between tensors of one scale: right under any scale. No path crosses it.

    A sign is a comparison with zero too.
    """

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = call["input"], call.get("other", 0)
        if isinstance(b, (Tensor, Weight)):
            if isinstance(a, Weight) or isinstance(b, Weight):
                return Unknown("is compared with a tensor").neurons(flow, call)
            flow.tie(a, b, "a comparison")
        elif not is_scaleless(plain(b)):
            return Unknown("is compared with a constant").neurons(flow, call)
        return flow.constant(call.output)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return flow.inputs(call.output)


class MaskedFill(Operation):
    """Zeros or infinities written into some entries are right under any scale; another value fixes the input.

    What is masked as the network's input says depends on that input, be it a weight: it is an activation.
    """

    def _keeps(self, call: Call) -> bool:
        return not isinstance(call["value"], (Tensor, Weight, Operand)) and is_scaleless(plain(call["value"]))

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if not self._keeps(call):
            return Unknown("is replaced by a constant in some entries").neurons(flow, call)
        if isinstance(call["mask"], Tensor):
            flow.fix(call["mask"], "is a mask")
        return flow.activation(call["input"]).expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        if not self._keeps(call):
            return flow.barrier(call)
        shape = call.output.shape
        return flow.sum(shape, [(call["input"], 1.0)], Gate(lambda real: ~real["mask"].expand(1, *shape)))


class Product(Operation):
    """A product: with a constant or another fixed tensor the operand keeps its neurons; with a parameter, new ones."""

    moves_weights = True

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = call["input"], call["other"]
        if not isinstance(b, (Tensor, Weight)):
            return a
        if isinstance(a, Weight) and isinstance(b, Weight):
            return self._weights(flow, call, a, b)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return flow.product((a, b), (a.expand(call.output.shape), b.expand(call.output.shape)))
        if isinstance(b, Weight):
            a, b = b, a
        return self._weighted(flow, a, b, call.output.shape)

    @staticmethod
    def _weights(flow: NeuronFlow, call: Call, a: Weight, b: Weight) -> Any:
        """A product of parameters, entry by entry: one of them is rescaled, the other (a gain) is not."""
        shape = call.output.shape
        whole, gain = (a, b) if a.shape == shape else (b, a)
        if whole.shape != shape:
            return Unknown("enters an outer product of parameters").neurons(flow, call)
        flow.pin(gain)
        return whole

    @staticmethod
    def _weighted(flow: NeuronFlow, weight: Weight, x: Tensor, shape: torch.Size) -> Any:
        """A parameter times an activation, entry by entry (a layer scale): a linear layer without sums."""
        if not flow.enters(x):
            elements = flow.elements(weight).expand(shape)
            return weight if weight.shape == shape else Weight(shape, elements=elements)
        padded = (1,) * (len(shape) - len(weight.shape)) + tuple(weight.shape)
        x = x.expand(shape)
        small = compact(x)
        if any(size == 1 and small.shape[dim] > 1 for dim, size in enumerate(padded)):
            flow.pin(weight)
            return x
        src = x[tuple(slice(0, size) for size in padded)].reshape(weight.shape)
        dst = flow.fresh(src.numel(), weight).view(weight.shape)
        flow.use(weight, dst, src)
        return dst.expand(shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return flow.product(call.output.shape, call["input"], flow.operand(call["other"], "other"))


class Quotient(Product):
    """A quotient: the divisor is fixed, the dividend keeps its neurons."""

    def keeps_weights(self, call: Call) -> bool:
        return not (isinstance(call["other"], Operand) and call["other"].params)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = call["input"], call["other"]
        if call.get("rounding_mode") is not None:
            return Unknown("is rounded").neurons(flow, call)
        if not isinstance(b, (Tensor, Weight)):
            return a
        if isinstance(a, Weight):
            return Unknown("is divided by a tensor").neurons(flow, call)
        if isinstance(b, Weight):
            flow.pin(b)
        else:
            flow.fix(b, "is a divisor")
        return a.expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        a, divisor = call["input"], flow.operand(call["other"], "other")
        if call.get("rounding_mode") is not None or (divisor.data and not a.data):
            return flow.barrier(call)
        return flow.product(call.output.shape, a, flow.inverse(divisor))


register(
    Homogeneous(),
    *("relu", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "dropout", "feature_dropout", "abs"),
)
register(Negative(), "neg")
register(NanToNum(), "nan_to_num")
register(Clamp(), "clamp", "clamp_min", "clamp_max", "hardtanh", "clip")
register(Sum(), "add")
register(Sum(-1), "sub")
register(Choice(), "maximum", "minimum", "fmax", "fmin", "max.other", "min.other", "where")
register(MaskedFill(), "masked_fill")
register(
    Comparison(),
    *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal", "isnan"),
    *("isinf", "isfinite", "sign", "sgn", "signbit"),
)
register(Product(), "mul", "multiply")
register(Quotient(), "div", "divide", "true_divide")
register(
    Unknown("enters a function that is not positively homogeneous"),
    *("sigmoid", "tanh", "softmax", "log_softmax", "_softmax", "_log_softmax", "gelu", "silu", "mish", "elu", "selu"),
    *("celu", "relu6", "hardsigmoid", "hardswish", "softplus", "softsign", "tanhshrink", "log_sigmoid", "exp", "log"),
    *("log1p", "expm1", "sqrt", "rsqrt", "pow", "square", "reciprocal", "erf", "sin", "cos", "logit", "logsumexp"),
    *("norm", "linalg_vector_norm", "hardshrink", "softshrink", "rsub", "alpha_dropout"),
    *("feature_alpha_dropout",),
)
