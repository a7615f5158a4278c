"""Does a model compute each example of a batch by itself?"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dagpath.capture.containers import opened
from dagpath.capture.graph import CapturedGraph
from dagpath.errors import UnsupportedOpError
from dagpath.passes.real import widened
from dagpath.runtime.state import mode, without_autocast

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative differences up to here are those of other orders of summation; types with fewer digits have more."""
_COARSE = 2e-2


def require_independent(
    model: nn.Module,
    graph: CapturedGraph,
    given: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Raise UnsupportedOpError if a model computes something else of its examples together than of each alone.

    The model is run both ways, in float64 where it can be. One that takes no such batch has no output that differs.

    Args:
        model: the model.
        graph: its eval graph, of one example.
        given: placeholder name -> value of parameters and buffers, in float64.
        args, kwargs: a batch of inputs.
    """
    names = {**graph.parameters, **graph.buffers}
    state = {names[place]: value for place, value in given.items() if place in names}
    for values, convert in ((state, widened), ({}, lambda leaf: leaf)):  # as it is, where it takes no other type
        inputs = pytree.tree_map(convert, (args, dict(kwargs)))
        size = max(len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim)
        try:
            together = _Calls(model, values, inputs)
            alone = [_Calls(model, values, _example(inputs, index)) for index in range(size)]
        except Exception:  # a user's model may raise anything on a batch that it does not take
            continue
        _compare(together, alone)
        return


def _example(inputs: Any, index: int) -> Any:
    def one(leaf: Any) -> Any:
        return leaf[index : index + 1] if isinstance(leaf, Tensor) and leaf.ndim else leaf

    return pytree.tree_map(one, inputs)


class _Calls(TorchFunctionMode):
    """Runs a model and remembers what its calls return, and where they stand.

    Attributes:
        outputs: the tensors that the model returns.
        calls: the name of each call, its line and the tensors that it returns.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], inputs: tuple[Any, dict[str, Any]]) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, list[Tensor]]] = []
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
        with mode(model, training=False), without_autocast(), torch.no_grad(), self:
            returned = opened(torch.func.functional_call(model, dict(state), args, kwargs))
        self.outputs = _tensors(returned)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [tensor.clone() for tensor in _tensors(result)]
        if found:
            self.calls.append((getattr(func, "__name__", str(func)), _user_line(), found))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _user_line() -> str:
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith((*_LIBRARIES, "<"))]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})" if frames else ""


def _compare(together: _Calls, alone: list[_Calls]) -> None:
    outputs = zip(together.outputs, *(calls.outputs for calls in alone), strict=True)
    if all(_are_alike(whole, parts) for whole, *parts in outputs):
        return
    raise UnsupportedOpError(
        f"the examples of a batch mix{_where(together, alone)}: of {len(alone)} examples together the model computes "
        "something else than of each alone, so that no path belongs to one example; give one example at a time"
    )


def _are_alike(whole: Tensor, parts: list[Tensor]) -> bool:
    joined = torch.cat(parts) if whole.ndim else parts[0]
    if joined.shape != whole.shape:
        return False
    if not whole.dtype.is_floating_point or not whole.numel():
        return torch.equal(joined, whole)
    known = whole.isfinite()
    top = float(whole[known].abs().amax()) if bool(known.any()) else 0.0
    tolerance = _ROUNDING.get(whole.dtype, _COARSE)
    return torch.allclose(joined, whole, rtol=tolerance, atol=tolerance * top, equal_nan=True)


def _where(together: _Calls, alone: list[_Calls]) -> str:
    """The first call that returns something else for each example of the batch than for the example alone."""
    size = len(alone)
    for (name, line, wholes), *others in zip(together.calls, *(calls.calls for calls in alone), strict=False):
        for whole, *parts in zip(wholes, *(found for _, _, found in others), strict=False):
            is_batch = whole.ndim > 0 and len(whole) == size and all(part.ndim and len(part) == 1 for part in parts)
            if is_batch and not _are_alike(whole, parts):
                return f" in {name}{line and f' at {line}'}"
    return ""
