"""What random networks found, as the smallest networks that showed it."""

import torch
import torch.nn.functional as F
from torch import nn

from networks import Net
from properties import check_engines, traced_untouched


def check_both_engines(net: nn.Module, *inputs: torch.Tensor) -> None:
    check_engines(traced_untouched(net.double().eval(), inputs), inputs)


def test_a_normalization_without_parameters_starts_paths_that_have_none():
    net = Net(lambda m, x: m.b(F.layer_norm(m.a(x), (2,)).round()), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    check_both_engines(net, torch.randn(1, 2).double())
