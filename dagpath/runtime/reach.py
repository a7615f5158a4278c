"""The objects that a model's code can reach: remembered before a call, compared and put back after it.

A call may keep things anywhere: in attributes, in lists and dictionaries inside of those, in the closures of hooks, in
class attributes, in globals of the user's modules, in caches of ``functools``. Tensors that a trace makes have no
values, so none of them may stay there; and what one call leaves behind, the next one reads.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
import sys
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dagpath.runtime.kept import (
    PLAIN,
    Contents,
    Kept,
    Place,
    State,
    addresses,
    ctypes_kind,
    has_entries,
    held_by,
    is_alike,
    is_builtin_iterator,
    misses_of,
    place_text,
    position_of,
    read_cell,
    read_hooks,
    read_slots,
    read_value,
    refill,
    slots_of,
    stateful,
    stream,
    write_cell,
    write_hooks,
    write_slots,
    write_value,
)

Found = Iterator[tuple[Place, Any]]
"""Places and what is there."""

_LIBRARIES = {"torch", "torchgen", "numpy", "scipy", "sympy", "networkx", "matplotlib", "tqdm", "dagpath"}
"""Their functions, classes and objects keep nothing of a user's model; nor do those of the standard library, but for
the containers in these modules:"""
_CONTAINERS = {"builtins", "collections", "types", "weakref", "_weakrefset", "_thread", "queue"}
_MOST_ENTRIES = 10_000
"""What is inside of longer containers is not looked at (a data set, say); their contents are put back all the same."""
_MOST_BYTES = 1 << 26
"""Larger arrays are not put back."""
_Cache = type(functools.lru_cache(maxsize=0)(lambda: None))


_SECOND_LISTS = ("_flat_weights", "_flat_weight_refs")
"""Where recurrent layers of PyTorch keep their parameters once more."""


class Reach:
    """What the code of a model can reach, as it is now.

    Attributes of modules and of plain objects, containers, closures and defaults of functions (hooks and methods among
    them), class attributes, globals that the code names, generators of random numbers, and caches of ``functools``. The
    values of tensors are not kept.

    Args:
        model: where the search starts.
        inputs: what is given to it, whose containers it may write to.

    Attributes:
        tensors: id -> where it is, and the tensor.
        memories: address ranges of the numbers that it holds outside of tensors.
        names: the names of attributes and globals in the code of the user's functions.
    """

    def __init__(self, model: nn.Module, *inputs: Any) -> None:
        self.tensors: dict[int, tuple[Place, Tensor]] = {}
        self.memories: list[range] = []
        self.names: set[str] = set()
        self._kept: list[Kept] = []
        self._generators: list[Kept] = []
        seen: dict[int, Any] = {}
        waiting: deque[tuple[Place, Any]] = deque([((), model), (("the inputs",), inputs), *_global_hooks()])
        while waiting:
            path, value = waiting.popleft()
            is_users_own = is_users(type(value).__module__)
            if (isinstance(value, PLAIN) and not is_users_own) or id(value) in seen:
                continue
            seen[id(value)] = value  # an id is only known while its object lives
            if isinstance(value, Tensor):
                self.tensors[id(value)] = path, value
                waiting.extend(self._of_tensor(path, value))
            else:
                parts = self._parts(path, value)
                waiting.extend(parts or ())
                if parts is None or (is_users_own and not isinstance(value, type)):  # a user's kind of list, say
                    waiting.extend(self._of_object(path, value))

    def restore(self) -> None:
        """Put back everything that holds another object than it did. What did not change is left alone: other threads
        may read it.
        """
        failures = []
        for kept in self._kept:
            try:
                if not kept.is_same():
                    kept.write(kept.contents)
            except Exception as failure:  # what else there is comes back all the same
                failures.append(failure)
        if failures:
            raise failures[0]

    def changes(self) -> list[str]:
        """Where something holds another object than it did, a few places."""
        return sorted(
            {
                place_text(place)
                for kept in self._kept
                if (place := kept.difference(is_alike)) and place[-1] not in _SECOND_LISTS
            }
        )[:3]

    def is_drawn(self) -> bool:
        """Did Python's or NumPy's generators of random numbers move?"""
        return any(not kept.is_same() for kept in self._generators)

    def changed_memory(self) -> list[range]:
        """The address ranges of arrays whose numbers changed."""
        return [kept.memory for kept in self._kept if kept.memory is not None and not kept.is_same()]

    def left_since(self, before: Reach) -> dict[str, Tensor]:
        """The tensors that can be reached now and could not be then, by where they are."""
        return {place_text(path): tensor for key, (path, tensor) in self.tensors.items() if key not in before.tensors}

    def gone_since(self, before: Reach) -> list[Tensor]:
        """The tensors that could be reached then and cannot be now."""
        return [tensor for key, (_, tensor) in before.tensors.items() if key not in self.tensors]

    def _keep(
        self,
        path: Place,
        read: Callable[[], Contents],
        write: Callable[[Contents], None],
        form: str,
        memory: range | None = None,
    ) -> Found:
        contents = read()
        self._kept.append(Kept(path, read, write, form, contents, memory))
        if len(contents) > _MOST_ENTRIES:
            return iter(())
        return (((path, form, key), part) for key, part in contents.items())

    def _parts(self, path: Place, value: Any) -> Iterable[tuple[Place, Any]] | None:
        """What an object holds beside its attributes; what a call can change there is kept. None for nothing."""
        if isinstance(value, PLAIN):
            return None
        if isinstance(value, dict):
            return self._keep(path, lambda: dict(value), functools.partial(refill, value), "{}[{!r}]")
        if isinstance(value, (list, set, deque)):
            return self._keep(path, lambda: dict(enumerate(value)), functools.partial(refill, value), "{}[{}]")
        if isinstance(value, (tuple, frozenset)):
            return [((path, "{}[{}]", index), part) for index, part in enumerate(value)]
        if isinstance(value, types.FunctionType):
            return [] if _root(value.__module__) == "dagpath" else self._of_function(value)  # hooks of a trace
        if isinstance(value, types.MethodType):
            return [(path, value.__self__), (path, value.__func__)]
        if isinstance(value, types.BuiltinMethodType):
            return [(path, value.__self__)]
        if isinstance(value, functools.partial):
            return [(path, value.func), (path, value.args), (path, value.keywords), (path, vars(value))]
        if isinstance(value, (staticmethod, classmethod)):
            return [(path, value.__func__)]
        if isinstance(value, property):
            return [(path, value.fget), (path, value.fset)]
        if isinstance(value, _Cache):  # a full one says by its misses that it changed
            misses = functools.partial(misses_of, value)
            return [
                *self._keep(path, misses, lambda _: value.cache_clear(), "{}"),
                (path, value.__wrapped__),
                (path, vars(value)),
            ]
        if isinstance(
            value, (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState, ContextVar)
        ):
            found = self._keep(path, *stateful(value), "{}")
            self._generators += self._kept[-1:] if not isinstance(value, (torch.Generator, ContextVar)) else []
            return found
        if isinstance(value, numpy.ndarray):
            return self._of_array(path, value)
        if isinstance(value, (bytearray, array)):
            return self._of_bytes(path, value)
        if isinstance(value, memoryview):
            return self._of_array(path, numpy.asarray(value)) if has_entries(value) else []
        kind = ctypes_kind(value)
        if kind == "number":
            return self._keep(path, functools.partial(read_value, value), functools.partial(write_value, value), "{}")
        if kind == "array":
            return self._of_array(path, numpy.frombuffer(cast(Any, value), numpy.uint8))
        if isinstance(value, (io.StringIO, io.BytesIO)):
            return [] if value.closed else self._keep(path, *stream(value), "{}")
        if is_builtin_iterator(value):  # it cannot be put back, but is named
            inner = [(path, part) for part in held_by(value) if is_users(type(part).__module__)]
            return [*self._keep(path, functools.partial(position_of, value), lambda _: None, "{}"), *inner]
        if isinstance(value, type):
            return self._of_class(value) if is_users(value.__module__) else []
        return None

    def _of_attributes(self, path: Place, attributes: dict[str, Any]) -> Found:
        return self._keep(path, lambda: dict(attributes), functools.partial(refill, attributes), "{}.{}")

    def _of_tensor(self, path: Place, tensor: Tensor) -> Found:
        """Attributes, the gradient and hooks; those of a tensor without values are PyTorch's own."""
        if isinstance(tensor, FakeTensor):
            return
        yield from self._of_attributes(path, vars(tensor))
        if tensor.is_leaf:
            for name in ("grad", "requires_grad"):
                read = functools.partial(_attribute, tensor, name, getattr(tensor, name))
                yield from self._keep(path, read, functools.partial(_set, tensor, name), "{}." + name)
        if tensor.requires_grad:
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                read, write = functools.partial(read_hooks, tensor, name), functools.partial(write_hooks, tensor, name)
                yield from self._keep(path, read, write, "{}." + name)

    def _of_object(self, path: Place, value: Any) -> Found:
        kind = type(value)
        if not (isinstance(value, nn.Module) or is_users(kind.__module__) or kind.__module__ in _CONTAINERS):
            yield from self._of_librarys_object(path, value)
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from self._of_attributes(path, attributes)
            write = functools.partial(object.__setattr__, value, "__class__")
            yield from self._keep(path, lambda: {0: type(value)}, lambda contents: write(contents[0]), "{}.__class__")
        slots = slots_of(kind) if is_users(kind.__module__) else []
        if slots:
            yield from self._keep(
                path, lambda: read_slots(value, slots), functools.partial(write_slots, value, slots), "{}.{}"
            )
        yield from (((base.__name__,), base) for base in kind.__mro__ if is_users(base.__module__))

    def _of_librarys_object(self, path: Place, value: Any) -> Found:
        """What an object of a library holds that a user's object holds (an optimizer, a namespace, a logger): but for
        further objects of libraries, which lead into all of the library.
        """
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not type(value).__module__.startswith("torch.distributed"):
            for place, part in self._of_attributes(path, attributes):
                if isinstance(part, (dict, list, set, deque, tuple, Tensor, nn.Module)) or is_users(
                    type(part).__module__
                ):
                    yield place, part

    def _of_class(self, kind: type) -> Found:
        def read() -> Contents:
            return {name: part for name, part in vars(kind).items() if not _is_special(name)}

        def write(contents: Contents) -> None:
            for name in read().keys() - contents.keys():
                type.__delattr__(kind, name)
            for name, part in contents.items():
                if vars(kind).get(name) is not part:
                    type.__setattr__(kind, name, part)

        yield from self._keep((kind.__name__,), read, write, "{}.{}")
        for name, part in list(vars(kind).items()):
            if _is_special(name) and isinstance(part, types.FunctionType):
                yield (kind.__name__,), part

    def _of_function(self, function: types.FunctionType) -> Found:
        name = function.__name__
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            write = functools.partial(write_cell, cell)
            yield from self._keep((f"{variable} of {name}",), functools.partial(read_cell, cell), write, "{}")
        if is_users(function.__module__):
            for part in (function.__defaults__, function.__kwdefaults__, function.__dict__):
                yield (f"the defaults of {name}",), part
            named = _names(function.__code__)
            self.names.update(named)
            for variables in (function.__globals__, *map(vars, _modules(function, named))):
                yield from self._of_globals(variables, [key for key in named if not _is_special(key)])

    def _of_globals(self, variables: dict[str, Any], names: list[str]) -> Found:
        def read() -> Contents:
            return {name: variables[name] for name in names if name in variables}

        def write(contents: Contents) -> None:
            for name in read().keys() - contents.keys():
                del variables[name]
            variables.update(contents)

        return self._keep((str(variables.get("__name__", "")),), read, write, "{}.{}")

    def _of_bytes(self, path: Place, values: Any) -> Found:
        memory = addresses(numpy.frombuffer(values, numpy.uint8)) if len(values) else range(0)
        self.memories.append(memory)
        if memoryview(values).nbytes > _MOST_BYTES:
            return iter(())
        saved = values[:]

        def write(_: Contents) -> None:
            values[:] = saved

        return self._keep(path, lambda: {0: State(_digest(bytes(values)))}, write, "{}", memory)

    def _of_array(self, path: Place, array: Any) -> Found:
        self.memories.append(addresses(array))
        if not array.flags.writeable:  # a view of something that may be written to
            return self._of_array(path, array.base) if isinstance(array.base, numpy.ndarray) else iter(())
        if array.nbytes > _MOST_BYTES:
            return iter(())
        if array.dtype == object:

            def refill(contents: Contents) -> None:
                array.flat = list(contents.values())

            return self._keep(path, lambda: dict(enumerate(array.flat)), refill, "{}[{}]")
        saved = array.copy()

        def read() -> Contents:
            return {0: State(f"{_digest(array.tobytes())} {array.shape} {array.flags.writeable}")}

        def write(_: Contents) -> None:
            if not array.flags.writeable:
                array.flags.writeable = True
            if array.shape != saved.shape:
                array.resize(saved.shape, refcheck=False)
            numpy.copyto(array, saved)

        return self._keep(path, read, write, "{}", addresses(array))


