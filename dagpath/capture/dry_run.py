"""A call of a model without values: which functions of PyTorch it calls, on what, with which shapes.

Every tensor that the model's code hands to a function of PyTorch is replaced by a twin on the meta device, so that a
dry run takes a fraction of a forward pass and changes no tensor. Its record tells which calls of a model are provably
alike (:mod:`dagpath.capture.alike`): the graph of one of them is then a graph of the others. What a dry run cannot see
through (values, random decisions, arguments of unknown types) makes it fail.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dagpath.capture.containers import opened
from dagpath.runtime.distributed import stand_in
from dagpath.runtime.kept import place_text
from dagpath.runtime.reach import Reach
from dagpath.runtime.state import GradMode, Setting, mode, random_states, switch, without_autocast, without_value_checks

MODE_DEPENDENT: dict[Callable[..., Any], int] = {
    F.batch_norm: 5,
    F.dropout: 1,
    F.dropout1d: 1,
    F.dropout2d: 1,
    F.dropout3d: 1,
}
"""Functions with a train flag that changes no constraint, and how many of their first arguments matter.

Their results have the shape of their first argument; the dry run goes no further into them.
"""

_PLAIN = (
    *(int, float, complex, str, bool, type(None), slice, type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_GETTERS = ("shape", "ndim", "dtype", "requires_grad", "is_leaf", "layout", "is_sparse", "is_nested", "is_meta")
_ON_META = {"is_cpu": "cpu", "is_cuda": "cuda", "is_mps": "mps", "is_xpu": "xpu"}
"""Attributes that would tell the code of a model that it is run on the meta device, and the type of device they ask
for."""


_NO_VALUES = re.compile(r"\bmeta tensors?\b|'Meta' backend|\bmeta device\b|aten::_local_scalar_dense")
"""How PyTorch says that a tensor has no values."""


class UnclearError(Exception):
    """The dry run met something that it cannot see through.

    Args:
        message: what it is.
        changes: what the call leaves behind there.
    """

    def __init__(self, message: str, *changes: str) -> None:
        super().__init__(message)
        self.changes = changes


@dataclass(frozen=True)
class Place:
    """A tensor among the arguments of a call.

    Attributes:
        origin: the parameter, buffer, input, call or object that it is, or the number of what a call before left.
        shape: its shape.
        storage: which memory it is a view of, by a number.
        memory: the bytes of that memory.
        whole: is it all of that memory?
    """

    origin: object
    shape: tuple[int, ...]
    storage: int
    memory: int
    whole: bool

    def where(self) -> tuple[object, ...]:
        """All of it that does not depend on sizes."""
        return self.origin, self.storage, len(self.shape)


@dataclass(frozen=True)
class Called:
    """A call of a function.

    Attributes:
        name: the name of the function.
        leaves: its arguments as a flat list, with a :class:`Place` for each tensor.
        structure: how they are arranged.
        results: the shapes that it returns.
        written: the tensors that it writes to.
    """

    name: str
    leaves: list[Any]
    structure: Any
    results: tuple[tuple[int, ...], ...] = ()
    written: tuple[Place, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Called) and self._facts() == other._facts()

    __hash__ = None  # type: ignore[assignment]

    def _facts(self) -> tuple[Any, ...]:
        return self.name, self.structure, [(type(leaf), leaf) for leaf in self.leaves], self.results, self.written


@dataclass(frozen=True)
class Record:
    """What a dry run saw, up to its end or to something that it cannot see through.

    Attributes:
        calls: the calls, and a last one named ``"output"`` of what the model returns.
        kept: the tensors whose identities stand in the calls, kept alive.
        changes: where the call left something behind, a few places.
        asks_for_gradients: did the forward ask whether gradients are recorded?
        is_clear: did the dry run come to its end? Else nothing is known of the call, nor whether the model takes it.
    """

    calls: list[Called]
    kept: list[Any]
    changes: tuple[str, ...] = ()
    asks_for_gradients: bool = False
    is_clear: bool = True

    def is_empty(self) -> bool:
        """Has a result no entries?"""
        return any(0 in shape for call in self.calls for shape in call.results)


def is_clear(record: Record | None) -> bool:
    """Did the model take the call, and did the dry run come to its end?"""
    return record is not None and record.is_clear


class DryRuns:
    """Makes dry runs of a model that is ready for them."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._ready = model, Reach(model)

    def __call__(self, inputs: Any, most_calls: int | None = None) -> Record | None:
        """The record of a call, given positional and keyword arguments; None where the model does not take them.

        The model is left as it was.

        Args:
            inputs: its arguments.
            most_calls: a dry run that makes more calls of functions is given up, and is not clear.
        """
        return self._in_a_row([(inputs, contextlib.nullcontext())], most_calls)[0]

    def in_a_row(self, calls: Sequence[tuple[Any, Setting]]) -> list[Record | None]:
        """The records of calls one after the other, each of which finds what those before it left behind.

        The model is left as it was. After a dry run that fails or is not clear, there are no more of them.

        Args:
            calls: the inputs of each call, and how it is made.
        """
        return self._in_a_row([(inputs, _set(self._model, setting)) for inputs, setting in calls])

    def _in_a_row(
        self, calls: Sequence[tuple[Any, contextlib.AbstractContextManager[None]]], most_calls: int | None = None
    ) -> list[Record | None]:
        records: list[Record | None] = []
        try:
            for inputs, context in calls:
                goes_on = not records or is_clear(records[-1])
                with context:
                    records.append(self._one(inputs, most_calls) if goes_on else None)
        finally:
            self._ready.restore()
        return records

    def _one(self, inputs: Any, most_calls: int | None) -> Record | None:
        try:
            return _record(self._model, inputs, self._ready, most_calls)
        except UnclearError as error:
            return Record([], [], error.changes, is_clear=False)
        except NotImplementedError:
            return Record([], [], is_clear=False)
        except Exception as error:  # a model refuses inputs in many ways
            return Record([], [], is_clear=False) if _NO_VALUES.search(str(error)) else None


