"""Problems built by hand from overlapping blocks, against SciPy's general-purpose minimizer, autograd and a grid."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian

from dagpath.solver import (
    Block,
    GroupMatrix,
    LogOuter,
    MassAggregator,
    Problem,
    SumOuter,
    solve_coordinate,
    solve_newton,
)
from dagpath.solver.newton import NewtonSystem
from dagpath.solver.preconditioner import SeparableHessian

from problems import Elements, HandBuilt, hand_built

seeds = st.integers(0, 2**31 - 1)
outers = st.sampled_from([LogOuter(1.0), LogOuter(7.0), SumOuter()])
kappas = st.sampled_from([-2.0, -0.7, 1.0, 3.0])


def minimized_by_scipy(built: HandBuilt) -> scipy.optimize.OptimizeResult:
    def function(z):
        z = torch.from_numpy(z)
        return float(built.objective(z)), jacobian(built.objective, z).numpy()

    groups, bound = built.problem.num_groups, built.problem.bound
    return scipy.optimize.minimize(
        function,
        np.zeros(groups),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-bound, bound)] * groups,
        options={"ftol": 0, "gtol": 1e-12, "maxiter": 10_000, "maxfun": 100_000},
    )


@settings(max_examples=200)
@given(seeds, outers, kappas, st.sampled_from([0.4, 20.0]))
def test_the_minimum_is_the_one_that_scipy_finds(seed, outer, kappa, bound):
    built = hand_built(seed, outer, kappa, bound)
    solution, expected = solve_newton(built.problem, tol=1e-11), minimized_by_scipy(built)
    assert solution.converged
    assert solution.objective[0] == pytest.approx(float(built.objective(torch.zeros(len(solution.z)).double())))
    assert solution.objective[1] == pytest.approx(expected.fun, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(solution.z.numpy(), expected.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("outer", [LogOuter(3.0), SumOuter()])
def test_the_groups_at_a_tight_bound_are_those_that_scipy_leaves_there(outer):
    held = []
    for seed in range(20):
        built = hand_built(seed, outer, -2.0, bound=0.3, groups=8)
        solution, expected = solve_newton(built.problem, tol=1e-11), minimized_by_scipy(built)
        assert solution.converged
        assert (solution.z.abs() == 0.3).tolist() == (np.abs(expected.x) == 0.3).tolist()
        held.append(int((solution.z.abs() == 0.3).sum()))
    assert sum(0 < count < 8 for count in held) >= 10  # most problems have groups of both kinds


@settings(max_examples=30)
@given(seeds, outers, kappas, st.sampled_from([1, 2]))
def test_no_point_of_a_grid_is_lower(seed, outer, kappa, groups):
    built = hand_built(seed, outer, kappa, bound=0.5, groups=groups)
    solution = solve_newton(built.problem, tol=1e-11)
    ticks = torch.linspace(-0.5, 0.5, 51, dtype=torch.float64)
    points = torch.cartesian_prod(*[ticks] * groups).reshape(-1, groups)
    values = torch.func.vmap(built.objective)(points)
    assert solution.objective[1] <= float(values.min()) + 1e-12
    # by how much F can rise from the minimum to the nearest point of the grid
    steepest = torch.func.vmap(torch.func.grad(built.objective))(points).abs().sum(1).max()
    assert float(values.min()) <= solution.objective[1] + 0.02 * float(steepest)


@settings(max_examples=100)
@given(seeds, outers, kappas)
def test_value_gradient_and_hessian_are_those_of_autograd(seed, outer, kappa):
    built = hand_built(seed, outer, kappa, bound=20.0)
    z, v = torch.randn(2, built.problem.num_groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    point = built.problem.at(z)
    assert point.value == pytest.approx(float(built.objective(z)), rel=1e-12)
    torch.testing.assert_close(torch.from_numpy(point.gradient), jacobian(built.objective, z), rtol=1e-9, atol=1e-9)

    model, system = SeparableHessian(point), NewtonSystem(point, torch.float64)
    units = np.eye(len(z) + 1)[1:]
    scaled = torch.from_numpy(np.stack([system.product(model)(unit) for unit in units], 1)[1:])
    scale, steepness = torch.from_numpy(model.scale[1:]), kappa**2 * outer.slope(point.total)
    found = steepness * scaled / scale[:, None] / scale[None, :]
    expected = hessian(built.objective, z) + steepness * torch.diag(torch.from_numpy(model.damping[1:]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    # and the system is solved
    step, _ = system.solve(model, (expected @ v).numpy(), forcing=1e-10)
    torch.testing.assert_close(torch.from_numpy(step), v, rtol=0, atol=1e-6 * float(v.abs().max()))


@settings(max_examples=20)
@given(seeds, outers, kappas)
def test_single_entries_and_blocks_give_the_same_minimum(seed, outer, kappa):
    built = hand_built(seed, outer, kappa, bound=2.0)
    problem = built.problem
    entries = Problem.from_incidence(*problem.to_scipy(), outer, kappa, problem.linear, bound=2.0, scale=1.0)
    here, there = solve_newton(problem, tol=1e-11), solve_newton(entries, tol=1e-11)
    torch.testing.assert_close(here.z, there.z, rtol=0, atol=1e-7)
    assert here.objective == pytest.approx(there.objective, rel=1e-12)


@settings(max_examples=60)
@given(seeds, st.sampled_from([0.3, 1.0, 5.0]), kappas, st.sampled_from([0.4, 3.0, 13.8]))
def test_coordinate_descent_reaches_the_same_minimum(seed, p, kappa, bound):
    problem = hand_built(seed, LogOuter(p), kappa, bound).problem
    newton, coordinate = solve_newton(problem), solve_coordinate(problem)
    assert coordinate.converged
    assert coordinate.objective == pytest.approx(newton.objective, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("solve", [solve_newton, solve_coordinate])
@pytest.mark.parametrize("pull", [-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0])
def test_one_group_is_where_a_grid_has_its_minimum_whatever_sides_it_has(solve, pull):
    ends = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    grid = np.linspace(-1.5, 1.5, 301)
    for present in itertools.product([False, True], repeat=4):
        (dst, src), masses = ends[list(present)].T, torch.tensor([2.0, 3.0, 0.7, 0.5])[list(present)]
        matrix, linear = GroupMatrix.of(2, [], dst, src, masses), torch.tensor([pull])
        problem = Problem(matrix, LogOuter(2.0), -2.0, linear, 1.0, bound=1.5)
        solution, values = solve(problem), [problem.at(np.array([z])).value for z in grid]
        assert solution.converged
        assert solution.objective[1] <= min(values) + 1e-9


def test_what_no_mass_holds_goes_to_the_bound_however_far_apart_the_other_masses_are():
    rng = np.random.default_rng(0)
    dst, src = np.append(np.arange(1, 11), 0), np.arange(11)
    aggregator = Elements(12, [(10.0 ** rng.uniform(-40, 40, 11), dst, src)]).collected()
    linear = torch.tensor([0.0] * 10 + [1.0, -2.0])
    solution = solve_newton(Problem(aggregator.matrix(), LogOuter(11.0), -2.0, linear, 1.0, bound=100.0))
    assert solution.converged
    assert solution.z[10:].tolist() == [-100.0, 100.0]


def test_the_drawn_problems_have_what_they_are_drawn_for():
    layouts = [hand_built(seed, SumOuter(), 1.0, 1.0).problem.matrix.layout for seed in range(50)]
    ends = [list(zip(*layout.groups_by_part, strict=True))[1:] for layout in layouts]
    blocks = [(set(dst.tolist()), set(src.tolist())) for dst, src in itertools.chain(*ends)]
    assert sum(dst == src and len(dst) > 2 for dst, src in blocks) > 10
    assert sum(dst != src and len(dst & src) > 1 for dst, src in blocks) > 10
    assert sum(0 in dst for dst, _ in blocks) > 10


def test_a_group_without_mass_goes_where_the_linear_term_takes_it():
    linear = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    solution = solve_newton(Problem(MassAggregator(3).matrix(), SumOuter(), 1.0, linear, 1.0, bound=2.0))
    assert solution.converged
    assert solution.z.tolist() == [-2.0, 2.0, 0.0]


def test_a_problem_by_hand():
    # groups 1 and 2 feed group 3 through a block; single entries lead in and out
    block = Block(torch.tensor([[4.0, 9.0]]), torch.tensor([3]), torch.tensor([1, 2]))
    matrix = GroupMatrix.of(4, [block], torch.tensor([1, 2, 0]), torch.tensor([0, 0, 3]), torch.tensor([1.0, 2.0, 5.0]))
    problem = Problem(matrix, SumOuter(), 2.0, torch.zeros(3), 1.0)
    z = solve_newton(problem).z
    r = (2 * z).exp()
    assert float(r[0]) == pytest.approx(float(4 * r[2] / r[0]))
    assert float(2 * r[1]) == pytest.approx(float(9 * r[2] / r[1]))
    assert float(4 * r[2] / r[0] + 9 * r[2] / r[1]) == pytest.approx(float(5 / r[2]))


def test_an_outer_function_of_ones_own():
    class Square:
        """ψ(S) = S²"""

        def value(self, total):
            return total**2

        def slope(self, total):
            return 2 * total

        def curvature(self, total):
            return 2.0

    aggregator = MassAggregator(2)
    aggregator.add(torch.tensor([3.0, 5.0, 0.5]), torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2]))
    linear = torch.tensor([0.3, -0.7], dtype=torch.float64)
    solution = solve_newton(Problem(aggregator.matrix(), Square(), 1.0, linear, 1.0))
    assert solution.converged
    log = solve_newton(Problem(aggregator.matrix(), LogOuter(1.0), 1.0, torch.zeros(2), 1.0))
    assert not torch.allclose(solution.z, log.z)

    def function(z):
        padded = torch.cat([z.new_zeros(1), z])
        masses = torch.tensor([3.0, 5.0, 0.5], dtype=torch.float64)
        return (masses * (padded[[1, 2, 0]] - padded[[0, 1, 2]]).exp()).sum() ** 2 + linear @ z

    gradient = torch.autograd.functional.jacobian(function, solution.z)
    assert float(gradient.abs().max()) <= 1e-8
