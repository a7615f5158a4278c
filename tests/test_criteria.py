"""Criteria: their numbers against autograd, and what their minima promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath
from dagpath.solver.newton import NewtonSystem
from dagpath.solver.preconditioner import SeparableHessian

from networks import RandomNet, mlp

seeds = st.integers(0, 2**31 - 1)
BOUND = 20 * math.log(2)


def written_out(criterion, traced):
    """The criterion as a function of z, parameter element by element, as it stands in the papers."""
    exponents = {}
    for name, ends in traced.graph.ends.items():
        exponents[name] = (ends.dst.expand(traced.graph.shapes[name]), ends.src.expand(traced.graph.shapes[name]))
    parameters = {name: p.detach().double() for name, p in traced.model.named_parameters()}
    gram = dagpath.gram_diagonal(traced)

    def function(z):
        padded = torch.cat([z.new_zeros(1), z])
        total, linear, p = 0.0, 0.0, 0
        for name, (dst, src) in exponents.items():
            moved = padded[dst] - padded[src]
            if isinstance(criterion, dagpath.EquiNorm):
                total = total + (parameters[name].abs() * moved.exp()).pow(criterion.p).sum()
            else:
                g = gram[name] / (1.0 if criterion.reference is None else criterion.reference[name])
                live = g > 0
                total = total + (g * (-2 * moved).exp())[live].sum()
                linear = linear + 2 * moved[live].sum()
                p += int(live.sum())
        return total.log() if isinstance(criterion, dagpath.EquiNorm) else p * total.log() + linear

    return function


@settings(max_examples=10)
@given(seeds, st.sampled_from(["none", "numbers", "tensors", 1.0, 2.0, 3.5]))
def test_value_gradient_and_hessian_product_are_those_of_autograd(seed, kind):
    net = RandomNet(seed).double()
    traced = dagpath.trace(net, net.example())
    generator = torch.Generator().manual_seed(seed)
    if isinstance(kind, float):
        criterion = dagpath.EquiNorm(kind)
    else:
        reference = {
            "none": None,
            "numbers": {name: 1.0 + len(name) for name in traced.graph.shapes},
            "tensors": {
                name: torch.rand(shape, generator=generator) + 0.5 for name, shape in traced.graph.shapes.items()
            },
        }[kind]
        criterion = dagpath.PathConditioning(reference)
    problem = criterion.problem(traced, BOUND, torch.device("cpu"))
    if not problem.num_groups or not problem.live:
        return
    z, v = torch.randn(2, problem.num_groups, dtype=torch.float64, generator=generator) / 2
    function, point = written_out(criterion, traced), problem.at(z)
    assert point.value == pytest.approx(float(function(z)), rel=1e-10, abs=1e-10)
    kept = point.rows[1:] + point.columns[1:] > 0  # equal norms fix the groups that lack a side
    gradient = torch.autograd.functional.jacobian(function, z).numpy()
    np.testing.assert_allclose(point.gradient[kept], gradient[kept], rtol=1e-8, atol=1e-8 * problem.scale)

    model = SeparableHessian(point)
    scale = model.scale[1:]
    took_part = torch.from_numpy(scale > 0)
    _, product = torch.autograd.functional.hvp(function, z, v * took_part)
    slope = problem.outer.slope(point.total)
    found = NewtonSystem(point, torch.float64).product(model)(
        np.append(0.0, np.divide(v.numpy(), scale, out=np.zeros_like(scale), where=scale > 0))
    )[1:]
    expected = product.numpy() * scale / (problem.kappa**2 * slope) + model.damping[1:] * scale * v.numpy()
    np.testing.assert_allclose(found[scale > 0], expected[scale > 0], rtol=1e-7, atol=1e-7 * np.abs(expected).max())


@settings(max_examples=10)
@given(seeds, st.sampled_from([1.0, 2.0, 4.0]))
def test_equal_norms_are_equal_on_both_sides_of_every_group(seed, p):
    net = RandomNet(seed, max_convolutions=6).double()
    x = net.example(2)
    with torch.no_grad():
        before = net(x)
        rescaling = dagpath.rescale_(net, x, dagpath.EquiNorm(p))
        after = net(x)
    assert rescaling.converged
    assert float((after - before).abs().max()) <= 1e-10 * float(before.abs().max())
    graph = rescaling.traced.graph
    into, out_of = torch.zeros(2, graph.num_groups + 1, dtype=torch.float64)
    for name, parameter in net.named_parameters():
        dst, src = (end.expand(parameter.shape) for end in (graph.ends[name].dst, graph.ends[name].src))
        masses = parameter.detach().abs().pow(p) * (dst != src)
        into.index_add_(0, dst.flatten(), masses.flatten())
        out_of.index_add_(0, src.flatten(), masses.flatten())
    both = (into > 0) & (out_of > 0) & (torch.cat([torch.ones(1), rescaling.log_scales]).abs() < BOUND)
    both[0] = False
    torch.testing.assert_close(into[both], out_of[both], rtol=1e-6, atol=1e-9 * float(into.sum() + 1))
    total = sum(float(parameter.detach().abs().pow(p).sum()) for parameter in net.parameters())
    assert rescaling.objective[1] == pytest.approx(math.log(total), abs=1e-9)


class Residual(nn.Module):
    """A residual stream whose head is zero: nothing leaves it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.bs = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.cs = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = torch.relu(self.a(x))
        for b, c in zip(self.bs, self.cs, strict=True):
            x = x + torch.relu(c(torch.relu(b(x))))
        return self.head(x)


