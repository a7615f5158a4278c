"""Path quantities against sums over explicitly enumerated paths."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath

from networks import BruteForce, Net, RandomNet

seeds = st.integers(0, 2**31 - 1)


def small_net(seed: int, most_paths: int = 20_000) -> RandomNet:
    net = RandomNet(seed).double()
    assume(BruteForce.count(net) <= most_paths)
    return net


@settings(max_examples=60)
@given(seeds)
def test_gram_diagonal_is_the_sum_of_squared_path_derivatives(seed):
    net = small_net(seed)
    truth = BruteForce(net)
    gram = dagpath.gram_diagonal(dagpath.trace(net, net.example()))
    scale = max(float(values.max(initial=0)) for values in truth.gram.values())
    for name, expected in truth.gram.items():
        torch.testing.assert_close(gram[name], torch.from_numpy(expected), rtol=1e-10, atol=1e-12 * scale)


@settings(max_examples=60)
@given(seeds, st.sampled_from([1, 1.5, 2, 3]))
def test_path_norm_is_the_norm_of_all_path_values(seed, p):
    net = small_net(seed)
    traced = dagpath.trace(net, net.example())
    expected = BruteForce(net).norm(p)
    assert dagpath.path_norm(traced, p) == pytest.approx(expected, rel=1e-10)
    log = math.log(expected) if expected else -math.inf
    assert dagpath.path_norm(traced, p, log=True) == pytest.approx(log, rel=1e-10, abs=1e-10)


@settings(max_examples=25)
@given(seeds)
def test_path_quantities_follow_a_random_rescaling(seed):
    net = RandomNet(seed, max_convolutions=6).double()
    traced = dagpath.trace(net, net.example())
    rescaling = dagpath.random_rescaling(traced, sigma=2.0, generator=torch.Generator().manual_seed(seed))
    norms = [dagpath.path_norm(traced, p) for p in (1, 2)]
    gram = dagpath.gram_diagonal(traced)
    exponents = (traced.graph.incidence() @ rescaling.log_scales).split([p.numel() for p in net.parameters()])
    rescaling.apply_()
    after = dagpath.gram_diagonal(traced)
    assert [dagpath.path_norm(traced, p) for p in (1, 2)] == pytest.approx(norms, rel=1e-10)
    for (name, before), exponent in zip(gram.items(), exponents, strict=True):
        expected = before * torch.exp(-2 * exponent).view_as(before)
        torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=0)


def test_the_batch_size_of_the_example_does_not_matter():
    net = RandomNet(3).double()
    one, many = (dagpath.trace(net, net.example(batch)) for batch in (1, 7))
    assert dagpath.path_norm(one) == pytest.approx(dagpath.path_norm(many), rel=1e-13)
    torch.testing.assert_close(dagpath.gram_diagonal(one), dagpath.gram_diagonal(many), rtol=1e-13, atol=0)


def test_norms_beyond_float64_have_finite_logarithms():
    depth, value = 500, 100.0
    net = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(depth)])
    nn.init.constant_(net[0].weight, value)
    for layer in net:
        nn.init.constant_(layer.weight, value)
    traced = dagpath.trace(net, torch.zeros(1, 2))
    paths = (depth + 1) * math.log(2)
    for p in (1, 2):
        assert dagpath.path_norm(traced, p, log=True) == pytest.approx(depth * math.log(value) + paths / p, rel=1e-12)
    assert dagpath.path_norm(traced) == math.inf
    log_gram = dagpath.gram_diagonal(traced, log=True)
    expected = 2 * (depth - 1) * math.log(value) + (depth - 1) * math.log(2)
    for values in log_gram.values():
        torch.testing.assert_close(values, torch.full((2, 2), expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [1e-30, 1e-3, 1.0, 1e30])
def test_a_zero_bias_has_a_gram_entry_of_its_own(weight):
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    for layer in (net[0], net[2]):
        nn.init.constant_(layer.weight, weight)
        nn.init.zeros_(layer.bias)
    weight = net[0].weight.item()
    gram = dagpath.gram_diagonal(dagpath.trace(net, torch.zeros(1, 1)))
    assert gram["0.bias"].item() == pytest.approx(weight**2)
    assert gram["2.bias"].item() == 1.0
    assert gram["0.weight"].item() == pytest.approx(weight**2)


def test_frozen_batch_norm_matches_its_closed_form():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0), nn.Conv2d(1, 1, 1, bias=False))
    weight, mean, var, gamma, beta, head = 3.0, 0.7, 2.0, 1.5, -0.4, 5.0
    nn.init.constant_(net[0].weight, weight)
    nn.init.constant_(net[2].weight, head)
    nn.init.constant_(net[1].weight, gamma)
    nn.init.constant_(net[1].bias, beta)
    net[1].running_mean.fill_(mean)
    net[1].running_var.fill_(var)
    gram = dagpath.gram_diagonal(dagpath.trace(net.double().eval(), torch.zeros(1, 1, 1, 1, dtype=torch.float64)))
    assert gram["1.weight"].item() == pytest.approx(head**2 * (weight**2 / var + mean**2 / var), rel=1e-6)
    assert gram["1.bias"].item() == pytest.approx(head**2, rel=1e-6)
    bias = beta - mean * gamma / math.sqrt(var)
    assert gram["2.weight"].item() == pytest.approx(weight**2 * gamma**2 / var + bias**2, rel=1e-6)


def test_a_normalization_whose_gain_is_its_input_cuts_paths():
    def function(m, x):
        hidden = m.first(x).sum(0)
        return m.last(nn.functional.layer_norm(hidden, hidden.shape, hidden, hidden))

    net = Net(function, first=nn.Linear(3, 4), last=nn.Linear(4, 2)).double()
    traced = dagpath.trace(net, torch.zeros(2, 3, dtype=torch.float64))
    unrolled = traced.unroll()
    assert dagpath.path_norm(traced) == pytest.approx(unrolled.path_norm(), rel=1e-12)
    assert dagpath.path_count(traced) == unrolled.path_count()


@pytest.mark.parametrize("p", [1, 2, 3])
def test_an_infinite_weight_leaves_the_norms_of_other_paths_as_they_are(p):
    net = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[math.inf], [-2.0], [0.0]]))
    norms = dagpath.path_norm(dagpath.trace(net, torch.zeros(1, 1)), p, per_output=True)
    torch.testing.assert_close(norms, torch.tensor([[math.inf, 2.0, 0.0]], dtype=torch.float64))


def test_parameters_that_no_path_meets_have_gram_zero():
    net = nn.Sequential(nn.Linear(2, 2), nn.PReLU(2), nn.Linear(2, 1))
    assert dagpath.gram_diagonal(dagpath.trace(net, torch.zeros(1, 2)))["1.weight"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("p", [0.5, 0, -1, math.inf, math.nan, "2"])
def test_a_norm_needs_p_of_at_least_one(p):
    traced = dagpath.trace(nn.Linear(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"p must be a finite"):
        dagpath.path_norm(traced, p)


def test_repeated_gram_passes_do_not_leak_memory():
    import gc

    traced = dagpath.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.zeros(1, 8))

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    dagpath.gram_diagonal(traced)
    before = tensors()
    for _ in range(5):
        dagpath.gram_diagonal(traced)
    assert tensors() <= before
