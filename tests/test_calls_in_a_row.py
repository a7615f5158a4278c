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

from networks import Net

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


# -- calls of other sizes in between ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("keeps", ["size", "mean"])
def test_calls_of_other_sizes_in_between_are_looked_at(dim: int, keeps: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if m.size is not None and m.size != x.shape[dim]:
            m.center = h.detach().mean((0, 1)) if keeps == "mean" else h.detach()[0, 0]
        m.size = x.shape[dim]
        return m.head(F.relu(h - m.center))

    net = make(forward, size=None, center=torch.zeros(6))
    inputs, others = numbers(3, 4, 5), numbers(*((7, 4, 5) if dim == 0 else (3, 9, 5)), seed=2)
    expected = []
    for model in (copy.deepcopy(net), net):
        if model is net:
            dagpath.random_rescaling(dagpath.trace(net, inputs), power_of_two=True).apply_()
        with torch.no_grad():
            expected.append([model(given) for given in (inputs, inputs, others, others, inputs)])
    for one, other in zip(*expected, strict=True):
        assert torch.equal(one, other)


def test_everything_that_a_call_changes_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if m.training and not m.done:
            with torch.no_grad():
                m.shift.copy_(h.mean(0))
                m.seen.copy_(h.amax(0))
            m.done = True
        return m.head(h + m.shift)

    net = make(forward, shift=nn.Parameter(torch.zeros(6)), seen=torch.zeros(6), done=False)
    covers = " ".join(dagpath.trace(net, X).explain("dict")["covers"])
    assert all(name in covers for name in ("self.done", "shift", "seen")), covers


def test_training_after_a_validation_is_looked_at() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if m.training:
            h = F.relu(m.u(h)) if m.validated else h
            m.trained = True
        elif m.trained:
            m.validated = True
        return m.head(h)

    net = make(forward, trained=False, validated=False)
    twin = copy.deepcopy(net)
    dagpath.random_rescaling(dagpath.trace(net, X), sigma=3.0, power_of_two=True).apply_()
    for training in (True, False, True):
        assert torch.equal(net.train(training)(X), twin.train(training)(X))


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_train_drops_is_seen(filled: bool) -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.merged = nn.Linear(5, 6), nn.Linear(6, 2), None

        def train(self, mode: bool = True) -> Cached:
            self.merged = None
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.head(F.relu(self.a(x)))
            if self.merged is None:
                self.merged = self.a.weight.detach().clone()
            return self.head(F.relu(F.linear(x, self.merged, self.a.bias)))

    net = Cached().double().eval()
    if filled:
        net(X)
    traced = dagpath.trace(net, X)
    before = net(X)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("on_output", [False, True])
def test_attributes_that_a_call_gives_to_its_inputs_and_outputs_keep_their_scale(on_output: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        old = getattr(x, "features", None)
        y = m.head(h if old is None else h + old.flip(-1))
        (y if on_output else x).features = h.detach()
        return y

    net, found = make(forward), []
    for model in (copy.deepcopy(net), net):
        if model is net:
            traced = dagpath.trace(net, X)
            dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
        x = X.clone()
        first, second = model(x), model(x)
        found.append((first, second, first.features if on_output else x.features))
    assert not hasattr(X, "features")
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# -- parameters that code reads as numbers, or merges -----------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda m: float(m.array.std()),
        lambda m: float(np.abs(m.array).max()),
        lambda m: 1.0 if (np.abs(m.array) > 0.3).any() else 2.0,
        lambda m: memoryview(m.array).tolist()[0][0],
        lambda m: float(m.view[0, 0]),
    ],
)
def test_parameters_over_an_array_that_code_reads_keep_their_scale(read: Callable[[Any], float]) -> None:
    array = np.random.default_rng(0).normal(size=(6, 5))
    view = array[:3]
    view.flags.writeable = False
    layer = nn.Linear(5, 6).double()
    layer.weight = nn.Parameter(torch.from_numpy(array))
    net = Net(lambda m, x: m.head(F.relu(m.a(x))) * read(m), a=layer, head=nn.Linear(6, 2).double()).eval()
    net.array, net.view = array, view
    before = net(X)
    traced = dagpath.trace(net, X)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(X), before)
    assert "a.weight" not in traced.graph.movable


