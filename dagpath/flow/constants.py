"""The true values of what does not depend on the network's input."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.capture import CapturedGraph
from dagpath.flow.values import Call


class NotConstantError(Exception):
    """The value depends on the network's input, on randomness, or on values that are not there (meta tensors)."""


class Constants:
    """Evaluates nodes of a captured graph that depend on buffers, constants and the given parameters alone.

    Args:
        graph: the graph.
        parameters: the parameters' values by name.
        known: values of nodes that are taken as given.
    """

    def __init__(
        self, graph: CapturedGraph, parameters: Mapping[str, Tensor], known: Mapping[fx.Node, Any] | None = None
    ) -> None:
        self._graph = graph
        self._parameters = parameters
        self._known: dict[fx.Node, Any] = dict(known or {})

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            NotConstantError: it has no fixed value.
        """
        if node not in self._known:
            self._known[node] = self._evaluate(node)
        return self._known[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            name = self._graph.parameters.get(node.name)
            found = self._graph.tensors.get(node.name) if name is None else self._parameters.get(name)
            if found is None or found.is_meta:
                raise NotConstantError(node.name)
            return found.detach()
        if node.op == "get_attr":
            return getattr(self._graph.module, str(node.target))
        if node.op != "call_function" or _is_random(node):
            raise NotConstantError(node.name)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self)
        with torch.no_grad(), node.meta.get("context", contextlib.nullcontext)():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_random(node: fx.Node) -> bool:
    """Does the call draw random numbers? A dropout that is not training does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    call = Call(node.target, node.args, dict(node.kwargs), node)  # type: ignore[arg-type]
    return call.get("train", call.get("training", True)) is not False
