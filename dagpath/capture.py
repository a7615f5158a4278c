"""From a model to a functional ``torch.fx`` graph of ATen operations, with the model left as it was.

The graph comes from :func:`torch.export.export`. Both modes are captured: path quantities are those of the eval
graph; the train graph may read scaled neurons where the eval graph does not (an auxiliary head).
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from tqdm import TMonitor

from dagpath.containers import opened
from dagpath.distributed import has_all_values, own, stand_in, whole
from dagpath.errors import CaptureError
from dagpath.exporting import exported_with_what_is_left, followed
from dagpath.regions import inlined
from dagpath.sizes import copies
from dagpath.state import mode, random_states, without_autocast

_LIBRARY_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


_NOISY = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export")


@dataclass(frozen=True)
class CapturedGraph:
    """One call of a model as a functional graph.

    Attributes:
        module: the graph; every node is an ATen operation whose ``meta["val"]`` holds its shape. Where its result
            outlives the call, ``meta["escapes"]`` says how.
        parameters: placeholder name -> name in ``model.named_parameters()``.
        buffers: placeholder name -> name in ``model.named_buffers()``.
        tensors: placeholder name -> buffer or constant tensor (the live one, not a copy).
        state: as ``tensors``, those that calls write to: what one call leaves there, the next one reads.
        batch: number of examples that it was captured with; None where the inputs were used as given.
        structure: how the model arranges the tensors that it returns; they are the last outputs of the graph.
        call: which call it is, in words; empty for the one that the others are compared with.
        leaves_state: does it leave anything behind that the next call may read?
    """

    module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    batch: int | None
    structure: pytree.TreeSpec
    call: str = ""
    leaves_state: bool = False


def user_line(error: BaseException) -> str:
    """The deepest source line of ``error`` that lies in the user's code, as ``file:line (code)``; empty if none."""
    found = ""
    current: BaseException | None = error
    while current is not None:
        for frame in traceback.extract_tb(current.__traceback__):
            if not frame.filename.startswith((*_LIBRARY_FOLDERS, "<")):
                found = f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def check_model(model: nn.Module) -> None:
    """Raise CaptureError for a model that holds no Python code, or parameters without a shape."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a TorchScript module, which holds no Python code to capture; trace the "
            "torch.nn.Module that it was made from"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise CaptureError(f"the parameter {lazy[0]!r} has no shape yet: run the model once before tracing it")


def shared_parameters(model: nn.Module, graphs: Sequence[CapturedGraph]) -> set[str]:
    """Names of parameters whose storage other tensors of the model use too, or whose own entries share memory.

    Multiplying one of them in place would change the others.
    """
    tensors = {id(tensor): own(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for graph in graphs:
        tensors |= {id(tensor): own(tensor) for tensor in (*graph.tensors.values(), *graph.state.values())}
    users = Counter(_storage(tensor) for tensor in tensors.values())
    return {
        name
        for name, parameter in ((name, tensors[id(parameter)]) for name, parameter in model.named_parameters())
        if users[_storage(parameter)] > 1
        or any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True))
    }


def _storage(tensor: Tensor) -> tuple[str, int]:
    """What tells the memory of tensors apart: its address, or the storage itself where there is none."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # sparse tensors
        return "tensor", id(tensor)
    return ("address", storage.data_ptr()) if storage.data_ptr() else ("storage", storage._cdata)


def outputs_have_batch(graph: CapturedGraph, size: int) -> bool:
    output = next(node for node in graph.module.graph.nodes if node.op == "output")
    values = [node.meta.get("val") for node in output.all_input_nodes]
    return all(value.shape[0] == size for value in values if isinstance(value, Tensor) and value.ndim)


def export(
    model: nn.Module,
    inputs: Any,
    training: bool,
    is_compound: Callable[[Any], bool],
    batch: int | None = None,
    call: str = "",
    made_before: Collection[Tensor] = (),
) -> CapturedGraph:
    """The graph of one call of a model.

    Args:
        model: the model, which is left as it was.
        inputs: positional and keyword arguments.
        training: in train mode?
        is_compound: operations for which this holds are replaced by those that PyTorch makes them of.
        batch: number of examples, for the result.
        call: which call it is, for the result.
        made_before: tensors that an earlier call left behind.

    Raises:
        CaptureError: the forward depends on something that no graph can stand for. The exporter raises many other
            types.
    """
    with mode(model, training), torch.enable_grad(), _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own come again when it runs; the exporter's are not for our users
        args, kwargs = stand_in(model, inputs)
        before = random_states()
        with exported_with_what_is_left(model) as left, followed():
            program = torch.export.export(model, args, kwargs, strict=False)
        if random_states() != before:
            raise CaptureError("the forward draws random numbers in Python: no graph stands for all its runs")
        module, written = _functional_graph(program, is_compound)
        _take_out(module, list(left.tensors), _constants(program))
        module.graph.eliminate_dead_code(lambda node: node.is_impure() or "escapes" in node.meta)
        module.recompile()
    owners = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    live = dict(model.named_buffers(remove_duplicate=False))
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        placeholder = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.PARAMETER and str(spec.target) not in owners:
            raise CaptureError(f"the forward makes the parameter {spec.target!r}: run the model once before tracing it")
        if spec.kind == InputKind.PARAMETER:
            parameters[placeholder] = names[id(owners[str(spec.target)])]
        elif spec.kind == InputKind.BUFFER and spec.target in live:
            buffers[placeholder] = spec.target
            tensors[placeholder] = live[spec.target]
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            tensors[placeholder] = program.constants[str(spec.target)]
    moving = {_storage(tensor) for tensor in (*left.gone, *made_before)}
    state = {place: t for place, t in tensors.items() if place in written or _storage(t) in moving}
    graph = CapturedGraph(
        module,
        parameters,
        {place: name for place, name in buffers.items() if place not in state},
        {place: tensor for place, tensor in tensors.items() if place not in state},
        state,
        batch,
        left.structure,
        call,
        left.changed or bool(written),
    )
    _make_shapes_known(graph, model, inputs)
    return graph


