"""Parameters that are fetched one at a time give what those give that are all there, and so do products of vectors."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dagpath
from dagpath.lifting.gram import visit_common_gram_diagonal
from dagpath.runtime.fetched import Fetched
from dagpath.trace import TracedModel

from networks import Net, RandomNet, mlp


class Counting:
    """Gives out copies of tensors, and knows how many of them are there."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.fetched, self.most = tensors, 0, 0

    def __call__(self, name: str) -> Tensor:
        self.fetched += 1
        self.most = max(self.most, self.alive() + 1)
        return self.tensors[name].clone()

    def alive(self) -> int:
        """How many large tensors there are but for the model's own."""
        kept = {id(tensor) for tensor in self.tensors.values()}
        found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and id(thing) not in kept]
        return sum(tensor.numel() >= 2**16 for tensor in found)


def fetching(traced: TracedModel, fetch: Callable[[str], Tensor]) -> TracedModel:
    values = Fetched(list(traced.values), fetch, torch.device("cpu"))
    return TracedModel(traced.model, traced.captured, traced.graph, 0.0, values=values)


def assert_alike(net: nn.Module, x: Tensor) -> None:
    assert_same_quantities(dagpath.trace(net, x))


def assert_same_quantities(traced: TracedModel) -> None:
    """Of parameters that are held, and that are fetched."""
    held = traced.values
    other = fetching(traced, lambda name: held[name].clone())
    assert dagpath.path_norm(other, log=True) == pytest.approx(dagpath.path_norm(traced, log=True), rel=1e-13)
    for name, values in dagpath.gram_diagonal(traced, log=True).items():
        found = dagpath.gram_diagonal(other, log=True)[name]
        torch.testing.assert_close(found, values, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dagpath.path_mass(other), dagpath.path_mass(traced), rtol=1e-12, atol=0)
    expected, found = dagpath.balance(traced), dagpath.balance(other)
    assert found.live == expected.live
    torch.testing.assert_close(found.log_scales, expected.log_scales, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1))
def test_fetched_parameters_give_the_same_masses(seed):
    net = RandomNet(seed).double()
    assert_alike(net, net.example())


def test_fetched_parameters_of_any_size_give_the_same_masses():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(m.a(x).relu() + m.b(m.a(x).relu()).relu()),
        a=nn.Linear(3, 5),
        b=nn.Linear(5, 5),
        c=nn.Linear(5, 2),
    ).double()
    with torch.no_grad():
        net.b.weight.mul_(1e-200)
        net.b.bias.mul_(1e-250)
        net.c.bias.zero_()
    assert_alike(net, torch.zeros(1, 3).double())


def test_what_ends_inside_of_a_call_ends_there_for_fetched_parameters_too():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(F.layer_norm(m.a(x).relu(), (6,), m.gain, m.shift)) / (1 + m.a(x).relu().sum()),
        a=nn.Linear(3, 6),
        b=nn.Linear(6, 2),
        gain=torch.rand(6),
        shift=torch.rand(6),
    ).double()
    assert_alike(net, torch.zeros(2, 3).double())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.head(m.enter(x).relu() * m.gain * m.gain),
        lambda m, x: m.head(F.linear(m.enter(x).relu(), F.linear(m.square, m.square))),
        lambda m, x: m.head(m.cell(m.enter(x).relu())),
        lambda m, x: m.head(m.both(m.enter(x).relu(), x)),
        lambda m, x: m.head(m.enter(x).relu() @ torch.cat([m.square] * 2, 1)[:, :5]),
        lambda m, x: m.head(m.normed(m.enter(x).relu())),
        lambda m, x: m.head(m.none(x[:, :0]) + m.enter(x).relu()),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_parameters_that_are_used_twice_or_cut_paths_are_fetched_alike(function):
    torch.manual_seed(0)
    parts = {
        "enter": nn.Linear(3, 5),
        "head": nn.Linear(5, 2),
        "gain": torch.rand(5),
        "square": torch.rand(5, 5),
        "cell": nn.GRUCell(5, 5),
        "both": nn.Bilinear(5, 3, 5),
        "none": nn.Linear(0, 5),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
    }
    net = Net(function, **parts).double()
    assert_alike(net, torch.zeros(1, 3).double())


def test_one_parameter_is_there_at_a_time():
    torch.manual_seed(0)
    net = mlp(256, 256, 256, 256, 256, 256, 2)
    traced = dagpath.trace(net, torch.zeros(1, 256))
    count = Counting(dict(traced.values))
    other = fetching(traced, count)
    before = count.alive()
    dagpath.balance(other)
    assert count.most - before <= 4  # one that is fetched, its masses, and what they are computed from
    assert count.fetched > 20


def dense(traced: TracedModel, factors: bool) -> tuple[dict[str, Tensor], int]:
    found: dict[str, Tensor] = {}
    products = []

    def visit_factors(name: str, left: Tensor, right: Tensor) -> None:
        products.append(name)
        found[name] = left[:, None] * right

    visit_common_gram_diagonal(traced, found.__setitem__, visit_factors if factors else None)
    return found, len(products)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.b(F.relu(self.a(self.norm(x)))))


@pytest.mark.parametrize(
    ("net", "x", "products"),
    [
        (mlp(4, 6, 5, 3), torch.zeros(1, 4), 3),
        (Transformer(), torch.zeros(1, 7, 6), 3),
        (nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Linear(5, 4)), torch.zeros(1, 1, 7), 0),
        (nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(14, 4)),
         torch.zeros(1, 1, 7), 1),
        (Net(lambda m, x: m.a(m.a(x).relu()), a=nn.Linear(4, 4)), torch.zeros(1, 4), 0),
    ],
)  # fmt: skip
def test_masses_of_linear_layers_are_products_where_positions_are_alike(net, x, products):
    traced = dagpath.trace(net, x)
    expected, none = dense(traced, factors=False)
    found, count = dense(traced, factors=True)
    assert (none, count) == (0, products)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-13, atol=0)


def test_a_mapping_that_fetches_is_a_mapping():
    values = Fetched(["a", "b"], lambda name: torch.full((2,), float(ord(name))), torch.device("cpu"))
    assert (list(values), len(values)) == (["a", "b"], 2)
    assert values["b"] is not values["b"]
    with pytest.raises(KeyError):
        values["c"]
