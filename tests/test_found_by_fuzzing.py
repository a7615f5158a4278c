"""What random networks found, as the smallest networks that showed it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dagpath

from networks import Net
from properties import assert_bitwise, check_engines, check_rescaling, traced_untouched


def check(net: nn.Module, *inputs: torch.Tensor) -> None:
    traced = traced_untouched(net.double().eval(), inputs)
    check_rescaling(traced, inputs)
    check_engines(traced, inputs)


def test_a_normalization_without_parameters_starts_paths_that_have_none():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.layer_norm(m.a(x), (2,)).round()), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    check(net, torch.randn(2, 2).double())


def test_paths_cross_a_product_with_zeros_as_their_factor_is_rescaled():
    torch.manual_seed(0)

    def padded_product(m, x):
        y = F.pad(m.a(x), (1, 0)).relu()
        return m.c(y * m.b(y).relu())

    net = Net(padded_product, a=nn.Linear(2, 2, bias=False), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    check(net, torch.randn(2, 2).double())


def test_windows_that_see_padding_alone_have_no_paths():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(F.max_pool1d(m.a(x).relu(), 2, 1, padding=1, dilation=2)), a=nn.Linear(3, 1), b=nn.Linear(1, 2)
    )
    check(net, torch.randn(2, 1, 3).double())


def test_a_triangle_of_examples_and_units_is_not_that_of_one_example():
    torch.manual_seed(0)
    net = Net(lambda m, x: (m.a(x) + m.b(x)).tril(), a=nn.Linear(2, 4), b=nn.Linear(2, 4))
    check(net, torch.randn(3, 2).double())


class _Replacing(nn.Module):
    """A network that replaces a buffer: ``keep(input, value)`` is added in the next call."""

    def __init__(self, first, keep, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("kept", first)
        self.keep, self.twice = keep, twice

    def forward(self, x):
        value = self.a(x).relu()
        old = self.kept
        for _ in range(1 + self.twice):
            self.kept = self.keep(x, value)
        return self.b(value if old is None or old.shape[1:] != value.shape[1:] else value + old)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("first", [None, torch.ones(1, 4), torch.ones(5, 3)], ids=["none", "a row", "another shape"])
@pytest.mark.parametrize(
    ("keep", "free"),
    [
        (lambda x, value: value[:1], 0),
        (lambda x, value: value.mean(0, keepdim=True).detach(), 0),
        (lambda x, value: x, 4),
        (lambda x, value: x[:1].repeat(1, 2)[:, :4], 0),
    ],
    ids=["a value", "a mean", "the input itself", "of the input"],
)
def test_a_buffer_that_is_replaced_keeps_its_scale(keep, free, first, twice):
    net = _Replacing(first, keep, twice).double().eval()
    inputs = (torch.randn(2, 3).double(),)
    buffer = net.kept
    traced = traced_untouched(net, inputs)
    added = first is not None and first.shape[1] == 4
    assert traced.graph.num_groups == (0 if added else free)
    expected = [net(*inputs), net(*inputs)]
    net.kept = buffer
    rescaling = dagpath.random_rescaling(traced, 3.0, power_of_two=True, generator=torch.Generator().manual_seed(0))
    rescaling.apply_()
    assert_bitwise([net(*inputs), net(*inputs)], expected, "call")


def _only_in(training: bool, change):
    def forward(m, x):
        y = m.a(x).relu()
        return m.b(change(y) if m.training == training else y)

    return forward


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (5, 4, 3)], ids=str)
@pytest.mark.parametrize(
    "change",
    [lambda y: y.flip(-1), torch.sigmoid, lambda y: y[y.flatten(1).sum(1).argsort()], lambda y: y + y[..., :1]],
    ids=["flipped", "sigmoid", "sorted examples", "a channel added"],
)
def test_what_train_mode_alone_does_counts_however_many_examples_and_positions_are_given(change, shape, batch):
    torch.manual_seed(0)
    net = Net(_only_in(True, change), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double().eval()
    traced = traced_untouched(net, (torch.randn(batch, *shape).double(),))
    for inputs in (torch.randn(3, *shape).double(), torch.randn(1, *shape).double()):
        check_rescaling(traced, (inputs,))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "use",
    [
        lambda m, y: y + m.rows[len(y)],
        lambda m, y: y * m.rows[: len(y)],
        lambda m, y: y + m.rows[-len(y)],
        lambda m, y: y + m.rows[: len(y)].sum(0),
    ],
    ids=["the row of the number", "a row each", "the row from the end", "the first rows"],
)
def test_a_table_that_train_mode_alone_reads_is_looked_at_for_every_number_of_examples_that_it_has(use, batch):
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(use(m, m.a(x).relu()) if m.training else m.a(x).relu()),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
        rows=torch.randn(4, 4),
    )
    traced = traced_untouched(net.double().eval(), (torch.randn(batch, 3).double(),))
    for number in (1, 2, 3):
        check_rescaling(traced, (torch.randn(number, 3).double(),))
