"""Attention, and tables of embeddings that are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dagpath.flow.edge_values import EdgeWeights, Nodes
from dagpath.flow.edges import EdgeFlow, Values, all_places
from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, Call, Mass, Operand, Weight
from dagpath.ops.base import Operation, register


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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        weight, indices = call["weight"], call["indices"]
        values = weight.values.sum(0).expand(call.output.shape)
        return flow.result([weight, indices], values, weight.exponent, layer=weight.params)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        weight, indices = call["weight"], call["indices"]
        rows, node = weight.shape[0], indices.node

        def one_hot(values: Values) -> Tensor:
            return torch.nn.functional.one_hot(values[node].long(), rows)

        shape = (*indices.shape, rows)
        if isinstance(weight, EdgeWeights):
            src = flow.source(shape, one_hot, "row").numbers
            dst = flow.new(call.output.shape)
            flow.connect(dst[..., None], src[..., None, :], weight.taken(all_places(weight.shape).t()))
        else:
            dst = flow.new(call.output.shape)
            flow.connect(dst[..., None], weight.numbers.t(), slots=flow.slots(shape, one_hot)[..., None, :])
        return Nodes(dst, weight.params)


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

    def mass(self, flow: MassFlow, call: Call) -> Any:
        for name in ("query", "key", "attn_mask"):
            if isinstance(call.get(name), Mass):
                flow.barrier_input(call[name])
        value = call["value"]
        total = value.values.sum(-2, keepdim=True)
        repeats = call.output.shape[-3] // total.shape[-3] if total.ndim > 2 and call.get("enable_gqa") else 1
        total = total.repeat_interleave(repeats, -3) if repeats > 1 else total
        return flow.result([value], total.expand(call.output.shape), value.exponent)

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        for name in ("query", "key", "attn_mask"):
            if isinstance(call.get(name), Operand):
                flow.cut_paths(call[name])
        x, shape = flow.nodes(call["value"]), call.output.shape
        if call.get("enable_gqa"):
            x = x.repeat_interleave(shape[-3] // x.shape[-3], -3)
        slots = flow.slots((*shape[:-1], x.shape[-2]), lambda values: self._attention(call.on(values)))
        dst = flow.new(shape)
        flow.connect(dst[..., None], x.mT[..., None, :, :], slots=slots[..., None, :])
        return Nodes(dst, call["value"].params)

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
