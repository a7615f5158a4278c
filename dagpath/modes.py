"""Does train mode do anything to a model that eval mode does not?

Capturing a graph takes most of the time of a trace, and the train graph of most models is the eval graph with the
train flag of its batch norms and dropouts set. Two dry runs on the meta device (shapes without values) tell: they
record every call of a PyTorch function with what its arguments were made from. Where the records agree, the train graph
puts the same constraints on the scales of neurons as the eval graph, and need not be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dagpath.state import mode

_MODE_DEPENDENT: dict[Callable[..., Any], int] = {
    F.batch_norm: 5,
    F.dropout: 1,
    F.dropout1d: 1,
    F.dropout2d: 1,
    F.dropout3d: 1,
}
"""Functions with a train flag that changes no constraint, and how many of their first arguments matter.

Their results have the shape of their first argument; the dry run goes no further into them.
"""


def modes_agree(model: nn.Module, inputs: Any) -> bool:
    """Do both modes make the same calls on activations and parameters? False where a dry run is not possible."""
    try:
        return _record(model, inputs, training=False) == _record(model, inputs, training=True)
    except Exception:  # anything that does not run without values: the caller captures both graphs
        return False


def _record(model: nn.Module, inputs: Any, training: bool) -> list[Any]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in named.items()}
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
    parameters = {id(state[name]): name for name, _ in model.named_parameters()}
    recorder = _Recorder(parameters, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    with mode(model, training), torch.no_grad(), recorder:
        outputs = torch.func.functional_call(model, state, args, kwargs)
    return [*recorder.calls, recorder.describe(outputs)]


class _Recorder(TorchFunctionMode):
    """Records calls; a tensor is described by the parameter, the input or the call that it is."""

    def __init__(self, parameters: Mapping[int, str], inputs: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._kept: list[Any] = []
        self._known: dict[int, object] = dict(parameters)
        self._known.update({id(tensor): ("input", position) for position, tensor in enumerate(inputs)})

    def describe(self, value: Any) -> Any:
        """The value itself, with tensors replaced by where they come from."""
        leaves, structure = pytree.tree_flatten(value)
        return [self._leaf(leaf) for leaf in leaves], structure

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._known.get(id(leaf), "constant"), tuple(leaf.shape)
        return leaf if isinstance(leaf, (int, float, str, bool, type(None), torch.dtype)) else str(type(leaf))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shortcut = func in _MODE_DEPENDENT and bool(args)
        if not any(id(tensor) in self._known for tensor in tensors):
            return func(*args, **kwargs)
        if shortcut:
            described = self.describe((args[: _MODE_DEPENDENT[func]], kwargs.get("weight"), kwargs.get("bias")))
        else:
            described = self.describe((args, kwargs))
        self.calls.append((getattr(func, "__qualname__", str(func)), described))
        result = torch.empty_like(args[0]) if shortcut else func(*args, **kwargs)
        for position, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._kept.append(leaf)  # an id is only known while its tensor lives
                self._known[id(leaf)] = (len(self.calls), position)
        return result
