"""Normalizations: their input has a scale of its own, so it is fixed; their affine output is free."""

from __future__ import annotations

from typing import Any

import torch

from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, Call, Mass, Weight
from dagpath.ops.base import Operation, register


class BatchNorm(Operation):
    """``γ (x − mean) / sqrt(var + eps) + β`` per channel.

    With running statistics it is one affine neuron per channel, of weight ``a = γ / sqrt(var + eps)`` and bias
    ``c = β − mean · a``. With batch statistics it is a barrier: its normalized input is a new input.
    """

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        flow.fix(flow.activation(call["input"]), "feeds a normalization")
        output = call.output if isinstance(call.output, torch.Tensor) else call.output[0]
        weight, bias = call["weight"], call["bias"]
        numbers = torch.tensor(FIXED)
        if isinstance(weight, Weight):
            numbers = flow.fresh(weight.shape[0], weight)
            flow.use(weight, numbers, torch.tensor(FIXED))
        if isinstance(bias, Weight):
            flow.use(bias, numbers, torch.tensor(FIXED))
        elif bias is not None:
            flow.fix(numbers, "a constant bias is added to it")
        if numbers.ndim:
            numbers = numbers.view(-1, *[1] * (output.ndim - 2))
        result = numbers.expand(output.shape)
        return result if isinstance(call.output, torch.Tensor) else (result, *flow.constant(list(call.output[1:])))

    def mass(self, flow: MassFlow, call: Call) -> Any:
        mass, weight, bias = call["input"], call["weight"], call["bias"]
        frozen = not call.get("training", False) and call["running_mean"] is not None
        mean, inverse_std = torch.zeros(()), torch.ones(())
        if frozen:
            mean = flow.real(call["running_mean"])
            inverse_std = (flow.real(call["running_var"]) + call["eps"]).rsqrt()
        else:
            mass = flow.barrier_input(mass)
        gamma = flow.real(weight) if weight is not None else torch.ones_like(inverse_std)
        beta = flow.real(bias) if bias is not None else torch.zeros_like(inverse_std)
        constant = flow.power(beta - mean * inverse_std * gamma)
        scale = flow.power(inverse_std)
        if weight is not None:
            constant = constant + flow.gradient_only(weight, flow.power(mean * inverse_std))
            scale = scale * weight.values
        if bias is not None:
            constant = constant + flow.gradient_only(bias, torch.ones(()))
        channels = [-1, *[1] * (mass.values.ndim - 2)]
        scale, constant = (value.reshape(channels) for value in (scale, constant))
        used = [mass, *(part for part in (weight, bias) if part is not None)]
        exponent = flow.common([mass, Mass(constant, zero=not bool(constant.any()))])
        scale = flow.shifted(scale, mass.exponent - exponent)
        constant = flow.shifted(constant, -exponent)
        result = flow.result(used, torch.addcmul(constant, mass.values, scale), exponent)
        return result if isinstance(call.output, torch.Tensor) else (result, *[None] * (len(call.output) - 1))


register(
    BatchNorm(),
    *("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional", "cudnn_batch_norm"),
    *("_batch_norm_no_update", "_batch_norm_with_update_functional"),
)
