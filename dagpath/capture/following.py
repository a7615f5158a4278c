"""PyTorch's exporter, made to follow what models do that it stumbles over, and to see what a call leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import _trace
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dagpath.capture.containers import opened
from dagpath.runtime.reach import Reach


@dataclass
class Left:
    """What one call leaves behind for the next.

    Attributes:
        tensors: those that were made in the call and can be reached after it, by where they are.
        gone: those that could be reached before the call and cannot be after it.
        replaced: the names of the buffers that the call replaced.
        changes: where something holds another object than before, a few places.
        structure: how the model arranges its outputs.
        memory: addresses of numbers outside of tensors that the call changed.
        drawn: did it draw random numbers in Python, from generators of its own?
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    gone: list[Tensor] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    structure: Any = None
    memory: list[range] = field(default_factory=list)
    drawn: bool = False


@contextlib.contextmanager
def exported_with_what_is_left(model: nn.Module) -> Iterator[Left]:
    """Have the model return a list of its outputs and, after them, of the tensors that it leaves behind."""
    left = Left()
    before: list[Reach] = []
    buffers: dict[str, Tensor] = {}
    given: dict[int, set[str]] = {}
    attributes = {name: dict(vars(tensor)) for name, tensor in _named_tensors(model)}

    def start(_module: nn.Module, args: Any, kwargs: Any) -> None:
        for name, tensor in _named_tensors(model):  # what stands for a tensor has none of its attributes
            vars(tensor).update({key: value for key, value in attributes[name].items() if key not in vars(tensor)})
        before[:] = [Reach(model, args, kwargs)]
        given.update({id(leaf): set(vars(leaf)) for leaf in _tensors((args, kwargs))})
        buffers.update(model.named_buffers(remove_duplicate=False))

    def end(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        after = Reach(model, args, kwargs)
        left.changes, left.drawn = before[0].changes(), before[0].is_drawn()
        left.memory = before[0].changed_memory()
        now = dict(model.named_buffers(remove_duplicate=False))
        left.replaced = [name for name, buffer in buffers.items() if now.get(name) is not buffer]
        own = {id(buffer) for buffer in buffers.values()}  # while the exporter runs, these are without values
        left.tensors = after.left_since(before[0])
        left.gone = [tensor for tensor in after.gone_since(before[0]) if id(tensor) not in own]
        leaves, left.structure = pytree.tree_flatten(opened(output))
        for tensor in _tensors([args, kwargs, leaves]):
            plain = given.get(id(tensor), _PLAIN_ATTRIBUTES)
            written = {name: value for name, value in vars(tensor).items() if name not in plain}
            left.tensors |= {
                f"{name} of a tensor": value for name, value in written.items() if isinstance(value, Tensor)
            }
            left.changes += [f"the attribute {name} of a tensor" for name in written]
        return [*leaves, *left.tensors.values()]

    with (
        model.register_forward_pre_hook(start, prepend=True, with_kwargs=True),
        model.register_forward_hook(end, with_kwargs=True),
    ):
        yield left


_PLAIN_ATTRIBUTES = set(vars(FakeTensorMode().from_tensor(torch.zeros((), device="cpu"))))
"""What every tensor that the exporter makes has among its attributes."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Let the exporter follow ``tensor.data``, conversions that change nothing, calls of modules that fail and are
    caught, and buffers that are replaced (it would write to the old ones, whatever the shape of the new ones).
    """
    apply: Any = nn.Module._apply
    call_module = fx.Tracer.call_module

    def applied(module: nn.Module, function: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            if all(function(tensor) is tensor for tensor in (*module.parameters(), *module.buffers())):
                return module
        return apply(module, function, *args, **kwargs)

    def called(tracer: fx.Tracer, *args: Any, **kwargs: Any) -> Any:
        depth = len(tracer.module_stack)
        try:
            return call_module(tracer, *args, **kwargs)
        except BaseException:
            while len(tracer.module_stack) > depth:
                tracer.module_stack.popitem(last=True)
            raise

    def nothing(*_: Any) -> Any:
        return SimpleNamespace(remove=lambda: None)

    with (
        mock.patch.object(nn.Module, "_apply", applied),
        mock.patch.object(fx.Tracer, "call_module", called),
        mock.patch.object(_trace, "register_buffer_assignment_hook", nothing),
        _Data(),
    ):
        yield


class _Data(TorchFunctionMode):
    """Reads ``tensor.data`` as ``tensor.detach()``, and writes to it as ``copy_`` does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__") and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
            if name == "__get__":
                return args[0].detach()
            tensor, value = args
            if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
                raise RuntimeError(
                    f"a tensor's .data of shape {tuple(tensor.shape)} and {tensor.dtype} is replaced by one of shape "
                    f"{tuple(value.shape)} and {value.dtype}"
                )
            with torch.no_grad():
                tensor.detach().copy_(value)
            return None
        return func(*args, **(kwargs or {}))
