"""The graph of one call, from :func:`torch.export.export`."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from dagpath.capture.following import exported_with_what_is_left, followed
from dagpath.capture.functional import constants_of, functional_graph, take_out
from dagpath.capture.graph import CapturedGraph, storage_of
from dagpath.capture.site import describe
from dagpath.capture.sizes import copies
from dagpath.errors import CaptureError
from dagpath.runtime.distributed import has_all_values, stand_in
from dagpath.runtime.kept import overlaps
from dagpath.runtime.state import GradMode, mode, random_states, without_value_checks

_REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError)
"""What operations raise where tensors do not fit."""

_NOISY = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export")


def export(
    model: nn.Module,
    inputs: Any,
    training: bool | None,
    is_compound: Callable[[Any], bool],
    batch: int | None = None,
    call: str = "",
    made_before: Collection[Tensor] = (),
    names: Mapping[int, str] | None = None,
    grad_mode: GradMode = torch.enable_grad,
) -> CapturedGraph:
    """The graph of one call of a model.

    Args:
        model: the model, which is left as it was.
        inputs: positional and keyword arguments.
        training: in train mode? None for the modes that its modules are in.
        is_compound: operations for which this holds are replaced by those that PyTorch makes them of.
        batch: number of examples, for the result.
        call: which call it is, for the result.
        made_before: tensors that an earlier call left behind.
        names: id of each parameter -> its name, where an earlier call may have given it another one.
        grad_mode: makes the context that says whether the call records what a backward pass needs.

    Raises:
        CaptureError: the forward depends on something that no graph can stand for. The exporter raises many other
            types.
    """
    with mode(model, training), grad_mode(), quiet(), without_value_checks():
        args, kwargs = stand_in(model, inputs)
        before = random_states()
        with exported_with_what_is_left(model) as left, followed():
            program = torch.export.export(model, args, kwargs, strict=False)
        if left.drawn or random_states() != before:
            raise CaptureError("the forward draws random numbers in Python: no graph stands for all its runs")
        module, written = functional_graph(program, is_compound)
        take_out(module, list(left.tensors), constants_of(program))
        module.graph.eliminate_dead_code(lambda node: node.is_impure() or "escapes" in node.meta)
        module.recompile()
    owners = dict(model.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in model.named_parameters()} if names is None else names
    live = dict(model.named_buffers(remove_duplicate=False))
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        placeholder = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.PARAMETER and id(owners.get(str(spec.target))) not in names:
            raise CaptureError(f"the forward makes the parameter {spec.target!r}: run the model once before tracing it")
        if spec.kind == InputKind.PARAMETER:
            parameters[placeholder] = names[id(owners[str(spec.target)])]
        elif spec.kind == InputKind.BUFFER and spec.target in live:
            buffers[placeholder] = spec.target
            tensors[placeholder] = live[spec.target]
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            tensors[placeholder] = program.constants[str(spec.target)]
    moving = {storage_of(tensor) for tensor in (*left.gone, *made_before)}
    written |= {place for place, name in buffers.items() if name in left.replaced}
    state = {
        place: t
        for place, t in tensors.items()
        if place in written or storage_of(t) in moving or any(overlaps(t, memory) for memory in left.memory)
    }
    graph = CapturedGraph(
        module,
        parameters,
        {place: name for place, name in buffers.items() if place not in state},
        {place: tensor for place, tensor in tensors.items() if place not in state},
        state,
        batch,
        left.structure or program.call_spec.out_spec,
        call,
        (*left.changes, *sorted(parameters.get(place, buffers.get(place, place)) for place in written)),
    )
    return replace(graph, chosen=_make_shapes_known(graph, model, inputs))


def _make_shapes_known(graph: CapturedGraph, model: nn.Module, inputs: Any) -> tuple[str, ...]:
    """Shapes that depend on the values of the inputs become those that they have for these inputs.

    Where values choose no entry at all, one is made up, or as many as there are to choose from, if the rest of the
    graph can be run with these: what reads the entries would not be seen.

    Returns:
        The lines of code at which values decide how many entries there are.

    Raises:
        CaptureError: there are such shapes, and no values.
    """
    choices = [node for node in graph.module.graph.nodes if not _has_known_shape(node)]
    choices = [node for node in choices if all(map(_has_known_shape, node.all_input_nodes))]
    if not choices:
        return ()
    if not has_all_values(model):
        unknown = choices[0]
        raise CaptureError(f"a shape depends on the values of the input: {describe(unknown)}")
    owners = dict(model.named_parameters())
    known = {**graph.tensors, **graph.state, **{place: owners[name] for place, name in graph.parameters.items()}}
    given = iter(pytree.tree_leaves(copies(inputs)))
    places = [node.name for node in graph.module.graph.nodes if node.op == "placeholder"]
    values = [known[name].detach().clone() if name in known else next(given) for name in places]
    shapes: dict[fx.Node, Any] = {}
    for made_up in (_one, _all, None):
        with torch.no_grad(), contextlib.suppress(*(() if made_up is None else _REFUSALS)):
            shapes = _WithShapes(graph.module, made_up).shapes_of(*copies(values))
            break
    for node, shape in shapes.items():
        node.meta["val"] = shape
    return tuple(dict.fromkeys(map(describe, choices)))


def _has_known_shape(node: fx.Node) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


class _WithShapes(fx.Interpreter):
    """Runs a graph, and finds the shapes of those of its values whose shape is not known.

    Args:
        module: the graph.
        made_up: how many entries are made up where values choose none, given those that there are to choose from.
    """

    def __init__(self, module: fx.GraphModule, made_up: Callable[[int], int] | None) -> None:
        super().__init__(module)
        self._fakes, self._made_up = FakeTensorMode(), made_up
        self._shapes: dict[fx.Node, Any] = {}

    def shapes_of(self, *values: Any) -> dict[fx.Node, Any]:
        """Node -> fake tensors (or the number) in place of its value, for given inputs."""
        self.run(*values, enable_io_processing=False)
        return self._shapes

    def run_node(self, n: fx.Node) -> Any:
        with n.meta.get("context", contextlib.nullcontext)():
            result = super().run_node(n)
        is_known = _has_known_shape(n)
        if not is_known and self._made_up is not None:
            result = pytree.tree_map_only(Tensor, functools.partial(self._with_entries, n), result)
        if not is_known or isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self._shapes[n] = pytree.tree_map_only(Tensor, self._fakes.from_tensor, result)
        return result

    def _with_entries(self, node: fx.Node, result: Tensor) -> Tensor:
        """A tensor of zeros in place of one without entries."""
        assert self._made_up is not None
        if result.numel():
            return result
        given = [self.env[used] for used in node.all_input_nodes if isinstance(self.env[used], Tensor)]
        if not all(tensor.numel() for tensor in given):
            return result
        of_one = math.prod(size for size in result.shape if size)
        count = self._made_up(max((tensor.numel() for tensor in given), default=1) // of_one)
        return result.new_zeros([size or max(count, 1) for size in result.shape])


def _one(there_are: int) -> int:
    return 1


def _all(there_are: int) -> int:
    return there_are


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's own log of what goes wrong, and the unfinished graph that the exporter prints: errors say it.

    Without warnings either: the model's own come again when it runs, those of the exporter are not for our users.
    """
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    held, graph = io.StringIO(), None
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(held), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.stderr.write(held.getvalue() if graph is None else held.getvalue().replace(f"{graph}\n", ""))
