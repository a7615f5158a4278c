"""How the contents of objects are read, compared and put back.

Each object that can change has a function that reads its contents and one that writes them back; see
:class:`dagpath.reach.Reach` for which objects there are.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import random
import re
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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


def is_alike(value: Any, saved: Any) -> bool:
    """Is it the same for a call that reads it? Lists of the same objects are."""
    if isinstance(value, (list, tuple)) and type(value) is type(saved):
        return len(value) == len(saved) and all(map(is_alike, value, saved))
    return value is saved


class State(str):
    """A state that is equal where it is written alike."""


def place_text(place: Place) -> str:
    """A place in words: ``self.blocks[0].cache['key']``."""
    if len(place) < 2:
        return str(place[0]) if place else "self"
    holder, form, key = place
    text: str = form.format(place_text(holder), key if isinstance(key, PLAIN) else "...")
    return re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", text)


def position_of(iterator: Any) -> str:
    """How far an iterator came, in a text: its own position, and those of the iterators that it takes from."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        variables = {} if frame is None else frame.f_locals
        inner = [position_of(value) for value in variables.values() if isinstance(value, Iterator)]
        return f"{frame and frame.f_lasti} { ({name: id(value) for name, value in variables.items()}) } {inner}"
    parts = pytree.tree_leaves([part for part in gc.get_referents(iterator) if isinstance(part, (tuple, Iterator))])
    inner = [position_of(part) for part in parts if isinstance(part, Iterator)]
    counts = isinstance(iterator, itertools.count)
    return f"{operator.length_hint(iterator)} {repr(iterator) if counts else _reduced(iterator)} {inner}"


def _reduced(iterator: Any) -> str:
    """What an iterator says to who copies it: many say how far they came."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = iterator.__reduce__()
    except TypeError:  # it cannot be copied
        return ""
    return " ".join(
        str(part) if isinstance(part, int) else str(id(part)) for part in pytree.tree_leaves(state[1:])[:1000]
    )


def stream(value: Any) -> tuple[Callable[[], Contents], Callable[[Contents], None]]:
    """How the text or the bytes that a stream in memory holds are read and put back."""
    saved, at = value.getvalue(), value.tell()

    def write(_: Contents) -> None:
        value.seek(0)
        value.truncate()
        value.write(saved)
        value.seek(at)

    return lambda: {0: State(f"{value.tell()} {value.getvalue()!r}")}, write


def addresses(array: Any) -> range:
    """The addresses of the memory that an array is a view of."""
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    first = array.ctypes.data
    return range(first, first + array.nbytes)


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
    """Those that classes written in Python declare; members of others may only be read."""
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
