"""What a call leaves behind, wherever it is and however the call is made, is seen in the calls after it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_other_calls import check, make, numbers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dagpath

X = numbers(3, 5)


# -- arrays and attributes of tensors ---------------------------------------------------------------------------------


def turned(order: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """Units in an order that a NumPy array says, and each call turns."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.head(F.relu(m.a(x))[:, order(m)])
        m.order[:] = np.roll(m.order, 1)
        return y

    return forward


@pytest.mark.parametrize(
    "order",
    [
        lambda m: m.order,
        lambda m: torch.from_numpy(m.order),
        lambda m: torch.as_tensor(m.order),
        lambda m: torch.from_numpy(m.order).clone(),
        lambda m: torch.tensor(m.order),
        lambda m: torch.frombuffer(m.order, dtype=torch.int64),
    ],
)
def test_numbers_in_an_array_that_calls_change_are_no_constants(order: Callable[[Any], Any]) -> None:
    net = make(turned(order), order=np.arange(6))
    check(net, X, calls=2)
    assert net.order.tolist() == [*range(6)]


def test_a_tensor_that_lies_in_an_array_changes_with_it() -> None:
    order = np.arange(6)
    check(make(turned(lambda m: m.view), order=order, view=torch.from_numpy(order)), X, calls=3)


def test_a_tensor_that_lies_around_an_array_changes_with_it() -> None:
    whole = torch.arange(-1, 6)
    check(make(turned(lambda m: m.whole[1:]), order=whole[1:].numpy(), whole=whole), X, free=1)


def counting(m: Any) -> int:
    m.a.weight.calls = getattr(m.a.weight, "calls", -1) + 1
    return int(m.a.weight.calls)


def freezing(m: Any) -> int:
    m.head.weight.requires_grad_(not m.head.weight.requires_grad)
    return int(m.head.weight.requires_grad)


def with_a_gradient(m: Any) -> int:
    m.head.weight.grad = torch.ones_like(m.head.weight) if m.head.weight.grad is None else None
    return int(m.head.weight.grad is None)


@pytest.mark.parametrize(
    ("step", "place"),
    [
        (counting, "self.a.weight.calls"),
        (freezing, "self.head.weight.requires_grad"),
        (with_a_gradient, "self.head.weight.grad"),
    ],
)
def test_what_calls_change_of_a_parameter_is_followed_and_named(step: Callable[[Any], int], place: str) -> None:
    net = make(lambda m, x: m.head(F.relu(m.a(x)).roll(step(m), 1)))
    assert f"a call changes {place}" in check(net, X, calls=2).explain()
    assert net.head.weight.requires_grad
    assert net.head.weight.grad is None
    assert not hasattr(net.a.weight, "calls")


