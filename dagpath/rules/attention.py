"""Attention, and tables of embeddings that are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import Gate, PathFlow
from dagpath.passes.values import FIXED, Call, Weight
from dagpath.rules.base import Operation, register


class Embedding(Operation):
    """A table looked up by indices: a linear layer on one-hot inputs."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        weight = call["weight"]
        if not isinstance(weight, Weight):
            shared = flow.mix(weight, [0], "rows of a table that is not rescaled")
            return shared.reshape(-1).expand(call.output.shape)
        dst = flow.fresh(weight.shape[1], weight)
        flow.use(weight, dst.view(1, -1), torch.tensor(FIXED))
        return dst.expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        weight, indices, shape = call["weight"], call["indices"], call.output.shape
        rows = weight.shape[0]

        def is_read(real: Call) -> Tensor:
            return torch.nn.functional.one_hot(real["indices"].long(), rows)[..., None, :]

        gate = Gate(is_read, (*indices.shape, 1, rows))
        return flow.reduced(weight, shape, torch.t, gate=gate, total=lambda table: table.sum(0).expand(shape))


class Attention(Operation):
    """``softmax(q kᵀ) v``: queries and keys are fixed, the values go through to the output."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        query, key, value = (flow.activation(call[name]) for name in ("query", "key", "value"))
        for operand in (query, key, call.get("attn_mask")):
            if isinstance(operand, Weight):
                flow.pin(operand)
            elif isinstance(operand, Tensor):
                flow.fix(operand, "enters the softmax of an attention")
        mixed = flow.mix(value, [value.ndim - 2], "attention")
        repeats = call.output.shape[-3] // mixed.shape[-3] if mixed.ndim > 2 and call.get("enable_gqa") else 1
        mixed = mixed.repeat_interleave(repeats, -3) if repeats > 1 else mixed
        return mixed.expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        for name in ("query", "key", "attn_mask"):
            flow.cut_paths(call.get(name))
        value, shape = call["value"], call.output.shape
        repeats = shape[-3] // value.shape[-3] if call.get("enable_gqa") and len(shape) > 2 else 1

        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(repeats, -3) if repeats > 1 else x

        return flow.reduced(
            value,
            shape,
            lambda x: repeated(x).mT[..., None, :, :],
            gate=Gate(lambda real: self._attention(real)[..., None, :], (*shape[:-1], 1, value.shape[-2])),
            total=lambda x: repeated(x.sum(-2, keepdim=True)),
        )

    @staticmethod
    def _attention(real: Call) -> Tensor:
        """How much each query sees of each value: the answer to values that are unit vectors."""
        value = real["value"]
        units = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device).expand(*value.shape[:-1], -1)
        options = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        settings = {name: real.get(name) for name in options if name in real.arguments}
        seen: Tensor = real.target(real["query"], real["key"], units, **settings)
        return seen


register(Embedding(), "embedding")
register(Attention(), "scaled_dot_product_attention")