@contextlib.contextmanager
def _set(model: nn.Module, setting: Setting) -> Iterator[None]:
    switch(model, setting.training)
    with setting.grad_mode():
        yield


@contextlib.contextmanager
def dry_runs(model: nn.Module, training: bool | None, grad_mode: GradMode = torch.enable_grad) -> Iterator[DryRuns]:
    """A model made ready for dry runs.

    Args:
        model: the model.
        training: in train mode? None for the modes that its modules are in.
        grad_mode: makes the context that says whether it records what a backward pass needs.
    """
    interpreted = torch.compiler.set_stance("force_eager")  # modules that are compiled run as they are written
    with mode(model, training), without_autocast(), without_value_checks(), grad_mode(), interpreted:
        stand_in(model)
        yield DryRuns(model)


def _record(model: nn.Module, inputs: Any, ready: Reach, most_calls: int | None) -> Record:
    recorder = _Recorder(model, ready.tensors, most_calls)
    args, kwargs = pytree.tree_map_only(Tensor, recorder.fresh_twin, inputs)
    for position, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(leaf, Tensor):
            recorder.know(leaf, ("input", position))
    before = random_states()
    with recorder, _told(recorder):
        outputs = opened(model(*args, **kwargs))
    if ready.is_drawn() or random_states() != before:
        raise UnclearError("random numbers were drawn in Python")
    recorder.note("output", outputs)
    return Record(recorder.calls, recorder.kept, tuple(ready.changes()), recorder.asks_for_gradients)


@contextlib.contextmanager
def _told(recorder: _Recorder) -> Iterator[None]:
    """The recorder is told when code asks PyTorch whether gradients are recorded."""
    names = ("is_grad_enabled", "is_inference_mode_enabled")
    functions = {name: getattr(torch, name) for name in names}

    def asked(function: Callable[[], bool]) -> bool:
        recorder.asks_for_gradients = True
        return function()

    try:
        for name, function in functions.items():
            setattr(torch, name, functools.partial(asked, function))
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)


