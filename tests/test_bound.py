"""The bound on factors: no obstacle to networks that people rescale, and never silent where it holds a group."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import dagpath
from dagpath.solver import LogOuter, MassAggregator, Problem, RangeProblem, SumOuter, solve

from networks import mlp
from problems import hand_built

NEAR = 20 * math.log(2)


def vgg(widths=(3, 16, 16, 32, 32), classes=5) -> nn.Sequential:
    torch.manual_seed(0)
    pairs = itertools.pairwise(widths)
    layers = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.b(self.a(x).relu())).relu())


NETWORKS = {
    "a VGG": (vgg, (1, 3, 8, 8)),
    "a perceptron": (lambda: mlp(5, 40, 30, 20, 3), (1, 5)),
    "a residual network": (Residual, (1, 4)),
}


def form(net: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in net.parameters()])


def two_forms(net: nn.Module, x: torch.Tensor, sigma: float, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network and a rescaled copy of it are rescaled to."""
    other = copy.deepcopy(net)
    random = dagpath.random_rescaling(dagpath.trace(other, x), sigma, generator=torch.Generator().manual_seed(2))
    random.apply_()
    for model in (net, other):
        rescaling = dagpath.rescale_(model, x, **options)
        assert rescaling.converged
        assert rescaling.num_held == 0
    assert float(random.log_scales.abs().max()) > NEAR
    return form(net), form(other)


@pytest.mark.parametrize("solver", ["newton", "coordinate"])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm"])
@pytest.mark.parametrize("name", NETWORKS)
def test_two_rescaled_copies_reach_the_same_form(name, criterion, solver):
    make, shape = NETWORKS[name]
    sigma = 8.0
    here, there = two_forms(make().double(), torch.zeros(shape).double(), sigma, criterion=criterion, solver=solver)
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm"])
def test_two_rescaled_copies_in_single_precision_reach_the_same_form(criterion):
    here, there = two_forms(vgg(), torch.zeros(1, 3, 8, 8), 8.0, criterion=criterion)
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-9)


def test_a_criterion_of_ones_own_is_not_stopped_either():
    class SquareRoots:
        def problem(self, traced, bound, device):
            masses = MassAggregator(traced.graph.num_groups, device)
            for name, values in traced.values.items():
                masses.add(values.abs().double().sqrt(), traced.graph.ends[name].dst, traced.graph.ends[name].src)
            nothing = torch.zeros(traced.graph.num_groups, dtype=torch.float64)
            return Problem(masses.matrix(), LogOuter(1.0), 0.5, nothing, 1.0, bound)

    here, there = two_forms(mlp(5, 40, 30, 3).double(), torch.zeros(1, 5).double(), 8.0, criterion=SquareRoots())
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-12)


def test_equal_ranges_are_reached_however_far_they_are():
    net = mlp(5, 40, 30, 3).double()
    x = torch.zeros(1, 5).double()
    dagpath.random_rescaling(dagpath.trace(net, x), 12.0).apply_()
    rescaling = dagpath.rescale_(net, x, "range")
    assert rescaling.converged
    assert float(rescaling.log_scales.abs().max()) > NEAR
    for before, after in ((net[0], net[2]), (net[2], net[4])):
        into = torch.maximum(before.weight.abs().amax(1), before.bias.abs())
        torch.testing.assert_close(into, after.weight.abs().amax(0))


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_powers_of_two_go_as_far(criterion):
    net = mlp(5, 40, 30, 3).double()
    x = torch.randn(3, 5).double()
    dagpath.random_rescaling(dagpath.trace(net, x), 12.0).apply_()
    rescaling = dagpath.rescale_(net, x, criterion, power_of_two=True)
    assert rescaling.converged
    assert rescaling.difference == 0.0
    assert float(rescaling.log_scales.abs().max()) > NEAR


# -- what must not run away --------------------------------------------------------------------------------------------


def dead_in(net):
    net[0].weight[0], net[0].bias[0] = 0.0, 0.0


def dead_out(net):
    net[2].weight[:, 0] = 0.0


