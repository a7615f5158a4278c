"""The solvers on numbers alone, against SciPy's general-purpose minimizer and closed forms."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagpath.solver import MassAggregator, Problem, SumOuter, solve_coordinate, solve_newton

from problems import Elements, in_and_out

seeds = st.integers(0, 2**31 - 1)


def random_elements(seed: int) -> Elements:
    rng = np.random.default_rng(seed)
    return in_and_out(rng, int(rng.integers(1, 7)), int(rng.integers(0, 12)), 3)


def path_conditioning(num_groups, masses, dst, src, **options) -> Problem:
    return Elements(num_groups, [(masses, dst, src)]).path_conditioning(**options)


def plain_objective(z, masses, dst, src):
    """F element by element, as it is written in the paper."""
    padded = np.concatenate([[0.0], z])
    live = masses > 0
    exponent = (padded[dst] - padded[src])[live]
    return live.sum() * np.log((masses[live] * np.exp(-2 * exponent)).sum()) + 2 * exponent.sum()


@settings(max_examples=50)
@given(seeds)
def test_newton_and_coordinate_descent_reach_scipys_minimum(seed):
    elements = random_elements(seed)
    problem, start = elements.path_conditioning(), np.zeros(elements.num_groups)
    found = scipy.optimize.minimize(plain_objective, start, args=elements.flat(), tol=1e-12)
    newton = solve_newton(problem, tol=1e-12)
    coordinate = solve_coordinate(problem, tol=1e-9)
    assert newton.converged
    assert newton.optimality <= 1e-12
    assert newton.objective[0] == pytest.approx(plain_objective(start, *elements.flat()))
    assert newton.objective[1] == pytest.approx(plain_objective(newton.z.numpy(), *elements.flat()))
    assert newton.objective[1] <= found.fun + 1e-9 * abs(found.fun)
    assert newton.objective[1] <= coordinate.objective[1] + 1e-9 * abs(coordinate.objective[1])
    assert coordinate.objective[1] == pytest.approx(newton.objective[1], rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(
    ("dst_shape", "src_shape"),
    [
        ((6, 1, 1), (1, 5, 1)),
        ((6, 1, 1), ()),
        ((), (1, 5, 1)),
        ((6, 1, 1), (6, 5, 1)),
        ((6, 5, 4), (6, 5, 4)),
        ((), ()),
    ],
)
def test_aggregation_keeps_every_mass(dst_shape, src_shape):
    generator = torch.Generator().manual_seed(0)
    masses = torch.rand(6, 5, 4, dtype=torch.float64, generator=generator)
    masses[masses < 0.2] = 0
    dst, src = (torch.randint(0, 4, shape, generator=generator) for shape in (dst_shape, src_shape))
    aggregator = MassAggregator(3)
    aggregator.add(masses, dst, src)
    matrix = aggregator.matrix()
    expected, balance = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for index in np.ndindex(6, 5, 4):
        d, s = int(dst.expand(6, 5, 4)[index]), int(src.expand(6, 5, 4)[index])
        expected[(d, s) if d != s else (0, 0)] += masses[index]  # within a group nothing moves: as if it were fixed
        live = float(masses[index] > 0)
        balance[d] += live
        balance[s] -= live
    products = [matrix.products(unit, unit) for unit in np.eye(4)]
    found = np.stack([np.bincount(matrix.layout.rows.groups, rows, 4) for rows, _ in products], 1)
    transposed = np.stack([np.bincount(matrix.layout.columns.groups, columns, 4) for _, columns in products], 0)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(transposed, expected)
    torch.testing.assert_close(aggregator.balance, balance)
    assert aggregator.num_live == int((masses > 0).sum())


def test_one_group_between_two_elements_has_its_closed_form():
    # one element of mass a in, one of mass b out: the masses a/x and b x are equal at the minimum
    a, b = 3.0, 48.0
    solution = solve_newton(path_conditioning(1, np.array([a, b]), np.array([1, 0]), np.array([0, 1])))
    assert math.exp(2 * float(solution.z)) == pytest.approx(math.sqrt(a / b), rel=1e-9)


def test_groups_without_live_elements_keep_their_scale():
    masses = np.array([1.0, 5.0, 0.0, 0.0])
    problem = path_conditioning(3, masses, np.array([1, 0, 2, 0]), np.array([0, 1, 0, 2]))
    for solve in (solve_newton, solve_coordinate):
        assert solve(problem).z[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("solve", [solve_newton, solve_coordinate])
@pytest.mark.parametrize("num_groups", [0, 3])
def test_an_empty_problem_is_solved_by_doing_nothing(solve, num_groups):
    solution = solve(path_conditioning(num_groups, np.zeros(2), np.zeros(2, int), np.zeros(2, int)))
    assert solution.converged
    assert solution.z.tolist() == [0.0] * num_groups
    assert solution.objective == (0.0, 0.0)


@pytest.mark.parametrize("solve", [solve_newton, solve_coordinate])
def test_the_bound_is_kept_and_optimality_is_measured_within_it(solve):
    masses, dst, src = np.array([1e12, 1.0, 2.0, 1.0]), np.array([1, 0, 2, 0]), np.array([0, 1, 0, 2])
    solution = solve(path_conditioning(2, masses, dst, src, bound=0.5))
    assert solution.converged
    assert float(solution.z[0]) == 0.5
    assert abs(float(solution.z[1])) < 0.5


def test_masses_far_apart_are_balanced():
    num_groups = 30
    chain_dst, chain_src = np.arange(1, num_groups + 2), np.arange(num_groups + 1)
    chain_dst[-1] = 0
    rng = np.random.default_rng(0)
    masses = 10.0 ** rng.uniform(-4, 4, num_groups + 1)
    solution = solve_newton(path_conditioning(num_groups, masses, chain_dst, chain_src))
    assert solution.converged
    padded = np.concatenate([[0.0], solution.z.numpy()])
    scaled = masses * np.exp(-2 * (padded[chain_dst] - padded[chain_src]))
    assert scaled == pytest.approx(np.full(num_groups + 1, np.exp(np.log(masses).mean())), rel=1e-6)


def test_bad_numbers_are_refused():
    for bad in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"masses must be finite and at least 0, .* got {bad}"):
            MassAggregator(1).add(torch.tensor([1.0, bad]), torch.tensor(1), torch.tensor(0))
    with pytest.raises(ValueError, match="bound must be positive"):
        path_conditioning(1, np.ones(1), np.ones(1, int), np.zeros(1, int), bound=0.0)
    general = Problem(MassAggregator(1).matrix(), SumOuter(), 2.0, torch.zeros(1, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="path-conditioning criterion only"):
        solve_coordinate(general)
