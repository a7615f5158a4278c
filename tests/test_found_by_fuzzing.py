"""What random networks found, as the smallest networks that showed it."""

import torch
import torch.nn.functional as F
from torch import nn

from networks import Net
from properties import check_engines, check_rescaling, traced_untouched


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