@pytest.mark.parametrize("criterion", ["equinorm", "range"])
@pytest.mark.parametrize("seed", range(5))
def test_what_leads_to_no_output_is_not_shrunk_without_end(criterion, seed):
    rescaling = dagpath.balance(dagpath.trace(Residual(seed), torch.zeros(1, 4)), criterion)
    assert rescaling.converged
    assert rescaling.log_scales.tolist() == [0] * 24


@pytest.mark.parametrize("criterion", ["equinorm", "range"])
def test_groups_that_lack_a_side_keep_their_scale(criterion):
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 3)
    with torch.no_grad():
        net[2].weight[:, 1] = 0  # nothing leaves the second neuron of the first layer
    traced = dagpath.trace(net, torch.zeros(1, 4))
    rescaling = dagpath.balance(traced, criterion)
    assert rescaling.converged
    assert rescaling.log_scales[1] == 0
    assert (rescaling.log_scales[[0, *range(2, 11)]] != 0).all()
    nn.init.zeros_(net[4].weight)
    assert dagpath.balance(traced, criterion).log_scales.tolist() == [0] * 11


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_a_network_of_zeros_is_left_alone(criterion):
    net = mlp(3, 4, 2)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 3)), criterion)
    assert rescaling.converged
    assert rescaling.log_scales.tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_the_type_of_the_parameters_does_not_matter(criterion, dtype):
    torch.manual_seed(0)
    net = mlp(8, 16, 12, 4).to(dtype)
    exact = mlp(8, 16, 12, 4).double()
    exact.load_state_dict(net.state_dict())
    scales = [
        dagpath.balance(dagpath.trace(model, torch.zeros(1, 8, dtype=kind)), criterion).log_scales
        for model, kind in ((net, dtype), (exact, torch.float64))
    ]
    torch.testing.assert_close(*scales, rtol=0, atol=1e-9)


@pytest.mark.parametrize("p", [0.5, math.inf, math.nan])
def test_a_bad_exponent_is_refused_when_the_criterion_is_made(p):
    with pytest.raises(ValueError, match=f"p must be at least 1 and finite, got {p}"):
        dagpath.EquiNorm(p)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (dagpath.PathConditioning({}), "no entry for '0.weight'"),
        (
            dagpath.PathConditioning({"0.weight": 0.0, "0.bias": 1.0, "2.weight": 1.0, "2.bias": 1.0}),
            "reference of '0.weight' must be positive and finite everywhere, got 0.0",
        ),
        ("ranges", "unknown criterion 'ranges'"),
    ],
)
def test_bad_criteria_are_refused(criterion, message):
    traced = dagpath.trace(mlp(3, 4, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=message):
        dagpath.balance(traced, criterion)


def test_coordinate_descent_cannot_equalize_ranges():
    traced = dagpath.trace(mlp(3, 4, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="newton"):
        dagpath.balance(traced, "range", solver="coordinate")


def test_a_tiny_neuron_is_balanced_too():
    torch.manual_seed(0)
    net = mlp(4, 6, 2).double()
    with torch.no_grad():
        net[0].weight[0] *= 1e-9
        net[0].bias[0] *= 1e-9
        net[2].weight[:, 0] *= 1e-5
    dagpath.balance(dagpath.trace(net, torch.zeros(1, 4).double()), dagpath.EquiNorm(4)).apply_()
    into = net[0].weight[0].pow(4).sum() + net[0].bias[0].pow(4)
    torch.testing.assert_close(into, net[2].weight[:, 0].pow(4).sum(), rtol=1e-6, atol=0)
