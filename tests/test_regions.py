"""Code under no_grad and autocast, which the exporter puts into subgraphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath

from test_adversarial import assert_exact, two_into_one


def in_autocast(*settings, **options):
    def forward(m, x):
        with torch.autocast(*settings, **options):
            y = F.relu(m.b(x)) + F.relu(m.a(x))
        return m.head(y.float())

    return forward


def no_grad_inside_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            y = F.relu(m.a(x))
        y = y + m.b(x)
    return m.head(y.float())


def autocast_inside_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = F.relu(m.a(x))
        with torch.autocast("cpu", enabled=False):
            y = y.float() + m.b(x.float())
        return m.head(y)


def grad_switched_off_and_on(m, x):
    y = m.a(x)
    torch.set_grad_enabled(False)
    y = F.relu(y) + m.b(x)
    torch.set_grad_enabled(True)
    return m.head(y)


def two_results(m, x):
    with torch.no_grad():
        y, z = F.relu(m.a(x)), F.relu(m.b(x))
    return m.head(y) + m.head(z)


def written_in_place(m, x):
    y = m.a(x)
    with torch.no_grad():
        y.tanh_()
        y[:, 3:] *= 2
    return m.head(y)


def slice_written_in_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.a(x)
        y[:, 3:] *= 2
    return m.head(y.float())


def float16_beside_a_compound(m, x):
    with torch.autocast("cpu", torch.float16):
        y = F.relu(m.a(1e-3 * x))
    return m.head(torch.addcmul(y.float(), F.relu(m.b(x)), torch.ones(6)))  # is taken apart, and regions with it


def with_constants(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        weight = F.linear(torch.ones(6, 5), torch.full((6, 5), 0.3))  # bfloat16 only because of the region
        y = F.relu(F.linear(F.relu(m.a(x)), weight))
    return m.head((y * (weight @ torch.ones(6, dtype=torch.bfloat16))).float())


FREE = {
    "no_grad": (two_results, 6),
    "set_grad_enabled": (grad_switched_off_and_on, 6),
    "autocast to bfloat16": (in_autocast("cpu", torch.bfloat16), 6),
    "autocast that is disabled": (in_autocast("cpu", enabled=False), 6),
    "autocast of another device": (in_autocast("cuda", enabled=False), 6),
    "autocast to float16": (in_autocast("cpu", torch.float16), 0),
    "autocast to float16 beside a compound operation": (float16_beside_a_compound, 0),
    "no_grad inside autocast": (no_grad_inside_autocast, 6),
    "autocast inside autocast": (autocast_inside_autocast, 6),
    "written in place": (written_in_place, 0),
    "slice written in autocast": (slice_written_in_autocast, 6),
    "constants": (with_constants, 1),
}


@pytest.mark.parametrize("name", FREE)
def test_a_region_is_as_free_as_its_operations(name):
    function, groups = FREE[name]
    traced = assert_exact(two_into_one(function), torch.randn(4, 5, generator=torch.Generator().manual_seed(3)))
    assert traced.graph.num_groups == groups, traced.explain()


def test_a_region_that_stays_closed_is_named_and_its_neighbours_are_free():
    def forward(m, x):
        with torch.autocast("cpu", torch.float16):
            y = F.relu(m.a(x)).float()
        return m.head(F.relu(m.mix(y)))

    traced = assert_exact(two_into_one(forward, mix=nn.Linear(6, 7), head=nn.Linear(7, 2)), torch.randn(4, 5))
    assert traced.graph.num_groups == 7
    assert "wrap_with_autocast" in traced.explain()


def test_a_region_has_the_modules_and_lines_of_its_operations():
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.tanh(x)

    graph = dagpath.trace(nn.Sequential(nn.Linear(4, 3), Inner(), nn.Linear(3, 2)), torch.zeros(1, 4)).graph
    site = graph.causes[graph.cause_of[0]].site
    assert (site.operation, site.module) == ("tanh", "1")
    assert site.source.startswith(f"{__file__}:")


def test_a_buffer_written_without_gradients_fixes_what_it_reads():
    def forward(m, x):
        y = F.relu(m.a(x))
        with torch.no_grad():
            m.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return m.head(F.relu(m.mix(y)))

    net = two_into_one(forward, mix=nn.Linear(6, 7), head=nn.Linear(7, 2))
    net.register_buffer("average", torch.zeros(6))
    traced = dagpath.trace(net, torch.randn(4, 5))
    assert traced.graph.num_groups == 7


@pytest.mark.parametrize("inside", [False, True])
def test_rescaling_a_model_with_an_autocast_region_verifies(inside):
    net, x = two_into_one(in_autocast("cpu", torch.bfloat16)), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):  # a context that keeps the weights' casts
        rescaling = dagpath.rescale_(net, x)
        assert rescaling.traced.graph.num_groups == 6
        assert 0 < rescaling.difference < 0.05
        assert dagpath.rescale_(net, x, power_of_two=True).difference == 0
