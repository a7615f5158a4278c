"""Outputs in containers of a user's own: all tensors in them count."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath
from dagpath.capture.running import run
from dagpath.ops import Operation
from dagpath.rules import base


@dataclass
class Plain:
    value: Tensor
    hidden: Tensor | None = None
    more: list = field(default_factory=list)


@dataclass
class Entries(OrderedDict):
    """Fields that are entries too, as in the outputs of a well-known library of transformers."""

    value: Tensor
    hidden: Tensor | None = None

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is not None:
                self[f.name] = getattr(self, f.name)


class Row(list):
    pass


CONTAINERS = {
    "dataclass": Plain,
    "dataclass in a list": lambda y, h: [{"out": Plain(y, None, [h])}],
    "dataclass that is a dictionary": Entries,
    "dictionary of its own class": lambda y, h: UserDict(y=y, h=h),
    "list of its own class": lambda y, h: Row([y, h]),
    "dataclass of dataclasses": lambda y, h: Plain(y, None, [Plain(h)]),
}


class Net(nn.Module):
    """Two outputs; whether the second one reads the hidden units directly is a choice."""

    def __init__(self, container, function) -> None:
        super().__init__()
        self.container, self.function = container, function
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor):
        y = F.relu(self.a(x))
        return self.container(self.b(y), self.function(self, y))


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_tensor_of_a_container_is_an_output(name):
    for function, groups in ((lambda m, y: m.c(y), 5), (lambda m, y: torch.cat([y[:, :2], m.c(y)], 1), 3)):
        net, x = Net(CONTAINERS[name], function), torch.randn(4, 3)
        before = run(net, ((x,), {}), training=False)
        rescaling = dagpath.rescale_(net, x, power_of_two=True)
        assert rescaling.traced.graph.num_groups == groups
        after = run(net, ((x,), {}), training=False)
        assert len(before) == len(after) == 2
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", CONTAINERS)
def test_verification_compares_every_tensor_of_a_container(name, monkeypatch):
    class Wrong(Operation):
        def neurons(self, flow, call):
            return call["input"]

        def paths(self, flow, call):
            return call["input"]

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    base.register(Wrong(), "tanh")
    torch.manual_seed(0)
    net = Net(CONTAINERS[name], lambda m, y: m.c(torch.tanh(y)))
    with pytest.raises(dagpath.VerificationError):
        dagpath.rescale_(net, torch.randn(4, 3))


def test_containers_leave_the_model_and_its_hooks_alone():
    def look(module, args, output):
        assert type(output) is Plain

    net = Net(Plain, lambda m, y: m.c(y))
    handle = net.register_forward_hook(look)
    dagpath.rescale_(net, torch.randn(4, 3))
    assert list(net._forward_hooks) == [handle.id]
    assert type(net(torch.randn(4, 3))) is Plain


def test_an_object_that_hides_its_tensors_is_refused():
    class Opaque:
        def __init__(self, *tensors: Tensor) -> None:
            self.tensors = tensors

    with pytest.raises(dagpath.CaptureError, match="Opaque"):
        dagpath.trace(Net(Opaque, lambda m, y: m.c(y)), torch.randn(4, 3))
