"""Which parameters a path may meet more than once."""

from __future__ import annotations

import operator

from torch import fx

from dagpath.trace import TracedModel


def used_repeatedly(traced: TracedModel) -> set[str]:
    """Parameters that reach activations more than once, directly or in what is computed of parameters alone."""
    graph = traced.captured.eval
    nodes = list(graph.module.graph.nodes)
    constant: set[fx.Node] = set()
    for node in nodes:
        given = node.name in graph.parameters or node.name in graph.tensors
        if given if node.op == "placeholder" else all(operand in constant for operand in node.all_input_nodes):
            constant.add(node)
    uses: dict[fx.Node, int] = {}
    for node in (node for node in reversed(nodes) if node in constant):
        each = [_occurrences(node, user) * uses.get(user, 1) for user in node.users]
        is_split = all(user.target is operator.getitem for user in node.users)
        uses[node] = max(each, default=0) if is_split else sum(each)
    placeholders = {node.name: node for node in nodes if node.op == "placeholder"}
    return {name for key, name in graph.parameters.items() if uses[placeholders[key]] > 1}


def _occurrences(operand: fx.Node, call: fx.Node) -> int:
    """How often a call has this operand."""
    found: list[fx.Node] = []
    fx.node.map_arg((call.args, call.kwargs), found.append)
    return found.count(operand)
