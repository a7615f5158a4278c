"""Balancing problems that are hard: masses far apart, long chains, stars, groups on their own."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dagpath.solver import solve_newton

from problems import Elements, in_and_out

SPREADS = [0, 2, 10, 50, 100]


def chain(rng, length, width, spread, bias=False):
    """Layers of one width between fixed ends; masses 10**uniform(-spread, spread)."""
    elements = []
    layers = [np.zeros(width, int), *(np.arange(i * width + 1, (i + 1) * width + 1) for i in range(length))]
    for before, after in zip(layers, [*layers[1:], layers[0]], strict=True):
        elements.append((10.0 ** rng.uniform(-spread, spread, (width, width)), after[:, None], before[None, :]))
        if bias and after[0]:
            elements.append((10.0 ** rng.uniform(-spread, spread, width), after, np.zeros(width, int)))
    return Elements(length * width, elements)


def star(rng, leaves, spread):
    dst = np.concatenate([[1], np.arange(2, leaves + 2), np.zeros(leaves, int)])
    src = np.concatenate([[0], np.ones(leaves, int), np.arange(2, leaves + 2)])
    return Elements(leaves + 1, [(10.0 ** rng.uniform(-spread, spread, len(dst)), dst, src)])


def plain_optimality(elements, z, bound):
    """``‖∇F‖∞ / p`` over the open directions, element by element."""
    masses, dst, src = elements.flat()
    z = np.append(0.0, z)
    scaled, live = masses * np.exp(-2 * (z[dst] - z[src])), masses > 0
    into, out_of = (np.bincount(end, scaled, len(z)) for end in (dst, src))
    surplus = np.bincount(dst, live, len(z)) - np.bincount(src, live, len(z))
    gradient = (-2 * live.sum() * (into - out_of) / scaled.sum() + 2 * surplus)[1:]
    z = z[1:]
    gradient[((z >= bound) & (gradient < 0)) | ((z <= -bound) & (gradient > 0))] = 0
    return np.abs(gradient).max() / live.sum()


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
    elements = draw(np.random.default_rng(0), spread)
    solution = solve_newton(elements.path_conditioning(bound=bound))
    assert solution.converged
    assert plain_optimality(elements, solution.z.numpy(), bound) <= 2e-9
    assert solution.iterations <= 100


@pytest.mark.parametrize("spread", [0, 2, 10])
def test_newton_converges_on_sparse_graphs_with_cycles(spread):
    elements = in_and_out(np.random.default_rng(1), 300, 2000, spread)
    solution = solve_newton(elements.path_conditioning())
    assert solution.converged
    assert plain_optimality(elements, solution.z.numpy(), 20 * math.log(2)) <= 2e-9


@pytest.mark.parametrize("spread", [1, 2, 10])
def test_stopping_early_keeps_what_was_reached(spread):
    problem = chain(np.random.default_rng(0), 5, 40, spread).path_conditioning()
    values = [solve_newton(problem, max_iter=most).objective[1] for most in range(25)]
    assert values[0] == problem.at(np.zeros(200)).value > values[1]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("seed", range(5))
def test_the_minimum_is_the_same_from_any_start(seed):
    rng = np.random.default_rng(seed)
    elements = chain(rng, 6, 20, 1, bias=True)
    shift = np.append(0.0, rng.normal(0, 5, elements.num_groups))
    moved = [(masses * np.exp(-2 * (shift[dst] - shift[src])), dst, src) for masses, dst, src in elements.parts]
    here, there = (solve_newton(e.path_conditioning(bound=100.0)) for e in (elements, replace(elements, parts=moved)))
    np.testing.assert_allclose(there.z.numpy() + shift[1:], here.z.numpy(), atol=1e-7)


def test_groups_on_their_own_and_a_single_live_element():
    # groups 1 and 2 exchange mass with each other alone, 3 has none, 4 is between fixed ends
    elements = Elements(4, [(np.array([2.0, 8.0, 5.0, 45.0]), np.array([1, 2, 4, 0]), np.array([2, 1, 0, 4]))])
    solution = solve_newton(elements.path_conditioning())
    z = solution.z.numpy()
    assert solution.converged
    assert z[2] == 0
    assert plain_optimality(elements, z, 20 * math.log(2)) <= 1e-9

    one = Elements(2, [(np.array([3.0, 0.0]), np.array([0, 2]), np.array([0, 1]))])
    one = solve_newton(one.path_conditioning())
    assert one.converged
    assert one.z.tolist() == [0, 0]


def test_two_runs_give_the_same_bits():
    elements = chain(np.random.default_rng(0), 20, 17, 6, bias=True)
    first, second = (solve_newton(elements.path_conditioning()).z for _ in range(2))
    assert torch.equal(first, second)
