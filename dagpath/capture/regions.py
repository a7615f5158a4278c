"""Regions of code that the exporter puts into subgraphs: those under ``torch.no_grad()`` and ``torch.autocast``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Region:
    """The call of a subgraph: its body, the arguments of that, and what makes its autocast context, if it has one."""

    body: fx.GraphModule
    arguments: tuple[Any, ...]
    context: Callable[[], Any] | None


def inlined(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with the operations of its regions in their place; the graph itself where there are none.

    Whether gradients are recorded does not matter to scales. Autocast rounds to a narrower type: bfloat16 has the range
    of float32, so that powers of two pass the rounding unchanged. In float16 they may leave the range, so a region of
    it stays closed: an operation without a rule.

    Operations from inside an autocast have ``meta["context"]``: it makes the context that they are evaluated in.
    """
    if not any(_region(module, node) for node in module.graph.nodes):
        return module
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    graph.output(_copy(module, graph, attributes, {}, None))
    return fx.GraphModule(attributes, graph)


def _region(module: fx.GraphModule, node: fx.Node) -> Region | None:
    """The region that a node calls; None if it calls none, or one that stays closed."""
    arguments: tuple[Any, ...] = node.args
    kind = str(node.target) if node.op == "call_function" else ""
    if kind == "wrap_with_set_grad_enabled":
        _, body, *operands = arguments
        return Region(getattr(module, body.target), tuple(operands), None)
    if kind == "wrap_with_autocast":
        device, dtype, enabled, cache, body, *operands = arguments
        dtype = dtype or torch.get_autocast_dtype(device)
        if not enabled or dtype != torch.float16:
            context = functools.partial(torch.autocast, device, dtype, enabled, cache)
            return Region(getattr(module, body.target), tuple(operands), context)
    return None


def _copy(
    module: fx.GraphModule,
    graph: fx.Graph,
    attributes: dict[str, Any],
    values: dict[fx.Node, Any],
    context: Callable[[], Any] | None,
) -> Any:
    """Copy a module's nodes into ``graph``; returns what the module returns.

    Args:
        module: where the nodes are.
        graph: where they go.
        attributes: collects the tensors and subgraphs that they refer to.
        values: what stands for each node of the module; placeholders that are given here are not copied.
        context: makes the autocast context that the module is in.
    """
    for node in module.graph.nodes:
        if node in values:
            continue
        if node.op == "output":
            break
        region = _region(module, node)
        if region is not None:
            placeholders = (inner for inner in region.body.graph.nodes if inner.op == "placeholder")
            given = fx.node.map_arg(region.arguments, values.__getitem__)
            inside = dict(zip(placeholders, given, strict=True))
            values[node] = _copy(region.body, graph, attributes, inside, region.context or context)
        elif node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op != "get_attr" or not all(_region(module, user) for user in node.users):
            copy = values[node] = graph.node_copy(node, values.__getitem__)
            if context is not None:
                copy.meta["context"] = context
            if node.op == "get_attr":
                copy.target = f"{node.target}_{len(attributes)}" if node.target in attributes else node.target
                attributes[str(copy.target)] = operator.attrgetter(str(node.target))(module)
    output = next(node for node in module.graph.nodes if node.op == "output")
    return fx.node.map_arg(output.args[0], values.__getitem__)
