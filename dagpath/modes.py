"""Do two ways of running a model make the same calls?

Capturing a graph takes most of the time of a trace, and the train graph of most models is the eval graph with the
train flag of its batch norms and dropouts set. Two dry runs on the meta device (shapes without values) tell: they
record every call of a PyTorch function, with what its arguments were made from. Where the records agree, the train
graph puts the same constraints on the scales of neurons as the eval graph, and need not be captured. Whatever a dry run
cannot see through (values, unknown tensors, random decisions) counts as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dagpath.containers import opened
from dagpath.distributed import stand_in
from dagpath.state import mode, random_states, without_autocast

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

_TRIANGLES = ("tril", "triu")
_DIAGONALS = ("diag", "diagonal", "trace", "fill_diagonal")
"""Functions that ask which of an entry's places along two dimensions (the last ones of a triangle) is larger."""
_REGROUPS = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "contiguous")
"""Functions that number the entries anew, in their old order."""

_PLAIN = (
    *(int, float, complex, str, bool, type(None), slice, type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


class _UnclearError(Exception):
    """The dry run met something that it cannot see through."""


def modes_agree(model: nn.Module, inputs: Any) -> bool:
    """Do both modes make the same calls on activations and parameters?"""
    try:
        return _record(model, inputs, training=False) == _record(model, inputs, training=True)
    except Exception:  # anything that does not run without values: the caller captures both graphs
        return False


def batches_agree(model: nn.Module, inputs: Any, others: Any) -> bool:
    """Does eval mode make the same calls for two numbers of examples, on tensors that grow with them or not at all?

    A model that takes examples apart does not: ``x[:1]`` and ``x[1:]`` grow otherwise, and what is written into one
    example overwrites a part of several. Nor does one in which the number of an example says which unit is meant: a
    triangle or diagonal of examples and units, or a new order in which examples come after units.
    """
    try:
        records = [_record(model, chosen, training=False) for chosen in (inputs, others)]
    except Exception:
        return False
    sizes = [
        next(t.shape[0] for t in pytree.tree_leaves(i) if isinstance(t, Tensor) and t.ndim) for i in (inputs, others)
    ]
    first, second = records
    return len(first) == len(second) and all(
        _grows(one, other, sizes) for one, other in zip(first, second, strict=True)
    )


def _grows(call: _Call, other: _Call, sizes: Sequence[int]) -> bool:
    """Are two calls the same but for the number of examples in their tensors?"""
    if (call.name, call.structure) != (other.name, other.structure):
        return False
    name = call.name.rpartition(".")[2].rstrip("_")
    for leaf, grown in zip(call.leaves, other.leaves, strict=True):
        if isinstance(leaf, _Place) and isinstance(grown, _Place):
            if leaf.origin != grown.origin or not _shapes_grow(leaf.shape, grown.shape, sizes):
                return False
            if name in _TRIANGLES and leaf.shape[-2:] != grown.shape[-2:]:
                return False
            if name in _DIAGONALS and leaf.shape != grown.shape:
                return False
        elif not _numbers_grow(leaf, grown, sizes):
            return False
    if name == "einsum" and _repeats_a_letter(call.leaves):
        return False
    for shape, grown_shape in zip(call.results, other.results, strict=True):
        if not _shapes_grow(shape, grown_shape, sizes):
            return False
        if name in _REGROUPS and isinstance(call.leaves[0], _Place):
            before = _units_before(call.leaves[0].shape, other.leaves[0].shape)
            if before != _units_before(shape, grown_shape):
                return False
    if not (call.leaves and isinstance(call.leaves[0], _Place) and _writes(call.name)):
        return True
    part, grown = call.leaves[0], other.leaves[0]
    return bool(part.shape != grown.shape or part.memory == grown.memory)


def _shapes_grow(shape: tuple[int, ...], grown: tuple[int, ...], sizes: Sequence[int]) -> bool:
    """Is a shape that of more examples along at most one dimension?"""
    if len(shape) != len(grown):
        return False
    longer = [(a, b) for a, b in zip(shape, grown, strict=True) if a != b]
    return len(longer) <= 1 and all(a * sizes[1] == b * sizes[0] for a, b in longer)


def _numbers_grow(leaf: Any, grown: Any, sizes: Sequence[int]) -> bool:
    """Are arguments that are no tensors the same, or numbers that are in proportion to the examples?"""
    if isinstance(leaf, tuple) and isinstance(grown, tuple):
        return len(leaf) == len(grown) and all(_numbers_grow(a, b, sizes) for a, b in zip(leaf, grown, strict=True))
    proportional = type(leaf) is int and type(grown) is int and leaf * sizes[1] == grown * sizes[0]
    return proportional or (type(leaf) is type(grown) and bool(leaf == grown))


def _repeats_a_letter(arguments: Sequence[Any]) -> bool:
    terms = next((leaf for leaf in arguments if isinstance(leaf, str)), "").partition("->")[0].split(",")
    return any(len(set(term.strip(" ."))) < len(term.strip(" .")) for term in terms)


def _units_before(shape: tuple[int, ...], grown: tuple[int, ...]) -> int:
    """The number of entries over which the examples are repeated: the product of the dimensions before theirs."""
    at = next((dim for dim, (a, b) in enumerate(zip(shape, grown, strict=True)) if a != b), 0)
    return math.prod(shape[:at])


def _writes(name: str) -> bool:
    name = name.rpartition(".")[2]
    return (
        name == "__setitem__"
        or (name.startswith("__i") and name.endswith("__"))
        or (name.endswith("_") and not name.endswith("__"))
    )


@dataclass(frozen=True)
class _Place:
    """A tensor among the arguments of a call: the parameter, buffer, input or call that it is, its shape, and the bytes
    of the memory that it is a view of.
    """

    origin: object
    shape: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class _Call:
    """A call of a function. Its arguments as a flat list, tensors replaced by their places; the shapes it returns."""

    name: str
    leaves: list[Any]
    structure: Any
    results: tuple[tuple[int, ...], ...] = ()


def _record(model: nn.Module, inputs: Any, training: bool) -> list[_Call]:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    state = {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.requires_grad)
        for name, t in {**parameters, **buffers}.items()
    }
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
    recorder = _Recorder({name: state[name] for name in parameters}, {name: state[name] for name in buffers})
    for position, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(leaf, Tensor):
            recorder.know(leaf, ("input", position))
    with mode(model, training), without_autocast(), torch.enable_grad():
        stand_in(model)
        before = random_states()
        with recorder:
            outputs = torch.func.functional_call(model, state, args, kwargs)
        if random_states() != before:
            raise _UnclearError("random numbers were drawn in Python")
    recorder.note("output", opened(outputs))
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Records calls; a tensor is described by the parameter, the buffer, the input or the call that it is."""

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._kept: list[Any] = []
        self._known: dict[int, object] = {}
        self._buffers = {id(buffer) for buffer in buffers.values()}
        for name, tensor in {**parameters, **buffers}.items():
            self.know(tensor, name)

    def know(self, tensor: Tensor, origin: object) -> None:
        self._kept.append(tensor)  # an id is only known while its tensor lives
        self._known[id(tensor)] = origin

    def note(self, name: str, arguments: Any) -> None:
        leaves, structure = pytree.tree_flatten(arguments)
        self.calls.append(_Call(name, [self._leaf(leaf) for leaf in leaves], structure))

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in self._known:
                raise _UnclearError("a tensor of unknown origin")
            return _Place(self._known[id(leaf)], tuple(leaf.shape), leaf.untyped_storage().nbytes())
        if not isinstance(leaf, _PLAIN):
            raise _UnclearError(f"an argument of type {type(leaf).__name__}")
        return (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__qualname__", str(func))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(id(tensor) in self._buffers for tensor in tensors):
            result = func(*args, **kwargs)
            if id(result) in self._buffers:  # a counter that train mode increases constrains nothing
                return result
            self.note(name, (args, kwargs))
        elif func in _MODE_DEPENDENT and args:
            self.note(name, (args[: _MODE_DEPENDENT[func]], kwargs.get("weight"), kwargs.get("bias")))
            result = torch.empty_like(args[0])
        else:
            self.note(name, (args, kwargs))
            if func is Tensor.__setitem__:  # what is written to is a part of the tensor
                part = self.calls[-1].leaves
                part[0] = replace(part[0], shape=tuple(args[0][args[1]].shape))
            result = func(*args, **kwargs)
        returned = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for position, leaf in enumerate(returned):
            if not leaf.is_meta:
                raise _UnclearError("a tensor with values")
            self.know(leaf, (len(self.calls), position))
        self.calls[-1] = replace(self.calls[-1], results=tuple(tuple(leaf.shape) for leaf in returned))
        return result
