"""Path quantities do not change under a rescaling, and balancing works, where values are infinite, random or cut."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath
from dagpath.rules import base

from invariance import assert_invariant
from networks import Net


def test_padding_with_minus_infinity_is_right_under_any_scale():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(F.max_pool2d(F.pad(m.a(x), (0, 1, 0, 1), value=float("-inf")), 2, 1)),
        a=nn.Conv2d(2, 5, 3, padding=1),
        b=nn.Conv2d(5, 3, 3),
    )
    assert assert_invariant(net, torch.randn(2, 2, 8, 8)).graph.num_groups == 5


def test_a_maximum_with_minus_infinity_is_right_under_any_scale():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(m.a(x).masked_fill(torch.arange(6) == 2, float("-inf")).relu()),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
    )
    assert assert_invariant(net, torch.randn(2, 4)).graph.num_groups == 6


def test_a_buffer_with_infinities_is_no_error():
    torch.manual_seed(0)

    def attend(m, x):
        weights = (m.q(x) @ m.k(x).mT + m.mask).softmax(-1)
        return m.out(weights @ m.v(x))

    parts = {name: nn.Linear(4, 6) for name in "qkv"}
    net = Net(attend, out=nn.Linear(6, 2), **parts)
    net.register_buffer("mask", torch.full((5, 5), -float("inf")).triu(1))
    assert assert_invariant(net, torch.randn(2, 5, 4)).graph.num_groups == 6


def test_a_dropout_in_a_constant_branch_draws_nothing_in_eval_mode():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.head(x + m.b(m.drop(torch.relu(m.a(m.table))))),
        a=nn.Linear(2, 6),
        b=nn.Linear(6, 3),
        drop=nn.Dropout(0.1),
        head=nn.Linear(3, 3),
    )
    net.register_buffer("table", torch.randn(5, 2))
    assert_invariant(net, torch.randn(5, 3))


@torch.library.custom_op("dagpath_tests::reversed_copy", mutates_args=())
def reversed_copy(x: Tensor) -> Tensor:
    return x.flip(-1)


@reversed_copy.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_movement_without_a_derivative_can_be_balanced(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    dagpath.register_op("dagpath_tests::reversed_copy", "movement")
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(reversed_copy(torch.relu(m.a(x)))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    traced = assert_invariant(net, torch.randn(2, 4))
    assert traced.graph.num_groups == 6
    plain = Net(lambda m, x: m.b(torch.relu(m.a(x)).flip(-1)), a=net.a, b=net.b)
    for one, other in zip(
        dagpath.gram_diagonal(traced).values(),
        dagpath.gram_diagonal(dagpath.trace(plain, torch.zeros(1, 4, dtype=torch.float64))).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@torch.library.custom_op("dagpath_tests::largest", mutates_args=())
def largest(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    return torch.maximum(torch.maximum(first, second), third)


@largest.register_fake
def _(first, second, third):
    return torch.empty_like(first)


def test_a_rule_that_does_not_fit_cuts_the_paths_as_it_fixes_the_neurons(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    dagpath.register_op("dagpath_tests::largest", "choice")  # which is one of two tensors, not of three
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(torch.relu(m.head(largest(m.a(x), m.b(x), m.a(x))))),
        **{name: nn.Linear(*sizes) for name, sizes in zip("abc", itertools.repeat((4, 6)), strict=False)},
        head=nn.Linear(6, 4),
    )
    traced = assert_invariant(net, torch.randn(2, 4))
    assert traced.graph.num_groups == 4
    assert "unforeseen form" in traced.explain()