class Folded(nn.Linear):
    """A layer whose gain is part of its weight in eval mode, or whose weight has an update added to it there."""

    def __init__(self, adds: bool) -> None:
        super().__init__(5, 6)
        self.adds, self.folded = adds, False
        self.gain, self.update = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6, 5))

    @torch.no_grad()
    def train(self, mode: bool = True) -> Folded:
        if mode == self.folded:
            if self.adds:
                self.weight.add_(self.update, alpha=-1.0 if mode else 1.0)
            else:
                self.weight.mul_(1 / self.gain[:, None] if mode else self.gain[:, None])
            self.folded = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            return F.linear(x, self.weight, self.bias)
        if self.adds:
            return F.linear(x, self.weight + self.update, self.bias)
        return F.linear(x, self.weight * self.gain[:, None], self.bias)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_weights_that_a_change_of_mode_merges_are_right_in_both_modes(adds: bool, training: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Folded(adds), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double().train(training)
    twin = copy.deepcopy(net)
    values = {name: parameter.clone() for name, parameter in net.named_parameters()}
    traced = dagpath.trace(net, X)
    assert all(torch.equal(values[name], parameter) for name, parameter in net.named_parameters())
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    for mode in (False, True, False, True):
        assert torch.equal(net.train(mode)(X), twin.train(mode)(X))
    assert traced.graph.num_groups == 6 + 6


class Backed(nn.Linear):
    """A layer whose gain is folded into its weight in eval mode, and taken back from a copy of it."""

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.gain, self.copy = nn.Parameter(torch.rand(6) + 0.5), None

    @torch.no_grad()
    def train(self, mode: bool = True) -> Backed:
        if not mode and self.copy is None:
            self.weight.mul_(self.gain[:, None])
            self.bias.mul_(self.gain)
            self.copy = self.gain.clone()
            self.gain.fill_(1.0)
        elif mode and self.copy is not None:
            self.gain.copy_(self.copy)
            self.weight.div_(self.gain[:, None])
            self.bias.div_(self.gain)
            self.copy = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.gain


@pytest.mark.parametrize("training", [False, True])
def test_parameters_that_a_change_of_mode_does_not_change_as_a_rescaling_does_keep_their_scale(training: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Backed(), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double().train(training)
    twin = copy.deepcopy(net)
    traced = dagpath.trace(net, X)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    for mode in (False, True, False, True):
        assert torch.equal(net.train(mode)(X), twin.train(mode)(X))
    assert traced.graph.num_groups == 6  # those of the layer in between
    assert "train() and eval() of the model, which change 0.gain" in traced.explain()


def test_parameters_whose_entries_share_memory_are_left_alone() -> None:
    gain = nn.Parameter(torch.ones(1).expand(6))
    net = Net(lambda m, x: m.head(F.relu(m.a(x)) * m.gain), a=nn.Linear(5, 6), head=nn.Linear(6, 2), gain=gain)
    x = X.float()
    before = net(x)
    dagpath.rescale_(net, x, power_of_two=True)
    assert torch.equal(net(x), before)


def test_a_model_whose_parameters_share_memory_where_those_of_the_trace_do_not_is_refused() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)).double()

    net, tied = build(), build()
    tied[2].weight = nn.Parameter(tied[0].weight.detach())
    before = tied(X)
    with pytest.raises(ValueError, match=r"'0\.weight' shares its memory with another tensor"):
        dagpath.random_rescaling(dagpath.trace(net, X), power_of_two=True).apply_(tied)
    assert torch.equal(tied(X), before)
