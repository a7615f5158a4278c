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


def test_a_triangle_of_examples_and_units_is_not_that_of_one_example():
    torch.manual_seed(0)
    net = Net(lambda m, x: (m.a(x) + m.b(x)).tril(), a=nn.Linear(2, 4), b=nn.Linear(2, 4))
    check(net, torch.randn(3, 2).double())
