"""The solvers on numbers alone, against SciPy's general-purpose minimizer and closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagpath.solver import Problem, matrix, solve_coordinate, solve_newton
from dagpath.solver.newton import NewtonSystem
from dagpath.solver.preconditioner import SeparableHessian

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


def test_batches_of_groups_leave_the_iterates_of_coordinate_descent_as_they_are():
    rng = np.random.default_rng(0)
    layers = [np.zeros(5, int), np.arange(1, 8), np.arange(8, 14), np.zeros(4, int)]
    parts = [(rng.random((len(b), len(a))), b[:, None], a[None, :]) for a, b in itertools.pairwise(layers)]
    elements = Elements(13, parts)
    z = np.zeros(13)
    for _, group in itertools.product(range(3), range(13)):

        def along(value, group=group):
            return plain_objective(np.where(np.arange(13) == group, value, z), *elements.flat())

        z[group] = scipy.optimize.minimize_scalar(along, bracket=(-1, 1), options={"xtol": 1e-10}).x
    found = solve_coordinate(elements.path_conditioning(), max_iter=3)
    assert (found.iterations, found.converged) == (3, False)
    np.testing.assert_allclose(found.z.numpy(), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_the_size_of_all_masses_does_not_matter(size):
    masses, dst, src = in_and_out(np.random.default_rng(0), 10, 30, 2).flat()
    problem, scaled = path_conditioning(10, masses, dst, src), path_conditioning(10, size * masses, dst, src)
    here, there = solve_newton(problem), solve_newton(scaled)
    assert there.converged
    assert there.iterations == here.iterations
    torch.testing.assert_close(there.z, here.z, rtol=0, atol=1e-8)
    assert there.objective[1] == pytest.approx(here.objective[1] + len(masses) * math.log(size), rel=1e-12)


def test_spanning_trees_are_asked_for_with_the_indices_that_every_scipy_takes(monkeypatch):
    asked = []

    def spanning_tree(graph):
        asked.append({index.dtype for index in (graph.row, graph.col, graph.tocsr().indices)})
        return spanning_tree.real(graph)

    spanning_tree.real = matrix.minimum_spanning_tree
    monkeypatch.setattr(matrix, "minimum_spanning_tree", spanning_tree)
    links = np.array([2.0, 8.0, 5.0, 45.0, 3.0, 7.0]), np.array([1, 2, 3, 0, 2, 3]), np.array([0, 1, 2, 3, 1, 1])
    assert solve_newton(Elements(3, [links]).path_conditioning()).converged
    assert asked == [{np.dtype(np.int32)}]


def test_groups_that_touch_nothing_fixed_still_converge():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = int(rng.integers(2, 10))
        every = np.arange(1, groups + 1)
        problem = path_conditioning(
            groups, np.exp(rng.uniform(-2, 2, (groups, groups))), every[:, None], every[None, :]
        )
        assert solve_newton(problem).converged


@settings(max_examples=10)
@given(seeds)
def test_the_separable_model_agrees_where_it_was_made_and_its_hessian_is_inverted_exactly(seed):
    rng = np.random.default_rng(seed)
    a, b, c = np.arange(1, 5), np.arange(5, 9), np.arange(9, 13)
    ends = [
        (a[:, None], np.zeros((1, 3), int)),
        (b[:, None], a[None]),
        (c[:, None], b[None]),
        (np.zeros((2, 1), int), c),
    ]
    parts = [(np.exp(rng.normal(0, 2, np.broadcast_shapes(d.shape, s.shape))), d, s) for d, s in [*ends, (a, a)]]
    point = Elements(12, parts).path_conditioning().at(rng.normal(0, 1, 12))
    model = point.separable()
    again = model.problem.at(point.z)
    assert again.value == pytest.approx(point.value, rel=1e-12)
    np.testing.assert_allclose(again.gradient, point.gradient, rtol=1e-9, atol=1e-9)
    hessian = SeparableHessian(model)
    assert hessian.exact
    dense = np.stack([NewtonSystem(model, torch.float64).product(hessian)(unit) for unit in np.eye(13)[1:]], 1)[1:]
    inverse = np.stack([hessian.precondition(unit) for unit in np.eye(13)[1:]], 1)[1:]
    np.testing.assert_allclose(dense @ inverse, np.eye(12), atol=1e-6)


@settings(max_examples=15)
@given(seeds)
def test_the_preconditioner_stays_above_the_hessian_where_there_are_cycles(seed):
    rng = np.random.default_rng(seed)
    point = in_and_out(rng, 8, 20, 3).path_conditioning().at(rng.normal(0, 1, 8))
    model = SeparableHessian(point)
    dense = np.stack([NewtonSystem(point, torch.float64).product(model)(unit) for unit in np.eye(9)[1:]], 1)[1:]
    inverse = np.stack([model.precondition(unit) for unit in np.eye(9)[1:]], 1)[1:]
    eigenvalues = np.linalg.eigvals(inverse @ dense).real
    assert eigenvalues.min() > 0
    assert eigenvalues.max() <= 1 + 1e-6
