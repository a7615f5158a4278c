"""Does a captured graph compute what the model computes? A model may look whether it is being traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dagpath.capture.graph import CapturedGraph, is_random
from dagpath.capture.running import mode_text, run
from dagpath.capture.sizes import copies
from dagpath.errors import CaptureError
from dagpath.runtime.state import GradMode, mode

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference relative to the largest entry; other types are too coarse to tell. Rounding is far below, and what
a model computes on another way is far above."""


class _Values(fx.Interpreter):
    """Runs a graph, each operation in the context that it was captured in."""

    def run_node(self, n: fx.Node) -> Any:
        with n.meta.get("context", contextlib.nullcontext)():
            return super().run_node(n)


def check_faithful(
    graph: CapturedGraph,
    model: nn.Module,
    inputs: Any,
    training: bool | None = False,
    grad_mode: GradMode = torch.enable_grad,
    is_made_up: bool = True,
) -> None:
    """Compare the outputs of a graph with those of the model, where no random numbers are drawn.

    Args:
        graph: the graph of a call.
        model: the model.
        inputs: of the call.
        training: was it in train mode? None for the modes that the modules are in.
        grad_mode: makes the context that says whether the call records what a backward pass needs.
        is_made_up: are these no inputs of the user's? The model need not take them.

    Raises:
        CaptureError: they are others, or the model's forward raises on inputs of the user's.
    """
    nodes = list(graph.module.graph.nodes)
    if any(map(is_random, nodes)):
        return
    owners = dict(model.named_parameters())
    held = {
        **graph.tensors,
        **graph.state,
        **{place: owners[name] for place, name in graph.parameters.items() if name in owners},
    }
    leaves = [leaf for leaf in pytree.tree_leaves(copies(inputs)) if not isinstance(leaf, nn.Module)]
    places = [node.name for node in nodes if node.op == "placeholder"]
    if len(leaves) < sum(name not in held for name in places):
        return  # a module among the arguments brought parameters of its own
    given = iter(leaves)
    values = [held[name].detach().clone() if name in graph.state else held.get(name) for name in places]
    values = [next(given) if name not in held else value for name, value in zip(places, values, strict=True)]
    try:
        with mode(model, training), torch.no_grad():  # a model may merge weights in this mode
            found = pytree.tree_leaves(_Values(graph.module).run(*values, enable_io_processing=False))
    except Exception:  # what cannot be run outside of the exporter (a vmap) tells nothing
        found = []
    try:
        with _without_fast_paths():
            expected = run(model, inputs, training, grad_mode=grad_mode)  # afterwards: it may write to parameters
    except CaptureError:
        if is_made_up:
            return
        raise
    if not found or any(isinstance(leaf, FakeTensor) for leaf in found):
        return
    tensors = [leaf for leaf in found[-graph.structure.num_leaves :] if isinstance(leaf, Tensor)]
    if len(tensors) == len(expected) and not any(_differ(*pair) for pair in zip(tensors, expected, strict=True)):
        return
    with _without_fast_paths():
        again = run(model, inputs, training, grad_mode=grad_mode)
    if any(_differ(*pair) for pair in zip(expected, again, strict=True)):
        return  # a model that draws its weights, say: no call tells of another
    raise CaptureError(
        f"the exporter's graph of {graph.call or 'a call'} in {mode_text(training)} computes something else than the "
        "model: the forward seems to look whether it is being "
        "traced (torch.compiler.is_compiling(), the type of a tensor, a failure that it catches), or reads what each "
        "call changes outside of tensors"
    )


@contextlib.contextmanager
def _without_fast_paths() -> Iterator[None]:
    """PyTorch's own encoders have another way for calls without gradients, which makes zeros of what is padded."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _differ(one: Tensor, other: Tensor) -> bool:
    one, other = (tensor if tensor.layout is torch.strided else tensor.to_dense() for tensor in (one, other))
    if one.shape != other.shape:
        return True
    tolerance = _TOLERANCES.get(other.dtype)
    if tolerance is None or not other.numel():
        return False
    size = torch.where(other.isfinite(), other.abs(), 0.0).max()
    same = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= tolerance * size)
    return not bool(same.all())
