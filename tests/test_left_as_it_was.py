"""A trace leaves everything that a model's code reaches as it was, and nothing without values behind."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import itertools
import random
import types
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import dagpath

from networks import Net

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
TABLES: dict[int, Tensor] = {}
CURRENT = contextvars.ContextVar("current", default=None)
LAST: Any = None
SMALL = nn.Linear(1, 1)


class Slotted:
    __slots__ = ("later", "value")

    def __init__(self) -> None:
        self.value = None


@dataclass
class Record:
    values: list[Any] = field(default_factory=list)
    count: int = 0


class Shared:
    seen: Any = None
    values: list[Any] = []  # noqa: RUF012 (what is shared by all is what is tested)


@functools.cache
def table(size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size)


def into_globals(m: Any, h: Tensor) -> None:
    global LAST
    LAST = h
    TABLES[h.shape[1]] = h


def into_class(m: Any, h: Tensor) -> None:
    Shared.seen = h
    Shared.values.append(h)
    type(m).latest = h


def keep(holder: Any) -> Any:
    return lambda m, h: holder(m, h)


def numbers(m: Any, h: Tensor) -> None:
    m.count += 1
    m.record.count += 1
    m.array += 1
    m.plain.add_(1)


def draws(m: Any, h: Tensor) -> None:
    torch.rand(1, generator=m.generator)


KEEPERS: dict[str, Any] = {
    "an attribute": lambda m, h: setattr(m, "kept", h),
    "a new attribute": lambda m, h: setattr(m, "something_new", h),
    "a list": lambda m, h: m.list.append(h),
    "a deque": lambda m, h: m.deque.append(h),
    "a dictionary": lambda m, h: m.dict.update(h=h),
    "an ordered dictionary": lambda m, h: m.ordered.update(h=h),
    "a default dictionary": lambda m, h: m.default["h"].append(h),
    "nested containers": lambda m, h: m.dict.setdefault("inner", [{}])[0].update(h=(h,)),
    "a plain object": lambda m, h: m.record.values.append(h),
    "slots": lambda m, h: setattr(m.slotted, "later", h),
    "globals": into_globals,
    "a class": into_class,
    "a context variable": lambda m, h: CURRENT.set(h),
    "a function's attribute": lambda m, h: setattr(table, "latest", h),
    "a cache": lambda m, h: table(h.shape[1]),
    "another module": lambda m, h: setattr(m.head, "seen", h),
    "numbers and arrays": numbers,
    "generators of random numbers": draws,
}


def network(keeper: Any) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        keeper(m, h)
        return m.head(h * (table(6) if keeper is KEEPERS["a cache"] else 1.0))

    net = Net(forward, a=nn.Linear(5, 6), head=nn.Linear(6, 2))
    net.list, net.deque, net.dict, net.ordered, net.default = (
        [1],
        deque(maxlen=3),
        {},
        OrderedDict(a=1),
        defaultdict(list),
    )
    net.record, net.slotted, net.count, net.array, net.plain = Record(), Slotted(), 0, numpy.zeros(2), torch.zeros(2)
    net.generator, net.python = torch.Generator().manual_seed(1), random.Random(1)
    net.numpy = numpy.random.default_rng(1)
    return net


def survivors() -> list[torch.Size]:
    """The shapes of tensors without values that something still holds.

    PyTorch's exporter holds those of its last run: it exports a model of one neuron here, whose tensors have one entry.
    """
    torch.export.export(SMALL, (torch.zeros(1, 1),), strict=False)
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), FakeTensor) or (type(o) is Tensor and o.is_meta)]
    return [tensor.shape for tensor in found if tensor.numel() > 1 and tensor.dtype is not torch.uint8]


def state(net: Any) -> Any:
    return (
        {name: id(value) for name, value in vars(net).items()},
        [
            id(value)
            for value in (*net.list, *net.deque, *net.dict.values(), *net.ordered.values(), *net.default.values())
        ],
        [id(value) for value in net.record.values],
        (net.count, net.record.count, net.array.tolist(), net.plain.tolist(), net.plain.requires_grad),
        hasattr(net.slotted, "later"),
        (dict(TABLES), id(LAST), id(Shared.seen), list(Shared.values), id(CURRENT.get())),
        (hasattr(type(net), "latest"), hasattr(table, "latest"), hasattr(net.head, "seen")),
        (net.generator.get_state().tolist(), net.python.getstate(), str(net.numpy.bit_generator.state)),
        (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
    )


@pytest.mark.parametrize("name", KEEPERS)
def test_what_code_can_reach_comes_back(name: str) -> None:
    table.cache_clear()
    net = network(KEEPERS[name])
    before, there = state(net), len(survivors())
    traced = dagpath.trace(net, X)
    assert state(net) == before
    del traced
    assert len(survivors()) <= there
    dagpath.rescale_(net, X)
    assert state(net) == before
    assert len(survivors()) <= there
    assert type(table(6)) is Tensor
    assert not table(6).is_meta


@pytest.mark.parametrize("draw", [lambda m, h: m.python.random(), lambda m, h: m.numpy.random()])
def test_a_model_that_draws_numbers_in_python_is_refused_and_draws_the_same_ones_afterwards(draw: Any) -> None:
    net = network(draw)
    before = state(net)
    with pytest.raises(dagpath.CaptureError, match="draws random numbers in Python"):
        dagpath.trace(net, X)
    assert state(net) == before


def test_a_cache_that_was_full_before_keeps_its_values_or_makes_them_again() -> None:
    table.cache_clear()
    before = table(6)
    dagpath.trace(network(KEEPERS["a cache"]), X)
    assert torch.equal(table(6), before)


def test_hooks_keep_what_they_saw() -> None:
    seen: dict[str, Any] = {}
    values: list[Any] = []
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    net[1].register_forward_hook(lambda module, args, out: seen.__setitem__("relu", out))
    net[0].register_forward_pre_hook(lambda module, args: values.append(args[0]))
    net[2].register_forward_hook(functools.partial(lambda store, module, args, out: store.append(out), values))
    net(X)
    kept, count, there = seen["relu"], len(values), len(survivors())
    dagpath.rescale_(net, X)
    assert seen["relu"] is kept
    assert len(values) == count
    assert len(survivors()) <= there


def test_a_hook_that_counts_in_a_closure_counts_its_own_calls() -> None:
    counter = itertools.count()
    calls = 0

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal calls
        calls += 1

    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    net[1].register_forward_hook(hook)
    dagpath.rescale_(net, X)
    assert calls == 0
    assert next(counter) == 0


def test_example_inputs_are_the_users() -> None:
    def forward(m: Any, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        x.sub_(1).div_(2)
        more["y"].zero_()
        more["z"] = x
        return m.head(F.relu(m.a(x)) + more["y"])

    net = Net(forward, a=nn.Linear(5, 6), head=nn.Linear(6, 2))
    x, more = X.clone(), {"y": torch.ones(3, 6)}
    dagpath.rescale_(net, (x, more))
    assert torch.equal(x, X)
    assert list(more) == ["y"]
    assert torch.equal(more["y"], torch.ones(3, 6))


def test_parameters_that_a_call_writes_to_come_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.slow.weight.data.mul_(0.9).add_(m.a.weight.data, alpha=0.1)
        return m.head(F.relu(m.a(x)) + F.relu(m.slow(x)))

    net = Net(forward, a=nn.Linear(5, 6), slow=nn.Linear(5, 6), head=nn.Linear(6, 2))
    table = nn.Sequential(nn.Embedding(9, 5, max_norm=0.5), nn.Linear(5, 2))
    for model, inputs in ((net, X), (table, torch.arange(4))):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        dagpath.trace(model, inputs)
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_callbacks_and_attributes_of_parameters_come_back() -> None:
    bag: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        m.callback(h)
        m.a.weight.calls = getattr(m.a.weight, "calls", 0) + 1
        return m.head(h)

    net = Net(forward, a=nn.Linear(5, 6), head=nn.Linear(6, 2))
    net.callback = bag.append
    dagpath.trace(net, X)
    assert bag == []
    assert vars(net.a.weight) == {}


def test_a_buffer_that_is_resized_comes_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.size.resize_(4).fill_(1.0)
        return m.head(F.relu(m.a(x)))

    net = Net(forward, a=nn.Linear(5, 6), head=nn.Linear(6, 2))
    net.register_buffer("size", torch.zeros(2))
    dagpath.trace(net, X)
    assert torch.equal(net.size, torch.zeros(2))


# -- gradients, hooks, memory, and what libraries' objects hold -------------------------------------------------------


def two_layers(function: Any, **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net(function, a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    for name, part in parts.items():
        setattr(net, name, part)
    return net


def backwards(m: Any, y: Tensor) -> None:
    if torch.is_grad_enabled():
        (y.detach().sum() * m.gain).backward()


def steps(m: Any, y: Tensor) -> None:
    if m.training and torch.is_grad_enabled():
        m.b.weight.grad = torch.autograd.grad(y.sum(), [m.b.weight], retain_graph=True)[0]
        m.optimizer.step()


def halves(m: Any, y: Tensor) -> None:
    if m.a.weight.requires_grad:
        m.a.weight.register_hook(lambda gradient: gradient * 0.5)


WRITERS = {
    "gradients are freed": lambda m, y: m.zero_grad(),
    "a gradient is set": lambda m, y: setattr(m.a.bias, "grad", torch.ones(6)),
    "a backward pass": backwards,
    "hooks on a parameter": halves,
    "the memory of a parameter": lambda m, y: setattr(m.a.weight, "data", m.a.weight.data.clone()),
    "a namespace": lambda m, y: setattr(m.options, "last", y),
}


@pytest.mark.parametrize("name", WRITERS)
def test_gradients_hooks_and_memory_come_back(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        WRITERS[name](m, y)
        return y

    gain = torch.ones((), requires_grad=True)
    net = two_layers(forward, gain=gain, options=types.SimpleNamespace(last=None))
    F.relu(net.a(X)).sum().backward()

    def state() -> list[Any]:
        found: list[Any] = [gain.grad is None, net.options.last is None]
        for parameter in net.parameters():
            hooks = dict(parameter._backward_hooks or {})
            found += [parameter.data_ptr(), hooks, None if parameter.grad is None else id(parameter.grad)]
        return found

    before = state()
    with contextlib.suppress(dagpath.CaptureError):
        dagpath.trace(net, X)
    assert state() == before


def test_the_state_of_an_optimizer_that_a_model_holds_comes_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        steps(m, y)
        return y.detach()

    net = two_layers(forward)
    net.optimizer = torch.optim.Adam([net.b.weight], lr=0.1)
    before = net.b.weight.detach().clone()
    dagpath.trace(net, X)
    assert not net.optimizer.state
    assert torch.equal(net.b.weight, before)


def test_hooks_of_all_modules_keep_nothing_of_a_trace() -> None:
    kept: list[Any] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.append(output))
    try:
        dagpath.trace(two_layers(lambda m, x: m.b(F.relu(m.a(x)))), X)
    finally:
        hook.remove()
    assert not kept


def test_what_an_iterator_decides_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.b(h) + (h.exp().sum() if next(m.calls) == 1 else 0.0)

    traced = dagpath.trace(two_layers(forward, calls=itertools.count()), X)
    assert "a call changes self.calls" in traced.explain()


def test_random_numbers_come_back_where_shapes_depend_on_values() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.b(torch.dropout(F.relu(m.a(x)), 0.5, m.training))[mask]

    net = two_layers(forward)
    state = torch.get_rng_state()
    dagpath.trace(net, (X, torch.tensor([True, False, True])))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_leaves_nothing_behind(kind: type[nn.Module]) -> None:
    net = Net(lambda m, x: m.b(m.a(x)[0]), a=kind(5, 6, batch_first=True), b=nn.Linear(6, 2))
    assert "later calls may read" not in dagpath.trace(net, torch.randn(2, 4, 5)).explain()
