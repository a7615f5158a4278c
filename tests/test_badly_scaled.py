"""Balancing problems that are hard: masses far apart, long chains, stars, groups on their own."""

import math

import numpy as np
import pytest
import torch

from dagpath.solver import MassAggregator, Problem, solve_newton

SPREADS = [0, 2, 10, 50, 100]


def chain(rng, length, width, spread, bias=False):
    """Layers of one width between fixed ends; masses 10**uniform(-spread, spread)."""
    elements = []
    layers = [np.zeros(width, int), *(np.arange(i * width + 1, (i + 1) * width + 1) for i in range(length))]
    for before, after in zip(layers, [*layers[1:], layers[0]], strict=True):
        elements.append((10.0 ** rng.uniform(-spread, spread, (width, width)), after[:, None], before[None, :]))
        if bias and after[0]:
            elements.append((10.0 ** rng.uniform(-spread, spread, width), after, np.zeros(width, int)))
    return length * width, elements


def star(rng, leaves, spread):
    dst = np.concatenate([[1], np.arange(2, leaves + 2), np.zeros(leaves, int)])
    src = np.concatenate([[0], np.ones(leaves, int), np.arange(2, leaves + 2)])
    return leaves + 1, [(10.0 ** rng.uniform(-spread, spread, len(dst)), dst, src)]


def with_cycles(rng, groups, extra, spread):
    every, fixed = np.arange(1, groups + 1), np.zeros(groups, int)
    dst = np.concatenate([every, fixed, rng.integers(0, groups + 1, extra)])
    src = np.concatenate([fixed, every, rng.integers(0, groups + 1, extra)])
    return groups, [(10.0 ** rng.uniform(-spread, spread, len(dst)), dst, src)]


def posed(num_groups, elements, **options) -> Problem:
    aggregator = MassAggregator(num_groups)
    for masses, dst, src in elements:
        aggregator.add(torch.from_numpy(masses), torch.from_numpy(dst), torch.from_numpy(src))
    return Problem.path_conditioning(aggregator, **options)


def plain_optimality(num_groups, elements, z, bound):
    """``‖∇F‖∞ / p`` over the open directions, element by element."""
    z = np.append(0.0, z)
    into, out_of = np.zeros(num_groups + 1), np.zeros(num_groups + 1)
    live_in, live_out, p = np.zeros(num_groups + 1), np.zeros(num_groups + 1), 0
    for masses, dst, src in elements:
        dst, src = np.broadcast_to(dst, masses.shape), np.broadcast_to(src, masses.shape)
        scaled = masses * np.exp(-2 * (z[dst] - z[src]))
        np.add.at(into, dst, scaled)
        np.add.at(out_of, src, scaled)
        np.add.at(live_in, dst, masses > 0)
        np.add.at(live_out, src, masses > 0)
        p += (masses > 0).sum()
    gradient = (-2 * p * (into - out_of) / into.sum() + 2 * (live_in - live_out))[1:]
    z = z[1:]
    gradient[((z >= bound) & (gradient < 0)) | ((z <= -bound) & (gradient > 0))] = 0
    return np.abs(gradient).max() / p


@pytest.mark.parametrize("bound", [20 * math.log(2), 175.0])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, spread: chain(rng, 200, 1, spread),
        lambda rng, spread: chain(rng, 200, 3, spread),
        lambda rng, spread: chain(rng, 50, 3, spread, bias=True),
        lambda rng, spread: chain(rng, 5, 40, spread),
        lambda rng, spread: star(rng, 300, spread),
    ],
    ids=["chain of width 1", "chain of width 3", "chain with biases", "wide chain", "star"],
)
def test_newton_converges(draw, spread, bound):
    num_groups, elements = draw(np.random.default_rng(0), spread)
    solution = solve_newton(posed(num_groups, elements, bound=bound))
    assert solution.converged
    assert plain_optimality(num_groups, elements, solution.z.numpy(), bound) <= 2e-9
    assert solution.iterations <= 100


@pytest.mark.parametrize("spread", [0, 2, 10])
def test_newton_converges_on_sparse_graphs_with_cycles(spread):
    num_groups, elements = with_cycles(np.random.default_rng(1), 300, 2000, spread)
    solution = solve_newton(posed(num_groups, elements))
    assert solution.converged
    assert plain_optimality(num_groups, elements, solution.z.numpy(), 20 * math.log(2)) <= 2e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_minimum_is_the_same_from_any_start(seed):
    rng = np.random.default_rng(seed)
    num_groups, elements = chain(rng, 6, 20, 1, bias=True)
    shift = np.append(0.0, rng.normal(0, 5, num_groups))
    moved = [(masses * np.exp(-2 * (shift[dst] - shift[src])), dst, src) for masses, dst, src in elements]
    here, there = (solve_newton(posed(num_groups, e, bound=100.0)) for e in (elements, moved))
    np.testing.assert_allclose(there.z.numpy() + shift[1:], here.z.numpy(), atol=1e-7)


def test_groups_on_their_own_and_a_single_live_element():
    # groups 1 and 2 exchange mass with each other alone, 3 has none, 4 is between fixed ends
    masses = np.array([2.0, 8.0, 5.0, 45.0])
    dst, src = np.array([1, 2, 4, 0]), np.array([2, 1, 0, 4])
    solution = solve_newton(posed(4, [(masses, dst, src)]))
    z = solution.z.numpy()
    assert solution.converged
    assert z[2] == 0
    assert plain_optimality(4, [(masses, dst, src)], z, 20 * math.log(2)) <= 1e-9

    one = solve_newton(posed(2, [(np.array([3.0, 0.0]), np.array([0, 2]), np.array([0, 1]))]))
    assert one.converged
    assert one.z.tolist() == [0, 0]


def test_two_runs_give_the_same_bits():
    num_groups, elements = chain(np.random.default_rng(0), 20, 17, 6, bias=True)
    first, second = (solve_newton(posed(num_groups, elements)).z for _ in range(2))
    assert torch.equal(first, second)