def dead_both(net):
    dead_in(net)
    dead_out(net)


def dead_layer(net):
    net[2].weight.zero_()
    net[2].bias.zero_()


def all_dead(net):
    for parameter in net.parameters():
        parameter.zero_()


@pytest.mark.parametrize("solver", ["newton", "coordinate"])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm"])
@pytest.mark.parametrize("kill", [dead_in, dead_out, dead_both, dead_layer, all_dead])
def test_what_is_dead_does_not_run_away(kill, criterion, solver):
    torch.manual_seed(0)
    net = mlp(5, 8, 7, 3).double()
    with torch.no_grad():
        kill(net)
    rescaling = dagpath.rescale_(net, torch.randn(2, 5).double(), criterion, solver=solver)
    assert rescaling.converged
    assert float(rescaling.log_scales.abs().max()) < 5.0


class SumOfWeights:
    """A criterion of one's own that goes on falling as what nothing leaves is made smaller."""

    def problem(self, traced, bound, device):
        masses = MassAggregator(traced.graph.num_groups, device)
        for name, values in traced.values.items():
            masses.add(values.abs(), traced.graph.ends[name].dst, traced.graph.ends[name].src)
        nothing = torch.zeros(traced.graph.num_groups, dtype=torch.float64)
        return Problem(masses.matrix(), SumOuter(), kappa=1.0, linear=nothing, scale=1.0, bound=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_nothing_stops_is_held_and_said_and_the_others_are_not(dtype):
    net = mlp(5, 8, 7, 3).to(dtype)
    x = torch.randn(2, 5, dtype=dtype)
    with torch.no_grad():
        dead_out(net)
    dagpath.random_rescaling(dagpath.trace(net, x), 12.0, generator=torch.Generator().manual_seed(2)).apply_()
    with pytest.warns(UserWarning, match=r"1 group is held by the bound .* 13\.86, of 15 in all"):
        rescaling = dagpath.rescale_(net, x, SumOfWeights())
    assert not rescaling.converged
    assert rescaling.held.tolist() == [True] + [False] * 14
    assert float(rescaling.log_scales[0]) == pytest.approx(-NEAR)
    assert float(rescaling.log_scales[1:].abs().max()) > NEAR
    into = net[0].weight.abs().sum(1) + net[0].bias.abs()
    torch.testing.assert_close(into[1:], net[2].weight.abs().sum(0)[1:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-36])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_factor_that_a_type_does_not_hold_is_not_asked_of_it(size, criterion, power_of_two):
    net = mlp(5, 8, 7, 3)
    with torch.no_grad():
        net[0].weight[0] *= size
        net[0].bias[0] *= size
        net[2].weight[:, 0] *= size
    x = torch.randn(2, 5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rescaling = dagpath.balance(dagpath.trace(net, x), criterion, power_of_two=power_of_two)
    assert bool(torch.isfinite(rescaling.log_scales).all())
    assert [str(w.message).partition(" held by")[0] for w in seen] == ["1 group is"] * (not rescaling.converged)
    if criterion == "equinorm":  # which makes both sides equal: nothing is lost
        assert rescaling.converged
    if size == 1e-30 or criterion == "equinorm":
        before = net(x)
        rescaling.apply_()
        torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_what_it_is_given(dtype):
    net = mlp(5, 16, 12, 3).to(dtype)
    with torch.no_grad():
        net[0].weight[3] *= 2.0**-12
        net[2].weight[:, 3] *= 2.0**12
    rescaling = dagpath.rescale_(net, torch.randn(2, 5).to(dtype))
    assert rescaling.converged
    assert all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters())


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("solver", ["newton", "coordinate"])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_a_minimum_that_a_given_bound_cuts_off_is_not_called_one(criterion, solver, power_of_two):
    if criterion == "range" and solver == "coordinate":
        pytest.skip("equal ranges have a method of their own")
    net = mlp(4, 6, 3).double()
    with torch.no_grad():
        net[0].weight[0] *= 1e4
    x = torch.randn(2, 4).double()
    with pytest.warns(UserWarning, match=r"held by the bound .* 1, of 6 in all; the minimum lies further out"):
        rescaling = dagpath.rescale_(net, x, criterion, solver=solver, power_of_two=power_of_two, bound=1.0)
    assert not rescaling.converged
    assert bool(rescaling.held[0])
    assert rescaling.num_held == int(rescaling.held.sum())
    lines = rescaling.summary(layers=True).splitlines()
    assert next(line for line in lines if line.startswith("groups at the bound")).endswith("NOT THE MINIMUM")
    assert lines[-1].split()[-1] == str(rescaling.num_held)
    assert not any("NOT CONVERGED" in line for line in lines)


def test_a_bound_that_holds_nothing_says_nothing():
    traced = dagpath.trace(mlp(4, 6, 3), torch.zeros(1, 4))
    free, bound = dagpath.balance(traced), dagpath.balance(traced, bound=5.0)
    assert bound.converged
    assert torch.equal(free.log_scales, bound.log_scales)
    assert bound.bound == 5.0
    assert "groups at the bound" in bound.summary()
    assert "NOT THE MINIMUM" not in bound.summary()


def test_what_is_held_is_saved_with_the_factors(tmp_path):
    traced = dagpath.trace(mlp(4, 6, 3), torch.zeros(1, 4))
    with pytest.warns(UserWarning, match="held by the bound"):
        rescaling = dagpath.balance(traced, bound=0.01)
    rescaling.save(tmp_path / "factors.safetensors")
    loaded = dagpath.Rescaling.load(tmp_path / "factors.safetensors", traced)
    assert torch.equal(loaded.held, rescaling.held)
    assert loaded.num_held > 0
    assert not loaded.converged


def test_training_says_once_that_a_bound_holds_groups():
    net = mlp(4, 6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    rebalance = dagpath.optim.Rebalance(dagpath.trace(net, torch.zeros(1, 4)), optimizer, every=1, bound=1e-3)
    net(torch.randn(3, 4)).square().mean().backward()
    with pytest.warns(UserWarning, match="held by the bound"):
        optimizer.step()
    optimizer.step()  # warnings are errors here
    assert not rebalance.rescaling.converged


# -- bounds of single groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("solver", ["newton", "coordinate"])
def test_each_group_may_have_its_own_bound(seed, solver):
    from scipy.optimize import minimize

    problem = hand_built(seed, LogOuter(30.0), -2.0, 5.0).problem
    bounds = torch.rand(problem.num_groups, generator=torch.Generator().manual_seed(seed)).double().numpy() + 0.05
    held = Problem(problem.matrix, problem.outer, problem.kappa, problem.linear, problem.scale, bounds)
    solution = solve(held, solver)
    assert solution.converged
    expected = minimize(
        lambda z: (held.at(z).value, held.at(z).gradient),
        torch.zeros(problem.num_groups).numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(-bounds, bounds, strict=True)),
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
    )
    assert solution.objective[1] <= expected.fun + 1e-9 * abs(expected.fun)
    z = solution.z.numpy()
    assert bool((abs(z) <= bounds).all())
    at = (abs(z) == bounds) & (held.at(z).gradient * z < 0)
    assert solution.held.tolist() == at.tolist()


def test_equal_ranges_may_have_a_bound_for_each_group():
    largest = MassAggregator(2, largest=True)
    largest.add(torch.tensor([1.0, 1.0]), torch.tensor([1, 2]), torch.tensor(0))
    largest.add(torch.tensor([100.0, 100.0]), torch.tensor(0), torch.tensor([1, 2]))
    far = math.log(100) / 2
    solution = solve(RangeProblem(largest.matrix(), torch.tensor([1.0, 9.0]).double().numpy()))
    assert solution.z.tolist() == [1.0, pytest.approx(far)]
    assert solution.held.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"bounds must have shape \(2,\)"):
        RangeProblem(largest.matrix(), torch.ones(3).double().numpy())
