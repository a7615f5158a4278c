"""The true values of what does not depend on the network's input."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OperatorBase

from dagpath.capture.graph import CapturedGraph, is_random
from dagpath.runtime.distributed import whole


class NotConstantError(Exception):
    """The value depends on the network's input, on randomness, or on values that are not there (meta tensors)."""


class Constants:
    """Evaluates nodes of a captured graph that depend on buffers, constants and the given parameters alone.

    Args:
        graph: the graph.
        parameters: the parameters' values by name.
        records: can the values be differentiated with respect to the parameters'?
        known: values of nodes that are taken as given.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        parameters: Mapping[str, Tensor],
        records: bool = False,
        known: Mapping[fx.Node, Any] | None = None,
    ) -> None:
        self._records = records
        self._graph = graph
        self._parameters = parameters
        self._known: dict[fx.Node, Any] = dict(known or {})

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            NotConstantError: it has no fixed value.
        """
        if node in self._known:
            return self._known[node]
        value = self._evaluate(node)
        if node.op != "placeholder":  # parameters may be too many to be kept
            self._known[node] = value
        return value

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            name = self._graph.parameters.get(node.name)
            found = self._graph.tensors.get(node.name) if name is None else self._parameters.get(name)
            if found is None or found.is_meta:
                raise NotConstantError(node.name)
            return found if self._records else whole(found)
        if node.op == "get_attr":
            return getattr(self._graph.module, str(node.target))
        if node.op != "call_function" or not _is_function(node.target) or is_random(node):
            raise NotConstantError(node.name)
        known = self._shape if node.target in _OF_A_SHAPE else self
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
        with torch.set_grad_enabled(self._records), node.meta.get("context", contextlib.nullcontext)():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return value.zero_() if node.target in _EMPTY else value

    def _shape(self, node: fx.Node) -> Any:
        """Any tensor of the node's shape, type and device; the value of a number."""
        fake = node.meta["val"]
        if not isinstance(fake, Tensor):
            return self(node)
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


_ATEN = torch.ops.aten
_EMPTY = {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.new_empty.default}
"""Memory that nothing was written to: taken for zeros, so that two runs see the same."""
_OF_A_SHAPE = {
    *(_ATEN.zeros_like.default, _ATEN.ones_like.default, _ATEN.full_like.default, _ATEN.empty_like.default),
    *(_ATEN.new_zeros.default, _ATEN.new_ones.default, _ATEN.new_full.default, _ATEN.new_empty.default),
}
"""What these make of a tensor that depends on the input is constant nevertheless."""


def _is_function(target: Any) -> bool:
    """Operations are, and arithmetic on numbers; other Python functions may do anything, such as enter a ``vmap``."""
    return isinstance(target, OperatorBase) or getattr(target, "__module__", "") in ("_operator", "math")
