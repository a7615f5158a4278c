"""How the contents of objects are read, compared and put back.

Each object that can change has a function that reads its contents and one that writes them back; see
:class:`dagpath.runtime.reach.Reach` for which objects there are.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Contents = dict[Any, Any]
Place = tuple[Any, ...]
"""Where something is: the place of what holds it, a text with two gaps for that and for the key, and the key."""
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, types.ModuleType)
"""Types of what cannot change."""


@dataclass(frozen=True)
class Kept:
    """Something that a call can change: where it is, how its contents are read and put back, and what they were.

    The form is a text with gaps for the place of it and for that of one of its contents. The memory is that of numbers
    that PyTorch may share: a tensor that lies there changes with them.
    """

    place: Place
    read: Callable[[], Contents]
    write: Callable[[Contents], None]
    form: str
    contents: Contents
    memory: range | None = None

    def is_same(self) -> bool:
        return self.difference(lambda value, saved: value is saved) is None

    def difference(self, same: Callable[[Any, Any], bool]) -> Place | None:
        """The first place where something else is now."""
        now = self.read()
        for (key, value), (other, saved) in zip(now.items(), self.contents.items(), strict=False):
            is_key = key == other if type(key) is int else key is other
            if not (is_key and (same(value, saved) or (isinstance(value, State) and value == saved))):
                return self.place, self.form, key
        if len(now) != len(self.contents):
            longer = max(now, self.contents, key=len)
            return self.place, self.form, list(longer)[min(len(now), len(self.contents))]
        return None


def is_alike(value: Any, saved: Any, depth: int = 5) -> bool:
    """Is it the same for a call that reads it? Lists of the same objects are, and numbers of the same value.

    Lists may hold themselves: they are compared down to some depth.
    """
    if value is saved:
        return True
    if type(value) is not type(saved) or not depth:
        return False
    if isinstance(value, (list, tuple)):
        return len(value) == len(saved) and all(is_alike(*pair, depth - 1) for pair in zip(value, saved, strict=True))
    return isinstance(value, (str, bytes, int, float, complex)) and (value == saved or value != value)


class State(str):
    """The text of a state. Two states are equal if their texts are."""


def place_text(place: Place) -> str:
    """A place in words: ``self.blocks[0].cache['key']``."""
    if len(place) < 2:
        return str(place[0]) if place else "self"
    holder, form, key = place
    text: str = form.format(place_text(holder), key if isinstance(key, PLAIN) else "...")
    return re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", text)


def is_builtin_iterator(value: Any) -> bool:
    """Is it an iterator of Python itself or of ``itertools``, which cannot be put back but says how far it came?"""
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")


def held_by(iterator: Any) -> list[Any]:
    """What an iterator takes from, and the functions that it calls."""
    parts = gc.get_referents(iterator)
    return [item for part in parts for item in (part[:10] if type(part) is tuple else [part])]


def position_of(iterator: Any) -> Contents:
    """How far an iterator came, and the iterators that it takes from: numbers, texts, and what a generator holds."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [iterator]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, types.GeneratorType):
            frame = part.gi_frame
            held = [] if frame is None else list(frame.f_locals.values())
            found += [State("ended" if frame is None else frame.f_lasti), *held]
        else:
            held = held_by(part)
            found.append(State(_count(part)))
        waiting += filter(is_builtin_iterator, held)
    return dict(enumerate(found))


def _count(iterator: Any) -> Any:
    """The position that an iterator tells."""
    if isinstance(iterator, (itertools.count, itertools.repeat)):
        return repr(iterator)
    if isinstance(iterator, enumerate):
        return iterator.__reduce__()[1][1]
    return iterator.__length_hint__() if hasattr(iterator, "__length_hint__") else ""


def stream(value: Any) -> tuple[Callable[[], Contents], Callable[[Contents], None]]:
    """How the text or the bytes that a stream in memory holds are read and put back."""
    saved, at = value.getvalue(), value.tell()

    def read() -> Contents:
        return {} if value.closed else {0: State(f"{value.tell()} {value.getvalue()!r}")}

    def write(_: Contents) -> None:
        if not value.closed:
            value.seek(0)
            value.write(saved)
            if len(value.getvalue()) > len(saved):
                value.truncate(len(saved))
            value.seek(at)

    return read, write