@pytest.mark.parametrize("holder", [lambda m: m.a.weight, lambda m: m.table, lambda m: m.plain, lambda m: m.kept[0]])
@pytest.mark.parametrize("default", [False, True])
def test_attributes_of_tensors_are_read(holder: Callable[[Any], Tensor], default: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        tensor = holder(m)
        shift = getattr(tensor, "shift", 0) if default else tensor.shift  # type: ignore[attr-defined]
        return m.head(F.relu(m.a(x)).roll(shift, 1))

    net = make(forward, table=torch.zeros(1), kept=[torch.zeros(1)])
    net.plain = torch.zeros(1)
    for tensor in (net.a.weight, net.table, net.plain, net.kept[0]):
        tensor.shift = 2
    before = net(X)
    dagpath.random_rescaling(dagpath.trace(net, X), sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(X), before)


# -- how calls are made -----------------------------------------------------------------------------------------------


def when(asks: Callable[[Any], bool], reads: Callable[[Any], bool], least: int = 1) -> Callable[..., Tensor]:
    """Calls of one kind count; those of another have their units flipped after so many."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if reads(m) and m.count >= least:
            h = F.relu(m.u(h.flip(1) + h))
        m.count += asks(m)
        return m.head(h)

    return forward


CALLS: dict[str, tuple[Callable[[Any], bool], bool, Any]] = {
    "train": (lambda m: m.training, True, torch.enable_grad),
    "eval": (lambda m: not m.training and torch.is_grad_enabled(), False, torch.enable_grad),
    "no_grad": (lambda m: not m.training and not torch.is_grad_enabled(), False, torch.no_grad),
    "inference": (lambda m: torch.is_inference_mode_enabled(), False, torch.inference_mode),
}


@pytest.mark.parametrize(
    ("kinds", "least"),
    [
        (("no_grad", "eval"), 1),
        (("eval", "no_grad"), 1),
        (("no_grad", "no_grad", "no_grad"), 1),
        (("no_grad", "no_grad", "no_grad"), 2),
        (("inference", "inference"), 1),
        (("inference", "eval"), 1),
        (("train", "train", "eval"), 2),
        (("train", "no_grad"), 1),
        (("no_grad", "train"), 1),
    ],
)
def test_calls_of_one_kind_are_looked_at_after_calls_of_another(kinds: Sequence[str], least: int) -> None:
    net = make(when(CALLS[kinds[0]][0], CALLS[kinds[-1]][0], least), count=0)

    def outputs() -> list[Tensor]:
        model, found = copy.deepcopy(net), []
        for kind in kinds:
            _, training, grad_mode = CALLS[kind]
            with grad_mode():
                found.append(model.train(training)(X))
        return found

    before = outputs()
    traced = dagpath.trace(net, X)
    assert "a call changes self.count" in traced.explain()
    generator = torch.Generator().manual_seed(0)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True, generator=generator).apply_()
    assert all(map(torch.equal, outputs(), before))


def test_what_train_mode_alone_changes_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if m.training:
            m.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return m.head(h - m.mean)

    assert "a call changes mean" in dagpath.trace(make(forward, mean=torch.zeros(6)), X).explain()
    normalized = make(lambda m, x: m.head(F.relu(m.norm(m.a(x)))), norm=nn.BatchNorm1d(6))
    assert "a call changes" not in dagpath.trace(normalized, X).explain()


# -- what comes back, or is named -------------------------------------------------------------------------------------


def numbered() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


@pytest.mark.parametrize(
    "iterator",
    [
        itertools.cycle(range(1000)),
        numbered(),
        iter(list(range(1000))),
        (number for number in range(1000)),
        enumerate(range(1000)),
        map(int, range(1000)),
        filter(None, range(1, 1000)),
        zip(range(1000), range(1000), strict=True),
        itertools.chain(range(500), range(500)),
        itertools.islice(range(1000), 900),
        reversed(list(range(1000))),
    ],
)
def test_iterators_that_a_call_moves_are_named(iterator: Iterator[Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        next(m.items)
        return m.head(F.relu(m.a(x)))

    assert "a call changes self.items" in dagpath.trace(make(forward, items=iterator), X).explain()


def add_one(numbers: Any) -> None:
    numbers[0] += 1


def add_to_value(number: Any) -> None:
    number.value += 1


BYTES = bytearray(2)


@pytest.mark.parametrize(
    ("kept", "change", "read"),
    [
        (ctypes.c_int(0), add_to_value, lambda number: number.value),
        ((ctypes.c_int * 2)(), add_one, list),
        (memoryview(BYTES), add_one, bytes),
        (np.zeros((2, 2))[:, 1], add_one, lambda array: array.tolist()),
        (io.StringIO("text"), lambda stream: stream.write("more"), lambda stream: (stream.getvalue(), stream.tell())),
        (io.BytesIO(b"text"), lambda stream: stream.write(b"more"), lambda stream: (stream.getvalue(), stream.tell())),
    ],
)
def test_numbers_and_texts_in_memory_come_back(
    kept: Any, change: Callable[[Any], Any], read: Callable[[Any], Any]
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        change(m.kept)
        return m.head(F.relu(m.a(x)))

    net, before = make(forward, kept=kept), read(kept)
    traced = dagpath.trace(net, X)
    assert read(kept) == before
    assert "a call changes self.kept" in traced.explain()


class Items(list):  # type: ignore[type-arg]
    """A user's kind of list, with attributes."""


class Names(dict):  # type: ignore[type-arg]
    """A user's kind of dictionary."""


class Number(int):
    """A user's kind of number."""


class Slots(list):  # type: ignore[type-arg]
    __slots__ = ("calls",)


@pytest.mark.parametrize("kind", [Items, Names, Number, Slots])
def test_attributes_of_objects_of_the_users_kinds_are_followed(kind: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.kept.calls += 1
        return m.head(F.relu(m.a(x)).roll(m.kept.calls, 1))

    net = make(forward, kept=kind())
    net.kept.calls = 0
    traced = dagpath.trace(net, X)
    assert net.kept.calls == 0
    assert "a call changes self.kept.calls" in traced.explain()
    assert traced.graph.num_groups == 0


class Endless:
    """An iterator of a user's, which holds what it takes from."""

    __slots__ = ("number", "parts")

    def __init__(self) -> None:
        self.number, self.parts = 0, [self]

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> int:
        self.number += 1
        return self.number

    def __length_hint__(self) -> int:
        raise RuntimeError("nobody knows")


def test_a_users_iterator_comes_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        next(m.items)
        return m.head(F.relu(m.a(x)))

    iterator = Endless()
    for items in (iterator, zip(iterator, iterator, strict=True), enumerate(iterator)):
        assert "a call changes self.items" in dagpath.trace(make(forward, items=items), X).explain()
        assert iterator.number == 0


def test_what_cannot_be_put_back_keeps_nothing_else_from_coming_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.ema.mul_(0.9).add_(0.1 * m.a.weight)
        m.view_of[0] += 1
        m.count += 1
        return m.head(F.relu(m.a(x)))

    base = np.zeros(3)
    net = make(forward, view_of=base, shown=np.broadcast_to(base, (2, 3)), count=0)
    net.ema = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64), requires_grad=False)
    dagpath.trace(net, X)
    assert (net.count, base.tolist()) == (0, [0.0] * 3)
    assert not net.ema.requires_grad
    assert net.ema.grad_fn is None
    assert not net.ema.any()


class Absolute(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


@pytest.mark.parametrize("cached", [parametrize.cached, contextlib.nullcontext])
def test_a_cache_of_parametrized_weights_is_left_as_it_was(cached: Any) -> None:
    net = make(lambda m, x: m.head(F.relu(m.a(x))))
    parametrize.register_parametrization(net.a, "weight", Absolute())
    with cached():
        before = net(X)
        kept = dict(parametrize._cache)
        traced = dagpath.trace(net, X)
        assert dict(parametrize._cache) == kept
        dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
        assert torch.equal(net(X), before)
