"""Factors that are powers of two: as good as can be found, against all those around the minimum."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dagpath
from dagpath.solver import (
    GroupMatrix,
    LogOuter,
    MassAggregator,
    Problem,
    RangeProblem,
    SumOuter,
    round_to_powers_of_two,
    solve_newton,
)

from networks import mlp
from problems import hand_built, in_and_out

UNIT = math.log(2)


def test_powers_of_two_are_the_best_on_small_problems():
    best_found = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        problem = in_and_out(rng, int(rng.integers(1, 5)), 6, 3).path_conditioning()
        z = solve_newton(problem).z.numpy()
        rounded, value = round_to_powers_of_two(problem, z)
        nearest = np.rint(z / UNIT)
        around = [nearest + np.array(offset) for offset in itertools.product((-2, -1, 0, 1, 2), repeat=len(z))]
        best = min(problem.at(exponents * UNIT).value for exponents in around)
        np.testing.assert_allclose(rounded / UNIT, np.rint(rounded / UNIT), atol=1e-12)
        assert value == pytest.approx(problem.at(rounded).value)
        assert value <= problem.at(nearest * UNIT).value + 1e-9
        best_found += value <= best + 1e-9 * (1 + abs(best))
    assert best_found >= 0.95 * 150


@settings(max_examples=150)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([LogOuter(5.0), SumOuter()]),
    st.sampled_from([-2.0, 1.0]),
    st.sampled_from([2.6 * UNIT, 20 * UNIT]),
)
def test_no_single_group_can_be_doubled_or_halved_to_advantage(seed, outer, kappa, bound):
    built = hand_built(seed, outer, kappa, bound)
    z, value = round_to_powers_of_two(built.problem, solve_newton(built.problem).z.numpy())
    assert value == pytest.approx(float(built.objective(torch.from_numpy(z))), rel=1e-12)
    assert np.abs(z).max() <= bound
    for group, step in itertools.product(range(len(z)), (-UNIT, UNIT)):
        moved = torch.from_numpy(z).clone()
        moved[group] += step
        if abs(float(moved[group])) <= bound:
            assert value <= float(built.objective(moved)) + 1e-12 * abs(value)


@pytest.mark.parametrize("seed", [*range(20), 553, 716])  # from the nearest powers, the last two end above the start
def test_rounding_is_never_worse_than_no_rescaling(seed):
    built = hand_built(seed, (LogOuter(5.0), SumOuter())[seed % 2], (-2.0, 1.0)[seed // 2 % 2], 13.8, 2 + seed % 3)
    solution = solve_newton(built.problem)
    assert round_to_powers_of_two(built.problem, solution.z.numpy())[1] <= solution.objective[0]


def test_rounding_equal_ranges_takes_the_better_of_the_nearest_powers_and_no_rescaling():
    kept = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        problem = RangeProblem(in_and_out(rng, int(rng.integers(2, 5)), 6, 0.7).collected(largest=True).matrix())
        z = problem.solve().z.numpy()
        nearest, none = np.rint(z / UNIT) * UNIT, np.zeros_like(z)
        rounded, value = round_to_powers_of_two(problem, z)
        assert value == problem.value(rounded) == min(problem.value(nearest), problem.value(none))
        kept += problem.value(none) < problem.value(nearest)
    assert kept > 0


def test_an_outer_function_that_overflows_is_too_much_not_an_error():
    class Exponential:
        """ψ(S) = exp(S); math.exp raises beyond the range of float64."""

        def value(self, total):
            return math.exp(total)

        slope = curvature = value

    matrix = GroupMatrix.of(2, [], torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([300.0, 500.0]))
    problem = Problem(matrix, Exponential(), 1.0, torch.zeros(1), 1.0, offset=0.0)
    with pytest.raises(OverflowError):
        Exponential().value(800.0)
    assert problem.at(np.zeros(1)).value == math.inf
    small = Problem(matrix.divided(2.0), Exponential(), 1.0, torch.zeros(1), 1e300)
    rounded, value = round_to_powers_of_two(small, solve_newton(small).z)
    assert (rounded.tolist(), value) == ([0.0], math.exp(400.0))


def test_a_point_that_is_none_is_not_rounded():
    elements = in_and_out(np.random.default_rng(0), 4, 8, 2)
    for problem in (
        hand_built(0, SumOuter(), 1.0, 1.0).problem,
        RangeProblem(elements.collected(largest=True).matrix()),
    ):
        groups = problem.num_groups
        with pytest.raises(ValueError, match=rf"z must have shape \({groups},\), one for each group"):
            round_to_powers_of_two(problem, np.zeros(groups + 1))
        with pytest.raises(ValueError, match="got nan at index 0"):
            round_to_powers_of_two(problem, torch.full((groups,), math.nan))
        assert round_to_powers_of_two(problem, torch.zeros(groups))[0].dtype == np.float64


def test_elements_within_a_group_do_not_move_the_rounding():
    aggregator = MassAggregator(1)
    aggregator.add(torch.tensor([1000.0, 8.0, 1.0]), torch.tensor([1, 1, 0]), torch.tensor([1, 0, 1]))
    problem = Problem(aggregator.matrix(), SumOuter(), 2.0, torch.zeros(1), 1.0)
    assert round_to_powers_of_two(problem, np.array([3 * math.log(2)]))[1] == pytest.approx(1006.0)


def test_the_loss_of_rounding_is_reported():
    torch.manual_seed(0)
    traced = dagpath.trace(mlp(8, 30, 10, 4), torch.zeros(1, 8))
    exact, rounded = dagpath.balance(traced), dagpath.balance(traced, power_of_two=True)
    assert exact.rounding_loss == 0
    assert rounded.rounding_loss == pytest.approx(rounded.objective[1] - exact.objective[1])
    assert "lost by rounding" in rounded.summary()