def has_entries(view: memoryview) -> bool:
    """Is there something in this memory that a call may read?"""
    try:
        return bool(view.nbytes)
    except ValueError:  # it was released
        return False


def addresses(array: Any) -> range:
    """The addresses of the entries of an array, and of what lies between them."""
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = array.ctypes.data + sum(step for step in steps if step < 0)
    return range(first, first + sum(map(abs, steps)) + array.itemsize) if array.size else range(0)


def overlaps(tensor: Tensor, memory: range) -> bool:
    """Do the entries of a tensor lie in this memory, some of them?"""
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided or not tensor.numel():
        return False
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    first = tensor.data_ptr()
    return first < memory.stop and memory.start < first + (sum(steps) + 1) * tensor.element_size()


def ctypes_kind(value: Any) -> str:
    """What an object of ``ctypes`` is: a number (or a text), an array of numbers; empty for all else.

    That module is not imported here: it calls foreign code.
    """
    names = {base.__name__ for base in type(value).__mro__ if base.__module__ == "_ctypes"}
    if "_SimpleCData" in names:
        return "number"
    element = getattr(value, "_type_", None) if "Array" in names else None
    return "array" if str(getattr(element, "_type_", "")) in _NUMBER_CODES else ""


_NUMBER_CODES = tuple("bBhHiIlLqQfdgc?")
"""How ctypes names the types of numbers, as the module :mod:`struct` does; pointers have others."""


def read_value(number: Any) -> Contents:
    return {0: number.value}


def write_value(number: Any, contents: Contents) -> None:
    number.value = contents[0]


def read_hooks(tensor: Tensor, name: str) -> Contents:
    return dict(getattr(tensor, name, None) or {})


def write_hooks(tensor: Tensor, name: str, contents: Contents) -> None:
    hooks = getattr(tensor, name)
    hooks.clear()
    hooks.update(contents)


def refill(container: Any, contents: Contents) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(contents)
    else:
        (container.update if isinstance(container, set) else container.extend)(contents.values())


def slots_of(kind: type) -> list[Any]:
    """The slots that classes written in Python declare. Slots of other classes may only be read."""
    bases = [base for base in kind.__mro__ if "__slots__" in vars(base)]
    return [slot for base in bases for slot in vars(base).values() if type(slot) is types.MemberDescriptorType]


def read_slots(value: Any, slots: Iterable[Any]) -> Contents:
    contents = {}
    for slot in slots:
        try:
            contents[slot.__name__] = slot.__get__(value)
        except AttributeError:  # empty
            continue
    return contents


def write_slots(value: Any, slots: Iterable[Any], contents: Contents) -> None:
    now = read_slots(value, slots)
    for slot in slots:
        if slot.__name__ in contents and now.get(slot.__name__, slot) is contents[slot.__name__]:
            continue
        if slot.__name__ in contents:
            slot.__set__(value, contents[slot.__name__])
        elif slot.__name__ in read_slots(value, [slot]):
            slot.__delete__(value)


def read_cell(cell: types.CellType) -> Contents:
    try:
        return {0: cell.cell_contents}
    except ValueError:  # empty
        return {}


def write_cell(cell: types.CellType, contents: Contents) -> None:
    if contents:
        cell.cell_contents = contents[0]
    else:
        del cell.cell_contents


def misses_of(cache: Any) -> Contents:
    return {0: State(cache.cache_info().misses)}


def stateful(value: Any) -> tuple[Callable[[], Contents], Callable[[Contents], None]]:
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
        return {0: State(now.tolist() if isinstance(now, Tensor) else now) if is_state else now}

    return contents, lambda _: _call(write, held)


def _get(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return None


def _call(function: Callable[[Any], object], value: object) -> None:
    function(value)
