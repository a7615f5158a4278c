"""Normalizations: their input has a scale of its own, so it is fixed; their affine output is free."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import Coefficient, PathFlow
from dagpath.passes.values import FIXED, Call, Operand, Weight
from dagpath.rules.base import Operation, Unknown, first_of, register

_ONE = torch.ones(())


class Normalization(Operation):
    """A normalization: its input is fixed, its affine output makes new neurons.

    ``γ (x − mean) / sqrt(var + eps) + β``, the statistics taken from the input or, in batch norm, stored. With stored
    statistics it is one affine neuron per channel, of weight ``a = γ / sqrt(var + eps)`` and bias ``c = β − mean · a``.
    With statistics of the input it is a barrier: the normalized input is a new input.
    """

    def __init__(self, channels_last: bool) -> None:
        self.channels_last = channels_last

    def _placed(self, values: Tensor, ndim: int) -> Tensor:
        """A tensor of the affine parameters' shape, made to broadcast with the output."""
        if self.channels_last or values.ndim == 0:
            return values
        return values.reshape(-1, *[1] * (ndim - 2))

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        if isinstance(call["input"], Weight):  # a standardized weight
            return Unknown("enters a normalization as a parameter").neurons(flow, call)
        flow.fix(call["input"], "feeds a normalization")
        output = call.output if isinstance(call.output, Tensor) else call.output[0]
        weight, bias = call.get("weight"), call.get("bias")
        numbers = torch.tensor(FIXED)
        if isinstance(weight, Weight):
            numbers = flow.fresh(weight.shape.numel(), weight).view(weight.shape)
            flow.use(weight, numbers, torch.tensor(FIXED), reads=call["input"])
        if isinstance(bias, Weight):
            flow.use(bias, numbers, torch.tensor(FIXED))
        elif bias is not None:
            flow.fix(numbers, "a constant bias is added to it")
        for name in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(call.get(name), Tensor):
                flow.fix(call[name], "is a statistic or a computed coefficient of a normalization")
            elif isinstance(call.get(name), Weight) and name.startswith("running"):
                flow.pin(call[name])
        result = self._placed(numbers, output.ndim).expand(output.shape)
        return result if isinstance(call.output, Tensor) else (result, *flow.constant(list(call.output[1:])))

    @staticmethod
    def _uses_input(call: Call) -> bool:
        """Are the statistics those of the input?"""
        return bool(call.get("training", False) or call.get("use_input_stats", False))

    def paths(self, flow: PathFlow, call: Call) -> Any:
        x, weight, bias = call["input"], call.get("weight"), call.get("bias")
        if any(part.data for part in call.leaves(Operand)[1:]):
            return flow.barrier(call)
        stored = call.get("running_mean") is not None and not self._uses_input(call)
        if not stored:
            x = flow.anew(x, self._normalized)

        @functools.cache
        def inverse_std(real: Callable[[Any], Tensor]) -> Tensor:
            return (real(call["running_var"]) + call["eps"]).rsqrt() if stored else _ONE

        def offset(real: Callable[[Any], Tensor]) -> Tensor:
            return -real(call["running_mean"]) * inverse_std(real)

        shift: list[tuple[Coefficient, Any]] = [(offset, weight)] if stored else []
        shift += [(lambda _: _ONE, bias)] if bias is not None else []
        result = flow.affine(x, [(inverse_std, weight)], shift, lambda part: self._placed(part, len(x.shape)))
        return first_of(result, call.output)

    @staticmethod
    def _normalized(real: Call) -> Tensor:
        """The output without the affine parameters."""
        weight, bias = (real.get(name) for name in ("weight", "bias"))

        def without(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf is real["input"]:
                return leaf
            return torch.ones_like(leaf) if leaf is weight else torch.zeros_like(leaf) if leaf is bias else leaf

        result = real.run(without)
        normalized: Tensor = result if isinstance(result, Tensor) else result[0]
        return normalized


class WeightNorm(Operation):
    """Weight normalization ``g v / ‖v‖``: the magnitudes g are rescaled, v is not, so a layer's inputs are tied."""

    moves_weights = True

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        v, g = call["v"], call["g"]
        if not isinstance(v, Weight) or not isinstance(g, Weight):
            return Unknown().neurons(flow, call)
        flow.pin(v)
        return Weight(v.shape, elements=flow.elements(g).expand(v.shape))

    def paths(self, flow: PathFlow, call: Call) -> Any:
        def direction(real: Callable[[Any], Tensor]) -> Tensor:
            return self._direction(real(call["v"]), call["dim"])

        return flow.weights([(direction, call["g"])])

    @staticmethod
    def _direction(v: Tensor, dim: int) -> Tensor:
        rows = [other for other in range(v.ndim) if other != dim]
        direction: Tensor = v / torch.linalg.vector_norm(v, dim=rows, keepdim=True)
        return direction


register(WeightNorm(), "_weight_norm")
register(
    Normalization(channels_last=False),
    *("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional", "cudnn_batch_norm"),
    *("_batch_norm_no_update", "_batch_norm_with_update_functional", "group_norm", "native_group_norm"),
    *("instance_norm",),
)
register(Normalization(channels_last=True), "layer_norm", "native_layer_norm", "rms_norm")