def _functional_graph(
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


def _constants(program: torch.export.ExportedProgram) -> set[str]:
    """The placeholders of all that is not given to the model."""
    specs = program.graph_signature.input_specs
    return {str(getattr(spec.arg, "name", "")) for spec in specs if spec.kind != InputKind.USER_INPUT}


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


def _take_out(module: fx.GraphModule, kept: Sequence[str], constants: Collection[str]) -> None:
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


def _make_shapes_known(graph: CapturedGraph, model: nn.Module, inputs: Any) -> None:
    """Shapes that depend on the values of the inputs become those that they have for these inputs.

    Raises:
        CaptureError: there are such shapes, and no values.
    """
    unknown = next((node for node in graph.module.graph.nodes if not _has_known_shape(node)), None)
    if unknown is None:
        return
    if not has_all_values(model):
        raise CaptureError(f"the shape of {unknown.name} depends on the values of the input: {call_line(unknown)}")
    owners = dict(model.named_parameters())
    known = {**graph.tensors, **graph.state, **{place: owners[name] for place, name in graph.parameters.items()}}
    given = iter(pytree.tree_leaves(copies(inputs)))
    places = [node.name for node in graph.module.graph.nodes if node.op == "placeholder"]
    values = [known[name].detach().clone() if name in known else next(given) for name in places]
    with torch.no_grad():
        _WithShapes(graph.module).run(*values, enable_io_processing=False)


def _has_known_shape(node: fx.Node) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


def call_line(node: fx.Node) -> str:
    """The line of the user's that made a call."""
    return " ".join(line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()[-2:])


class _WithShapes(fx.Interpreter):
    """Runs a graph, and writes down the shapes that its values have."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._fakes = FakeTensorMode()

    def run_node(self, n: fx.Node) -> Any:
        with n.meta.get("context", contextlib.nullcontext)():
            result = super().run_node(n)
        if not _has_known_shape(n) or isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            n.meta["val"] = pytree.tree_map_only(Tensor, self._fakes.from_tensor, result)
        return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own log of what goes wrong, and the unfinished graph that it prints: the error says it."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    held, graph = io.StringIO(), None
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(held):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.stderr.write(held.getvalue() if graph is None else held.getvalue().replace(f"{graph}\n", ""))


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
        by_storage.setdefault(_storage_of(node), []).append(node)
    for node in order:
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


def _at(error: BaseException) -> str:
    line = user_line(error)
    return f"  at {line}\n" if line else ""


def headline(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def run(model: nn.Module, inputs: Any, training: bool, dry: bool = False) -> list[Tensor]:
    """The tensors that the model returns, computed without gradients; the model is left as it was.

    Args:
        model: the model.
        inputs: its inputs, positional and by keyword.
        training: in train mode?
        dry: without the values of parameters and buffers: the results have none either.

    Raises:
        CaptureError: the model's forward raised, or, without values, asked for one; the message names the line.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True) if dry else None
    try:
        with mode(model, training), without_autocast(), torch.no_grad(), fakes or contextlib.nullcontext():
            args, kwargs = stand_in(model, inputs, fakes) if fakes else copies(inputs)
            leaves = pytree.tree_leaves(opened(model(*args, **kwargs)))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise capture_error(model, error) from error
    except Exception as error:
        shapes = ", ".join(
            f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in pytree.tree_leaves(inputs)
        )
        raise CaptureError(
            f"the model's forward raised on the example inputs ({shapes}): {headline(error)}\n"
            f"{_at(error)}"
            f"  Pass inputs that the model accepts: model(*example_inputs, **kwargs) must run in "
            f"{'train' if training else 'eval'} mode."
        ) from error
    return [whole(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


_NO_VALUES = (
    "\n  This model was made without values (on the meta device, say): if it computes with tensors of its own, such as "
    "tables, make it with values."
)


def capture_error(model: nn.Module, failure: Exception) -> CaptureError:
    alive = [thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)]  # progress bars have one
    threads = (
        "\n  Other threads are alive: PyTorch's exporter fails where one of them runs a module meanwhile, be it of "
        "another model; trace while none does."
    )
    return CaptureError(
        f"{type(model).__name__} cannot be captured as a graph: {headline(failure)}\n"
        f"{_at(failure)}"
        "  A graph needs control flow and shapes that do not depend on the values of the input: replace such a "
        "branch by torch.where or torch.cond, or trace the submodule that does not contain it."
        f"{'' if has_all_values(model) else _NO_VALUES}"
        f"{threads if len(alive) > 1 else ''}"
    )
