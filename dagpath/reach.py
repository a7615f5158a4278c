"""The objects that a model's code can reach: remembered before a call, compared and put back after it.

A call may keep things anywhere: in attributes, in lists and dictionaries inside of those, in the closures of hooks, in
class attributes, in globals of the user's modules, in caches of ``functools``. Tensors that a trace makes have no
values, so none of them may stay there; and what one call leaves behind, the next one reads.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import random
import sys
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Contents = dict[Any, Any]
Place = tuple[Any, ...]
"""Where something is: the place of what holds it, a text with two gaps for that and for the key, and the key."""
Found = Iterator[tuple[Place, Any]]
"""Places and what is there."""

_LIBRARIES = {"torch", "torchgen", "numpy", "scipy", "sympy", "networkx", "matplotlib", "tqdm", "dagpath"}
"""Their functions, classes and objects keep nothing of a user's model; nor do those of the standard library, but for
the containers in these modules:"""
_CONTAINERS = {"builtins", "collections", "types", "weakref", "_weakrefset", "_thread", "queue"}
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, types.ModuleType)
_MOST_ENTRIES = 10_000
"""What is inside of longer containers is not looked at (a data set, say); their contents are put back all the same."""
_MOST_BYTES = 1 << 26
"""Larger arrays are not put back."""
_Cache = type(functools.lru_cache(maxsize=0)(lambda: None))


@dataclass(frozen=True)
class _Kept:
    """Something that a call can change: where it is, how its contents are read and put back, and what they were.

    The form is a text with gaps for the place of it and for that of one of its contents.
    """

    place: Place
    read: Callable[[], Contents]
    write: Callable[[Contents], None]
    form: str
    contents: Contents

    def is_same(self) -> bool:
        return self.difference(lambda value, saved: value is saved) is None

    def difference(self, same: Callable[[Any, Any], bool]) -> Place | None:
        """The first place where something else is now."""
        now = self.read()
        for (key, value), (other, saved) in zip(now.items(), self.contents.items(), strict=False):
            is_key = key == other if type(key) is int else key is other
            if not (is_key and (same(value, saved) or (isinstance(value, _State) and value == saved))):
                return self.place, self.form, key
        if len(now) != len(self.contents):
            longer = max(now, self.contents, key=len)
            return self.place, self.form, list(longer)[min(len(now), len(self.contents))]
        return None


def _is_alike(value: Any, saved: Any) -> bool:
    """Is it the same for a call that reads it? Lists of the same objects are."""
    if isinstance(value, (list, tuple)) and type(value) is type(saved):
        return len(value) == len(saved) and all(map(_is_alike, value, saved))
    return value is saved


class _State(str):
    """A state that is equal where it is written alike."""


_SECOND_LISTS = ("_flat_weights", "_flat_weight_refs")
"""Where recurrent layers of PyTorch keep their parameters once more."""

_Iterators = (types.GeneratorType, itertools.count, *map(type, (iter([0]), iter((0,)), iter({0: 0}), iter(range(1)))))


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
    """

    def __init__(self, model: nn.Module, *inputs: Any) -> None:
        self.tensors: dict[int, tuple[Place, Tensor]] = {}
        self._kept: list[_Kept] = []
        self._generators: list[_Kept] = []
        seen: dict[int, Any] = {}
        waiting: deque[tuple[Place, Any]] = deque([((), model), (("the inputs",), inputs), *_global_hooks()])
        while waiting:
            path, value = waiting.popleft()
            if isinstance(value, _PLAIN) or id(value) in seen:
                continue
            seen[id(value)] = value  # an id is only known while its object lives
            if isinstance(value, Tensor):
                self.tensors[id(value)] = path, value
                waiting.extend(self._of_tensor(path, value))
            else:
                waiting.extend(self._parts(path, value))

    def restore(self) -> None:
        """Put back everything that holds another object than it did. What did not change is left alone: other threads
        may read it.
        """
        for kept in self._kept:
            if not kept.is_same():
                kept.write(kept.contents)

    def changes(self) -> list[str]:
        """Where something holds another object than it did, a few places."""
        return sorted(
            {
                _text(place)
                for kept in self._kept
                if (place := kept.difference(_is_alike)) and place[-1] not in _SECOND_LISTS
            }
        )[:3]

    def is_drawn(self) -> bool:
        """Did Python's or NumPy's generators of random numbers move?"""
        return any(not kept.is_same() for kept in self._generators)

    def left_since(self, before: Reach) -> dict[str, Tensor]:
        """The tensors that can be reached now and could not be then, by where they are."""
        return {_text(path): tensor for key, (path, tensor) in self.tensors.items() if key not in before.tensors}

    def gone_since(self, before: Reach) -> list[Tensor]:
        """The tensors that could be reached then and cannot be now."""
        return [tensor for key, (_, tensor) in before.tensors.items() if key not in self.tensors]

    def _keep(self, path: Place, read: Callable[[], Contents], write: Callable[[Contents], None], form: str) -> Found:
        contents = read()
        self._kept.append(_Kept(path, read, write, form, contents))
        if len(contents) > _MOST_ENTRIES:
            return iter(())
        return (((path, form, key), part) for key, part in contents.items())

    def _parts(self, path: Place, value: Any) -> Iterable[tuple[Place, Any]]:
        """What an object holds; what a call can change there is kept."""
        if isinstance(value, dict):
            return self._keep(path, lambda: dict(value), functools.partial(_refill, value), "{}[{!r}]")
        if isinstance(value, (list, set, deque)):
            return self._keep(path, lambda: dict(enumerate(value)), functools.partial(_refill, value), "{}[{}]")
        if isinstance(value, (tuple, frozenset)):
            return [((path, "{}[{}]", index), part) for index, part in enumerate(value)]
        if isinstance(value, types.FunctionType):
            return [] if _root(value.__module__) == "dagpath" else self._of_function(value)  # hooks of a trace
        if isinstance(value, types.MethodType):
            return [(path, value.__self__), (path, value.__func__)]
        if isinstance(value, types.BuiltinMethodType):
            return [(path, value.__self__)]
        if isinstance(value, functools.partial):
            return [(path, value.func), (path, value.args), (path, value.keywords)]
        if isinstance(value, (staticmethod, classmethod)):
            return [(path, value.__func__)]
        if isinstance(value, property):
            return [(path, value.fget), (path, value.fset)]
        if isinstance(value, _Cache):  # a full one says by its misses that it changed
            misses = functools.partial(_misses, value)
            return [
                *self._keep(path, misses, lambda _: value.cache_clear(), "{}"),
                (path, value.__wrapped__),
                (path, vars(value)),
            ]
        if isinstance(
            value, (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState, ContextVar)
        ):
            found = self._keep(path, *_stateful(value), "{}")
            self._generators += self._kept[-1:] if not isinstance(value, (torch.Generator, ContextVar)) else []
            return found
        if isinstance(value, _Iterators):  # which cannot be put back: that a call moves them is said
            return self._keep(path, lambda: {0: _State(_position(value))}, lambda _: None, "{}")
        if isinstance(value, numpy.ndarray):
            return self._of_array(path, value)
        if isinstance(value, (bytearray, array)):
            return self._of_bytes(path, value)
        if isinstance(value, type):
            return self._of_class(value) if is_users(value.__module__) else []
        return self._of_object(path, value)

    def _of_attributes(self, path: Place, attributes: dict[str, Any]) -> Found:
        return self._keep(path, lambda: dict(attributes), functools.partial(_refill, attributes), "{}.{}")

    def _of_tensor(self, path: Place, tensor: Tensor) -> Found:
        """Attributes, the gradient and hooks; those of a tensor without values are PyTorch's own."""
        if isinstance(tensor, FakeTensor):
            return
        if isinstance(tensor, nn.Parameter) or vars(tensor):
            yield from self._of_attributes(path, vars(tensor))
        if tensor.is_leaf:
            yield from self._keep(
                path, lambda: {0: tensor.grad}, lambda contents: setattr(tensor, "grad", contents[0]), "{}.grad"
            )
        if tensor.requires_grad:
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                read, write = functools.partial(_hooks, tensor, name), functools.partial(_set_hooks, tensor, name)
                yield from self._keep(path, read, write, "{}." + name)

    def _of_object(self, path: Place, value: Any) -> Found:
        kind = type(value)
        if not (isinstance(value, nn.Module) or is_users(kind.__module__) or kind.__module__ in _CONTAINERS):
            yield from self._of_librarys_object(path, value)
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from self._of_attributes(path, attributes)
            write = functools.partial(_call, functools.partial(object.__setattr__, value, "__class__"))
            yield from self._keep(path, lambda: {0: type(value)}, lambda contents: write(contents[0]), "{}.__class__")
        slots = _slots_of(kind) if is_users(kind.__module__) else []
        if slots:
            yield from self._keep(
                path, lambda: _slots(value, slots), functools.partial(_fill_slots, value, slots), "{}.{}"
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
            write = functools.partial(_fill_cell, cell)
            yield from self._keep((f"{variable} of {name}",), functools.partial(_cell, cell), write, "{}")
        if is_users(function.__module__):
            for part in (function.__defaults__, function.__kwdefaults__, function.__dict__):
                yield (f"the defaults of {name}",), part
            named = _names(function.__code__)
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
        if len(values) > _MOST_BYTES:
            return iter(())
        saved = values[:]

        def write(_: Contents) -> None:
            values[:] = saved

        return self._keep(path, lambda: {0: _State(hashlib.sha1(bytes(values)).hexdigest())}, write, "{}")

    def _of_array(self, path: Place, array: Any) -> Found:
        if array.nbytes > _MOST_BYTES:
            return iter(())
        if array.dtype == object:
            flat = array.reshape(-1)

            def refill(contents: Contents) -> None:
                flat[:] = list(contents.values())

            return self._keep(path, lambda: dict(enumerate(flat.tolist())), refill, "{}[{}]")
        saved = array.copy()

        def read() -> Contents:
            return {0: _State(hashlib.sha1(array.tobytes()).hexdigest())}

        return self._keep(path, read, lambda _: numpy.copyto(array, saved), "{}")


def _position(iterator: Any) -> str:
    """How far an iterator came, in a text."""
    if isinstance(iterator, types.GeneratorType):
        return (
            f"{iterator.gi_frame and iterator.gi_frame.f_lasti} {iterator.gi_frame and id(iterator.gi_frame.f_locals)}"
        )
    return f"{operator.length_hint(iterator)} {iterator!r}"


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


def _hooks(tensor: Tensor, name: str) -> Contents:
    return dict(getattr(tensor, name, None) or {})


def _set_hooks(tensor: Tensor, name: str, contents: Contents) -> None:
    hooks = getattr(tensor, name)
    hooks.clear()
    hooks.update(contents)


def is_users(module: str | None) -> bool:
    """Does a module of this name hold a user's code, or that of a library of models?"""
    root = _root(module)
    is_compiled = root.startswith("_cython_")
    return root == "__main__" or not (root in _LIBRARIES or root in sys.stdlib_module_names or is_compiled)


def _text(place: Place) -> str:
    """A place in words: ``self.blocks[0].cache['key']``."""
    if len(place) < 2:
        return str(place[0]) if place else "self"
    holder, form, key = place
    text: str = form.format(_text(holder), key if isinstance(key, _PLAIN) else "...")
    return text.replace("._modules['", ".").replace("']._", "._")


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _names(code: types.CodeType) -> list[str]:
    """The globals and attributes that a function's code names, that of functions inside of it too."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _refill(container: Any, contents: Contents) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(contents)
    else:
        (container.update if isinstance(container, set) else container.extend)(contents.values())


def _slots_of(kind: type) -> list[Any]:
    """Those that classes written in Python declare; members of others may only be read."""
    bases = [base for base in kind.__mro__ if "__slots__" in vars(base)]
    return [slot for base in bases for slot in vars(base).values() if type(slot) is types.MemberDescriptorType]


def _slots(value: Any, slots: Iterable[Any]) -> Contents:
    contents = {}
    for slot in slots:
        try:
            contents[slot.__name__] = slot.__get__(value)
        except AttributeError:  # empty
            continue
    return contents


def _fill_slots(value: Any, slots: Iterable[Any], contents: Contents) -> None:
    now = _slots(value, slots)
    for slot in slots:
        if slot.__name__ in contents and now.get(slot.__name__, slot) is contents[slot.__name__]:
            continue
        if slot.__name__ in contents:
            slot.__set__(value, contents[slot.__name__])
        elif slot.__name__ in _slots(value, [slot]):
            slot.__delete__(value)


def _cell(cell: types.CellType) -> Contents:
    try:
        return {0: cell.cell_contents}
    except ValueError:  # empty
        return {}


def _fill_cell(cell: types.CellType, contents: Contents) -> None:
    if contents:
        cell.cell_contents = contents[0]
    else:
        del cell.cell_contents


def _misses(cache: Any) -> Contents:
    return {0: _State(cache.cache_info().misses)}


def _stateful(value: Any) -> tuple[Callable[[], Contents], Callable[[Contents], None]]:
    """How the state of a generator of random numbers, or of a context variable, is read and put back."""
    read: Callable[[], Any]
    write: Callable[[Any], object]
    if isinstance(value, ContextVar):
        read, write, is_state = functools.partial(_get, value), value.set, False
    elif isinstance(value, torch.Generator):
        read, write, is_state = value.get_state, value.set_state, True
    elif isinstance(value, random.Random):
        read, write, is_state = value.getstate, value.setstate, True
    elif isinstance(value, numpy.random.RandomState):
        read, write, is_state = value.get_state, value.set_state, True
    else:
        bits = value.bit_generator
        read, write, is_state = lambda: bits.state, functools.partial(setattr, bits, "state"), True
    held = read()

    def contents() -> Contents:
        now = read()
        return {0: _State(now.tolist() if isinstance(now, Tensor) else now) if is_state else now}

    return contents, lambda _: _call(write, held)


def _get(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return None


def _call(function: Callable[[Any], object], value: object) -> None:
    function(value)
