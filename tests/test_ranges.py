"""Equal ranges: on numbers alone, element by element, and on models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dagpath
from dagpath.solver import MassAggregator, RangeProblem, SumOuter

from networks import RandomNet, mlp
from problems import Elements, hand_built, in_and_out

seeds = st.integers(0, 2**31 - 1)


def largest_on_both_sides(model, graph):
    into, out_of = torch.zeros(2, graph.num_groups + 1, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        dst, src = (end.expand(parameter.shape) for end in (graph.ends[name].dst, graph.ends[name].src))
        values = (parameter.detach().double().abs() * (dst != src)).flatten()
        into.scatter_reduce_(0, dst.flatten(), values, "amax")
        out_of.scatter_reduce_(0, src.flatten(), values, "amax")
    return into[1:], out_of[1:]


@settings(max_examples=15)
@given(seeds)
def test_equal_ranges_are_equal_on_both_sides_of_every_group(seed):
    net = RandomNet(seed, max_convolutions=6).double()
    rescaling = dagpath.rescale_(net, net.example(2), "range")
    assert rescaling.converged
    into, out_of = largest_on_both_sides(net, rescaling.traced.graph)
    both = (into > 0) & (out_of > 0)
    torch.testing.assert_close(into[both], out_of[both], rtol=1e-7, atol=0)


@pytest.mark.parametrize(("depth", "width"), [(2, 20), (30, 20), (100, 8)])
def test_equal_ranges_in_deep_networks(depth, width):
    torch.manual_seed(0)
    net = mlp(*[width] * (depth + 1))
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, width)), "range")
    assert rescaling.converged
    assert rescaling.optimality <= 1e-9
    assert rescaling.objective[1] == rescaling.optimality < rescaling.objective[0]
    rescaling.apply_()
    into, out_of = largest_on_both_sides(net, rescaling.traced.graph)
    torch.testing.assert_close(into, out_of, rtol=1e-5, atol=0)


def assert_equal_within_the_bound(problem: RangeProblem, masses, dst, src) -> None:
    """Element by element: both maxima of a group are equal, or the bound keeps the larger one from shrinking."""
    solution = problem.solve()
    assert solution.converged
    z = np.append(0.0, solution.z.numpy())
    assert np.abs(z).max() <= problem.bound
    between = (dst != src) & (masses > 0)
    scaled = np.log(masses[between]) + (z[dst] - z[src])[between]
    differences = [0.0]
    for group in range(1, len(z)):
        into, out_of = (scaled[end[between] == group].max(initial=-np.inf) for end in (dst, src))
        if not np.isfinite(into + out_of):
            assert z[group] == 0
        elif abs(z[group]) < problem.bound:
            differences.append(abs(into - out_of))
        else:
            assert (into - out_of) * z[group] <= 1e-8
    assert max(differences) <= 2e-9
    assert solution.objective[1] == solution.optimality == pytest.approx(max(differences), abs=1e-9)


@pytest.mark.parametrize("bound", [0.5, 3.0, 13.8, 175.0])
@pytest.mark.parametrize("decades", [0.5, 5, 40])
def test_both_maxima_are_equal_on_sparse_graphs_with_cycles(decades, bound):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        elements = in_and_out(rng, int(rng.integers(2, 30)), int(rng.integers(0, 100)), decades)
        problem = RangeProblem(elements.collected(largest=True).matrix(), bound)
        assert_equal_within_the_bound(problem, *elements.flat())


@settings(max_examples=60)
@given(seeds, st.sampled_from([0.3, 1.0, 20.0]))
def test_both_maxima_are_equal_in_blocks_that_overlap(seed, bound):
    built = hand_built(seed, SumOuter(), 1.0, bound)
    matrix = built.problem.matrix
    parts = zip(*matrix.layout.groups_by_part, matrix.parts, strict=True)
    every = [(a, d, s) if a.ndim == 1 else (a, d[:, None], s[None, :]) for d, s, a in parts]
    masses, dst, src = Elements(built.problem.num_groups, every).flat()
    assert_equal_within_the_bound(RangeProblem(matrix, bound), masses, dst, src)


@pytest.mark.parametrize("size", [1e-300, 1e-100, 1e100, 1e300])
def test_the_size_of_all_masses_does_not_matter(size):
    elements = in_and_out(np.random.default_rng(0), 10, 30, 2)
    ((masses, *ends),) = elements.parts
    moved = replace(elements, parts=[(size * masses, *ends)])
    here, there = (RangeProblem(e.collected(largest=True).matrix()).solve().z for e in (elements, moved))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-9)


def test_stopping_early_is_reported():
    elements = in_and_out(np.random.default_rng(0), 40, 200, 5)
    problem = RangeProblem(elements.collected(largest=True).matrix())
    whole, cut = problem.solve(), problem.solve(max_iter=2)
    assert (whole.converged, cut.converged) == (True, False)
    assert cut.iterations == 2 < whole.iterations
    assert cut.optimality == problem.value(cut.z.numpy()) > 1e-9


def test_a_bound_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="bound must be positive, got -1"):
        RangeProblem(MassAggregator(1, largest=True).matrix(), -1.0)


def test_equal_ranges_within_a_bound():
    torch.manual_seed(0)
    net = mlp(4, 6, 3)
    with torch.no_grad():
        net[0].weight[0] *= 1e4
    with pytest.warns(UserWarning, match="held by the bound"):
        rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)), "range", bound=1.0)
    assert rescaling.optimality < 1e-9
    assert rescaling.log_scales.abs().max() <= 1.0
    assert rescaling.log_scales[0] == -1.0