def _digest(numbers: bytes) -> str:
    return hashlib.sha1(numbers, usedforsecurity=False).hexdigest()


def _attribute(tensor: Tensor, name: str, first: Any) -> Contents:
    """The attribute of a leaf; one that a call computes is no leaf until its value is put back."""
    return {0: getattr(tensor, name) if tensor.is_leaf else first}


def _set(tensor: Tensor, name: str, contents: Contents) -> None:
    setattr(tensor, name, contents[0])


def _global_hooks() -> list[tuple[Place, Any]]:
    """Hooks of all modules there are."""
    names = [name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and name.endswith("_hooks")]
    return [((name,), getattr(torch.nn.modules.module, name)) for name in names]


def _modules(function: types.FunctionType, named: list[str]) -> list[types.ModuleType]:
    """The user's modules that a function's code names: by what it imports, as globals, and inside of those."""
    found = {name: sys.modules[name] for name in named if name in sys.modules and is_users(name)}
    scopes = [function.__globals__, *map(vars, found.values())]
    while scopes:
        scope = scopes.pop()
        for name in named:
            part = scope.get(name)
            if isinstance(part, types.ModuleType) and is_users(part.__name__) and part.__name__ not in found:
                found[part.__name__] = part
                scopes.append(vars(part))
    return list(found.values())


def is_users(module: str | None) -> bool:
    """Does a module of this name hold a user's code, or that of a library of models?"""
    root = _root(module)
    is_compiled = root.startswith("_cython_")
    return root == "__main__" or not (root in _LIBRARIES or root in sys.stdlib_module_names or is_compiled)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _names(code: types.CodeType) -> list[str]:
    """The globals and attributes that a function's code names, that of functions inside of it too."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return list(dict.fromkeys([*code.co_names, *inner]))
