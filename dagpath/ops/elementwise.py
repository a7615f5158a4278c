"""Elementwise operations: homogeneous functions of one tensor, sums, products and quotients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.flow.edge_values import EdgeWeights, Nodes
from dagpath.flow.edges import EdgeFlow
from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, ZERO, Call, Mass, Operand, Weight, compact, is_scaleless, plain
from dagpath.ops.base import Operation, Unknown, all_parameters, register

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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return call.leaves(Mass)[0] if self.applies(call) else flow.barrier(call)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        if not self.applies(call):
            return flow.barrier(call)
        x = flow.nodes(call.args[0])
        positive, negative = self._slopes(call)
        dst = flow.new(x.shape)
        if positive is not None and positive == negative:
            flow.connect(dst, x, positive)
        else:
            flow.connect(dst, x, slots=flow.slots(x.shape, lambda values: self._gate(call.on(values))))
        return Nodes(dst, call.args[0].params)

    @staticmethod
    def _slopes(call: Call) -> tuple[float | None, float | None]:
        """The slopes on both sides of zero; None where they depend on other tensors."""
        if len(call.leaves(Operand)) > 1:
            return None, None

        def slope(sign: int) -> float:
            unit = torch.tensor(sign, dtype=torch.float64)
            return sign * float(call.run(lambda leaf: unit if isinstance(leaf, Operand) else leaf))

        return slope(1), slope(-1)

    @staticmethod
    def _gate(real: Call) -> Tensor:
        """``f(x) / x``: the slope on the side of zero where x is."""
        x = real.args[0]
        sign = torch.where(x > 0, 1.0, -1.0).to(x)
        gate: Tensor = sign * real.run(lambda leaf: sign if leaf is x else leaf)
        return gate + 0.0  # no negative zeros


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

    A sum of parameters is a weight. Its mass is the sum of theirs, as if each were an edge of its own.
    """

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign

    def keeps_weights(self, call: Call) -> bool:
        a, b = call["input"], call["other"]
        return all_parameters(a, b) or (not isinstance(b, Operand) and plain(b) == 0)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = call["input"], call["other"]
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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        a, b, alpha = call["input"], call["other"], plain(call.get("alpha", 1)) or 1.0
        if not isinstance(b, Mass):
            b = flow.number(b)
        if abs(alpha) != 1:
            b = flow.scaled(b, b.values, flow.number(alpha))
        exponent = flow.common([a, b])
        values_a, values_b = (flow.at(mass, exponent) for mass in (a, b))
        return flow.result([a, b], values_a + values_b, exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        a, b, factor = call["input"], flow.operand(call, "other"), self.sign * float(call.get("alpha", 1))
        if isinstance(a, EdgeWeights) and isinstance(b, EdgeWeights):
            return a.plus(b.scaled(factor))
        dst = flow.new(call.output.shape)
        flow.add(dst, a)
        flow.add(dst, b, factor)
        return Nodes(dst, a.params or b.params)


class Choice(Operation):
    """One of two tensors in each entry: they share a scale."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        a, b = call["input"], call["other"]
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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        a, b = (value if isinstance(value, Mass) else flow.number(value) for value in (call["input"], call["other"]))
        exponent = flow.common([a, b])
        values_a, values_b = (flow.at(mass, exponent) for mass in (a, b))
        condition = [call["condition"]] if isinstance(call.get("condition"), Mass) else []
        return flow.result([a, b, *condition], (values_a + values_b).expand(call.output.shape), exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        shape = call.output.shape
        a, b = flow.operand(call, "input"), flow.operand(call, "other")
        slots = flow.slots((2, *shape), lambda values: self._chosen(call.on(values), shape))
        dst = flow.new(shape)
        flow.add(dst, a, slots=slots[0])
        flow.add(dst, b, slots=slots[1])
        return Nodes(dst, a.params or b.params)

    @staticmethod
    def _chosen(real: Call, shape: torch.Size) -> Tensor:
        """Which operand stands in each entry."""
        condition = real.get("condition")
        first = condition if condition is not None else real.run(lambda leaf: leaf) == real["input"]
        return torch.stack([first, ~first]).view(2, *[1] * (len(shape) - first.ndim), *first.shape).expand(2, *shape)


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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return flow.inputs(call.output)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        if not self._keeps(call):
            return flow.barrier(call)
        masses = [mass for mass in (call["input"], call["mask"]) if isinstance(mass, Mass)]
        return flow.result(masses, masses[0].values.expand(call.output.shape), masses[0].exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        if not self._keeps(call):
            return flow.barrier(call)
        x, shape = flow.nodes(call["input"]), call.output.shape
        slots = flow.slots(shape, lambda values: ~call.on(values)["mask"].expand(shape))
        dst = flow.new(shape)
        flow.connect(dst, x, slots=slots)
        return Nodes(dst, call["input"].params)


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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        a, b = call["input"], call["other"]
        if not isinstance(b, Mass):
            return flow.scaled(a, a.values, flow.number(b))
        a, b = flow.factors(a, b)
        return flow.result([a, b], a.values * b.values, a.exponent + b.exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        a, b = call["input"], flow.operand(call, "other")
        if isinstance(a, EdgeWeights) and isinstance(b, EdgeWeights):
            return a.times(b)
        dst = flow.new(call.output.shape)
        flow.multiply(dst, a, _in_place, b, _in_place)
        return Nodes(dst, a.params or b.params)


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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        a, b = call["input"], call["other"]
        divisor = b if isinstance(b, Mass) else flow.number(b)
        if call.get("rounding_mode") is not None or (divisor.data and not a.data):
            return flow.barrier(call)
        if divisor.data:
            divisor = flow.barrier_input(divisor)
        inverse = flow.inverse(divisor)
        return flow.result([a], a.values * inverse.values, a.exponent + inverse.exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        a, divisor = call["input"], flow.operand(call, "other")
        if call.get("rounding_mode") is not None or (divisor.data and not a.data):
            return flow.barrier(call)
        if isinstance(divisor, EdgeWeights):
            inverse = EdgeWeights.constant(1 / divisor.total)
            if isinstance(a, EdgeWeights):
                return a.times(inverse)
        dst = flow.new(call.output.shape)
        if isinstance(divisor, EdgeWeights):
            flow.connect(dst, a.numbers, inverse)
        else:
            flow.connect(dst, a.numbers, slots=flow.gate(divisor, torch.reciprocal))
        return Nodes(dst, a.params)


def _in_place(places: Tensor) -> Tensor:
    return places


register(
    Homogeneous(),
    *("relu", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "dropout", "feature_dropout"),
    *("neg", "abs"),
)
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
