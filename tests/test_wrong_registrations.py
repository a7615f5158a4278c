"""A rule that a user registers for an operation that does not obey it is found out before anything is rescaled."""

import pytest
import torch
from torch import Tensor, nn

import dagpath
from dagpath.rules import base

from networks import Net


@torch.library.custom_op("dagpath_wrong::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("dagpath_wrong::raised", mutates_args=())
def raised(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("dagpath_wrong::in_order", mutates_args=())
def in_order(x: Tensor) -> Tensor:
    return x.sort(-1).values


@torch.library.custom_op("dagpath_wrong::multiplied", mutates_args=())
def multiplied(a: Tensor, b: Tensor) -> Tensor:
    return a * b


@torch.library.custom_op("dagpath_wrong::over_square", mutates_args=())
def over_square(a: Tensor, b: Tensor) -> Tensor:
    return a / (1 + b.square())


for _operation in (cubed, raised, in_order):
    _operation.register_fake(torch.empty_like)
for _operation in (multiplied, over_square):
    _operation.register_fake(lambda a, b: torch.empty_like(a))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("operation", "rule"),
    [
        (cubed, "homogeneous"),
        (raised, "homogeneous"),
        (in_order, "movement"),
        (multiplied, "sum"),
        (over_square, "sum"),
        (multiplied, "choice"),
        (over_square, "choice"),
    ],
)
def test_a_wrong_rule_raises_and_changes_nothing(monkeypatch, operation, rule, power_of_two):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    dagpath.register_op(operation, rule)
    torch.manual_seed(0)
    binary = operation in (multiplied, over_square)
    net = Net(
        lambda m, x: m.head(operation(m.a(x), m.b(x)) if binary else operation(m.a(x))),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 4),
        head=nn.Linear(4, 2),
    ).double()
    with torch.no_grad():
        net.a.weight.mul_(16)
        net.head.weight.mul_(torch.tensor([1.0, 4.0, 16.0, 64.0]))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(dagpath.VerificationError, match="an operation of this model has a wrong rule"):
        dagpath.rescale_(net, torch.randn(4, 3).double(), power_of_two=power_of_two)
    for parameter, values in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, values)