class _Recorder(TorchFunctionMode):
    """Records calls. A tensor is described by the parameter, buffer, input, call or object that it is.

    Args:
        model: the model.
        before: the tensors that it could reach before the first call, and where they are, by their ids.
        most_calls: as many calls are recorded.

    Attributes:
        calls: the record.
        kept: all tensors that were met.
        asks_for_gradients: did the code ask whether gradients are recorded?
    """

    def __init__(self, model: nn.Module, before: Mapping[int, tuple[Any, Tensor]], most_calls: int | None) -> None:
        super().__init__()
        self._before, self._most_calls = before, most_calls
        self.asks_for_gradients = False
        self.calls: list[Called] = []
        self.kept: list[Any] = []
        self._twins: dict[int, Tensor] = {}
        self._known: dict[int, object] = {}
        self._own: set[int] = set()
        self._storages: dict[int, int] = {}
        self._buffers: set[int] = set()
        self._device: torch.device | None = None
        for name, tensor in model.named_parameters():
            self.know(self.twin(tensor), name)
        for name, buffer in model.named_buffers():
            self.know(self.twin(buffer), name)
            self._buffers.add(id(self.twin(buffer)))

    def know(self, tensor: Tensor, origin: object) -> None:
        self.kept.append(tensor)  # an id is only known while its tensor lives
        self._known[id(tensor)] = origin
        self._own.add(id(tensor))

    def fresh_twin(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and type without values."""
        self._device = self._device or tensor.device
        if type(tensor) in (Tensor, nn.Parameter):
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        else:
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return twin.requires_grad_(tensor.requires_grad)

    def twin(self, value: Any) -> Any:
        """What stands for an argument: a tensor's twin, the meta device for any device."""
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor) or id(value) in self._own:
            return value
        if id(value) not in self._twins:
            twin = self._twins[id(value)] = self.fresh_twin(value)
            self.kept.append(value)
            is_left = value.is_meta and id(value) not in self._before
            self.know(twin, ("left", len(self._twins)) if is_left else ("object", id(value)))
        return self._twins[id(value)]

    def note(self, name: str, arguments: Any) -> None:
        if self._most_calls is not None and len(self.calls) >= self._most_calls:
            raise UnclearError("more calls than are looked at")
        leaves, structure = pytree.tree_flatten(arguments)
        self.calls.append(Called(name, [self._leaf(leaf) for leaf in leaves], structure))

    def _leaf(self, leaf: Any) -> Any:
        leaf = self.twin(leaf)
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            number = self._storages.setdefault(storage._cdata, len(self._storages))  # all are kept alive
            bytes_ = leaf.numel() * leaf.element_size()
            return Place(self._known[id(leaf)], tuple(leaf.shape), number, storage.nbytes(), storage.nbytes() == bytes_)
        if not isinstance(leaf, _PLAIN):
            raise UnclearError(f"an argument of type {type(leaf).__name__}")
        return (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_operator = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        name = str(func) if is_operator else getattr(func, "__name__", str(func))
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            self.asks_for_gradients |= attribute in ("requires_grad", "is_leaf", "grad_fn")
            if attribute == "requires_grad":
                return self.twin(args[0]).requires_grad
            if attribute in _GETTERS:
                return func(*args, **(kwargs or {}))
            if attribute == "device":
                return self._device
            if attribute in _ON_META:
                return self._device is not None and self._device.type == _ON_META[attribute]
            name = attribute
        if name in ("requires_grad_", "__set__", "__delete__"):
            self._note_attribute(func, args, kwargs or {})
        args, kwargs = pytree.tree_map(self.twin, (args, kwargs or {}))
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if name in ("cpu", "cuda"):
            return args[0]
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = self._written(name, args, kwargs)
        if tensors and all(id(tensor) in self._buffers for tensor in tensors):
            result = self._call(func, args, kwargs)
            if id(result) in self._buffers:  # a counter that train mode increases constrains nothing unless it is read
                self.know(result, ("written", self._known[id(result)]))
                return result
            self.note(name, (args, kwargs))
        elif func in MODE_DEPENDENT and args:
            self.note(name, (args[: MODE_DEPENDENT[func]], kwargs.get("weight"), kwargs.get("bias")))
            result = torch.empty_like(args[0])
        else:
            self.note(name, (args, kwargs))
            places = [self._leaf(tensor) for tensor in written]
            if func is Tensor.__setitem__:  # what is written to is a part of the tensor
                places[0] = self.calls[-1].leaves[0] = replace(
                    places[0], shape=tuple(args[0][args[1]].shape), whole=False
                )
            self.calls[-1] = replace(self.calls[-1], written=tuple(places))
            result = self._call(func, args, kwargs)
        result = pytree.tree_map_only(Tensor, lambda leaf: leaf if leaf.is_meta else self.fresh_twin(leaf), result)
        returned = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for position, leaf in enumerate([*returned, *written]):
            self.know(leaf, (len(self.calls), position))
        self.calls[-1] = replace(self.calls[-1], results=tuple(tuple(leaf.shape) for leaf in returned))
        return result

    def _note_attribute(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Follow a write to an attribute of a tensor. If the model keeps the tensor, the next call reads the attribute.
        Tensors that the call made are dropped.
        """
        tensor, twin = args[0], self.twin(args[0])
        attribute = getattr(getattr(func, "__self__", None), "__name__", "requires_grad")
        if tensor is twin or attribute == "data":
            return
        if attribute == "requires_grad":
            func(*args, **kwargs)
        elif len(args) < 2 or getattr(tensor, attribute) is not args[1]:
            place = place_text(self._before[id(tensor)][0]) if id(tensor) in self._before else "a tensor"
            raise UnclearError(f"{attribute} is written", f"{place}.{attribute}")

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except Exception:  # the model may catch it
            if self.calls:
                self.calls[-1] = replace(self.calls[-1], name=f"{self.calls[-1].name} raises")
            raise

    @staticmethod
    def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a function writes to."""
        given = [*args[:1], kwargs.get("input")] if writes(name) else []
        return [leaf for leaf in pytree.tree_leaves([given, kwargs.get("out")]) if isinstance(leaf, Tensor)]


def writes(name: str) -> bool:
    """Does a function of this name write to its first argument?"""
    return (
        name in ("__setitem__", "__set__")
        or (name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__int__", "__index__"))
        or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    )
