"""An exported program as one graph without in-place operations, and what it writes to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from dagpath.capture.regions import inlined


def functional_graph(
    program: torch.export.ExportedProgram, is_compound: Callable[[Any], bool]
) -> tuple[fx.GraphModule, set[str]]:
    """The graph of a program without in-place operations, and the names of the placeholders that it writes to."""
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            _replace_identities(part)
    module = inlined(program.graph_module)
    parts = _decompositions(module, is_compound)
    functional = None if parts else without_writes(module)
    if functional is not None:
        return functional
    whole = program.run_decompositions(parts)
    written = {str(spec.target) for spec in whole.graph_signature.output_specs if spec.kind in _MUTATIONS}
    specs = whole.graph_signature.input_specs
    return inlined(whole.graph_module), {str(getattr(s.arg, "name", "")) for s in specs if str(s.target) in written}


def constants_of(program: torch.export.ExportedProgram) -> set[str]:
    """The placeholders of all that is not given to the model."""
    specs = program.graph_signature.input_specs
    return {str(getattr(spec.arg, "name", "")) for spec in specs if spec.kind != InputKind.USER_INPUT}


_ATEN = torch.ops.aten
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def _replace_identities(module: fx.GraphModule) -> None:
    """Replace dropouts that drop nothing by their input, which PyTorch returns itself: what is written into one is
    written into the other.
    """
    for node in module.graph.nodes:
        if getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in _DROPOUTS:
            tensor, rate, training = node.args
            if not training or rate == 0:
                node.replace_all_uses_with(tensor)
                module.graph.erase_node(node)


def take_out(module: fx.GraphModule, kept: Sequence[str], constants: Collection[str]) -> None:
    """Take what a call leaves behind out of the outputs, where it stands last; mark the nodes that depend on inputs.

    What is made of parameters alone is either made again in the next call, or read there: its graph will show.
    """
    if not kept:
        return
    data: set[fx.Node] = set()
    for node in module.graph.nodes:
        if (node.op == "placeholder" and node.name not in constants) or not data.isdisjoint(node.all_input_nodes):
            data.add(node)
    output = module.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    for place, node in zip(kept, results[-len(kept) :], strict=True):
        if isinstance(node, fx.Node) and node in data:
            node.meta["escapes"] = f"is kept for the next call, as {place}"
    output.args = (tuple(results[: -len(kept)]),)


def _decompositions(module: fx.GraphModule, is_compound: Callable[[Any], bool]) -> dict[Any, Callable[..., Any]]:
    """How PyTorch makes compound operations of others; empty where the graph has none."""
    if not any(node.op == "call_function" and is_compound(node.target) for node in module.graph.nodes):
        return {}
    known = torch.export.default_decompositions()
    return {target: known[target] for target in known if is_compound(target)}


def without_writes(module: fx.GraphModule) -> tuple[fx.GraphModule, set[str]] | None:
    """A copy of the graph with in-place operations replaced by their results, and the placeholders that they write to.

    None where views make that unsafe. After ``y = relu_(x)``, a later use of ``x`` means the new value: it is
    redirected to ``y``. Another view of the same storage that is used later has no node to be redirected to, and needs
    a full functionalization. A result written into a parameter, buffer or input outlives the call: its node is marked
    ``meta["escapes"]``.
    """
    written = set()
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    order = {node: index for index, node in enumerate(graph.nodes)}
    by_storage: dict[int | None, list[fx.Node]] = {}
    for node in order:
        if not all(user.target is _ATEN.lift_fresh_copy.default for user in node.users):  # that copies
            by_storage.setdefault(_storage_of(node), []).append(node)
    for node in order:
        if node.target is _ATEN.detach_.default:  # which writes no values
            node.target = _ATEN.detach.default
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        functional = _functional(node.target)
        if functional is None:
            return None
        if any(info.alias_info is not None and info.alias_info.is_write for info in schema.arguments[len(node.args) :]):
            return None  # an ``out=`` argument
        for argument, info in zip(node.args, schema.arguments, strict=False):
            if info.alias_info is None or not info.alias_info.is_write:
                continue
            storage = _storage_of(argument) if isinstance(argument, fx.Node) else None
            if storage is None:
                return None
            for alias in by_storage[storage]:
                if order[alias] >= order[node]:
                    continue
                later = [user for user in alias.users if order[user] > order[node]]
                if later and not _same_view(alias.meta["val"], node.meta["val"]):
                    return None
                for user in later:
                    user.replace_input_with(alias, node)
                if alias.op == "placeholder":
                    node.meta["escapes"] = "is written into a buffer or an input"
                    written.add(alias.name)
        node.target = functional
    return fx.GraphModule(module, graph), written


def _storage_of(node: fx.Node) -> int | None:
    """What tells apart the memory of the tensors in a graph; None for what is no tensor, or one without a storage."""
    value = node.meta.get("val")
    try:
        return int(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None
    except NotImplementedError:  # a sparse tensor, or one inside of a vmap
        return None


def _same_view(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor):
        return False
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _functional(target: Any) -> Callable[..., Any] | None:
    """The out-of-place form of an in-place ATen operation, which takes the same arguments; None if there is none."""
    packet = target.overloadpacket
    if target.namespace != "aten" or not packet.__name__.endswith("_"):
        return None
    others = getattr(torch.ops.aten, packet.__name__[:-1], None)
    names = others.overloads() if others is not None else []
    overloads = [getattr(others, name) for name in sorted(names, key=lambda name: name != target._overloadname)]
    return next((overload for overload in overloads if _types(overload) == _types(target)), None)


def _types(target: Any) -> list[str]:
    return [str(argument.type) for argument in target._schema.arguments]
