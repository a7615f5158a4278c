"""The same answers on a CUDA device, where there is one."""

import copy
import itertools

import pytest
import torch
from torch import nn

import dagpath
from dagpath.solver import Problem, solve_newton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def network():
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise((3, 16, 24, 24)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_balancing_gives_the_same_factors(criterion):
    here = network()
    there = copy.deepcopy(here).cuda()
    x = torch.randn(2, 3, 12, 12)
    expected = dagpath.balance(dagpath.trace(here, x), criterion).log_scales
    found = dagpath.balance(dagpath.trace(there, x.cuda()), criterion).log_scales
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_rescaling_in_place_keeps_device_and_function():
    model, x = network().cuda(), torch.randn(2, 3, 12, 12, device="cuda")
    with torch.no_grad():
        before = model(x)
        rescaling = dagpath.rescale_(model, x)
        after = model(x)
    assert rescaling.converged
    assert all(parameter.is_cuda for parameter in model.parameters())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_powers_of_two_are_bitwise_exact():
    model, x = network().cuda().eval(), torch.randn(2, 3, 12, 12, device="cuda")
    with torch.no_grad():
        before = model(x)
        dagpath.rescale_(model, x, power_of_two=True)
        assert torch.equal(model(x), before)


def test_a_sparse_problem():
    traced = dagpath.trace(network(), torch.randn(2, 3, 12, 12))
    masses = torch.rand(traced.graph.num_parameters, dtype=torch.float64) + 0.1
    here = solve_newton(Problem.from_incidence(traced.graph.incidence(), masses))
    there = solve_newton(Problem.from_incidence(traced.graph.incidence("cuda"), masses.cuda()))
    torch.testing.assert_close(there.z, here.z, rtol=0, atol=1e-7)


def test_the_structure_of_a_network_is_the_same():
    here = nn.Sequential(*network(), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()
    there = copy.deepcopy(here).cuda()
    x = torch.randn(2, 3, 12, 12)
    expected, found = dagpath.trace(here, x), dagpath.trace(there, x.cuda())
    torch.testing.assert_close(found.graph.adjacency().to_dense(), expected.graph.adjacency().to_dense())
    assert found.graph.adjacency(device="cuda").device.type == "cuda"
    assert list(map(str, dagpath.top_paths(found, 3))) == list(map(str, dagpath.top_paths(expected, 3)))
    torch.testing.assert_close(dagpath.conserved_quantities(found), dagpath.conserved_quantities(expected))


def test_the_unrolled_graph_gives_the_same_quantities():
    here = network()
    expected = dagpath.trace(here, torch.randn(1, 3, 8, 8)).unroll()
    found = dagpath.trace(copy.deepcopy(here).cuda(), torch.randn(1, 3, 8, 8).cuda()).unroll(device="cuda")
    assert found.adjacency().is_cuda
    assert found.path_count() == expected.path_count()
    assert found.path_norm(2) == pytest.approx(expected.path_norm(2), rel=1e-12)
    for name, values in found.gram_diagonal().items():
        torch.testing.assert_close(values.cpu(), expected.gram_diagonal()[name], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.backward_mass(1).cpu(), expected.backward_mass(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True, "amsgrad": True}])
def test_the_state_of_an_optimizer_is_carried_along_where_it_is(options):
    model, x = network().cuda(), torch.randn(2, 3, 12, 12, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), **options)
    model(x).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy([optimizer.state[p] for p in model.parameters()])
    rescaling = dagpath.random_rescaling(dagpath.trace(model, x), power_of_two=True)
    rescaling.apply_(optimizers=[optimizer])
    for old, parameter, factor in zip(before, model.parameters(), rescaling.multipliers().values(), strict=True):
        new, factor = optimizer.state[parameter], factor.cuda().float()
        assert torch.equal(new["exp_avg"], old["exp_avg"] / factor)
        assert torch.equal(new["exp_avg_sq"], old["exp_avg_sq"] / factor**2)
        assert torch.equal(new["step"], old["step"])


@pytest.mark.parametrize(
    "make",
    [
        lambda traced: dagpath.optim.GSGD(traced, lr=1e-4, momentum=0.9, refresh=2),
        lambda traced: dagpath.optim.PathSGD(traced, lr=1e-3, every=2),
    ],
)
def test_steps_in_path_space_are_the_same(make):
    here = network().double()
    there = copy.deepcopy(here).cuda()
    x, target = torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.randint(5, (8,))
    for model in (here, there):
        device = next(model.parameters()).device
        optimizer = make(dagpath.trace(model, x.to(device)))
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), target.to(device)).backward()
            optimizer.step()
        assert all(parameter.device == device for parameter in model.parameters())
    for expected, found in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-12)


def test_the_stream_of_the_caller_is_used_and_left_alone():
    model, x = network().cuda(), torch.randn(2, 3, 12, 12, device="cuda")
    expected = dagpath.rescale_(copy.deepcopy(model), x).log_scales
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = dagpath.rescale_(model, x).log_scales
        assert torch.cuda.current_stream() == stream
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
