"""Masses in every form, aggregated, in blocks and sparse, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

import dagpath
from dagpath.solver import (
    Block,
    GroupMatrix,
    LogOuter,
    MassAggregator,
    Problem,
    RangeProblem,
    SumOuter,
    solve,
    solve_coordinate,
    solve_newton,
)
from dagpath.solver.problem import DEFAULT_BOUND

from networks import RandomNet

seeds = st.integers(0, 2**31 - 1)


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


@settings(max_examples=15)
@given(seeds)
def test_the_sparse_form_and_the_blocks_give_the_same_answer(seed):
    net = RandomNet(seed).double()
    traced = dagpath.trace(net, net.example())
    gram = dagpath.gram_diagonal(traced)
    masses = torch.cat([gram[name].flatten() for name in traced.graph.shapes])
    sparse = Problem.from_incidence(traced.graph.incidence(), masses)
    blocks = dagpath.PathConditioning().problem(traced, DEFAULT_BOUND, torch.device("cpu"))
    here, there = (solve_newton(problem, tol=1e-12) for problem in (sparse, blocks))
    torch.testing.assert_close(here.z, there.z, rtol=0, atol=1e-8)
    assert here.objective == pytest.approx(there.objective, rel=1e-9, abs=1e-9)

    again = Problem.from_incidence(*blocks.to_scipy(), blocks.outer, -2.0, blocks.linear, scale=blocks.scale)
    torch.testing.assert_close(solve_newton(again, tol=1e-12).z, there.z, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("rows", "masses", "options", "message"),
    [
        ([[1.0, 1.0]], [1.0], {}, "row 0 of the incidence matrix must have at most one"),
        ([[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0], {}, "row 1 of the incidence matrix"),
        ([[1.0, -1.0]], [1.0, 2.0], {}, r"masses must have shape \(1,\)"),
        ([[1.0, -1.0]], [-1.0], {}, "masses must be finite and at least 0"),
        ([[1.0, -1.0]], [float("nan")], {}, "masses must be finite and at least 0"),
        ([[1.0, -1.0]], [1.0], {"linear": torch.zeros(3)}, r"linear must have shape \(2,\)"),
        ([[1.0, -1.0]], [1.0], {"outer": SumOuter(), "bound": -1.0}, "bound must be positive"),
    ],
)
def test_bad_sparse_problems_are_refused(rows, masses, options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        incidence = torch.tensor(rows, dtype=torch.float64).to_sparse_csr()
    with pytest.raises(ValueError, match=message):
        Problem.from_incidence(incidence, torch.tensor(masses), **options)


def test_zeros_that_a_sparse_matrix_stores_are_no_ends():
    stored = csr_array((np.array([1.0, 0, 1, -1, -1]), np.array([0, 1, 1, 0, 1]), np.array([0, 2, 4, 5])), shape=(3, 2))
    masses, same = np.array([1.0, 2.0, 5.0]), csr_array(stored.toarray())
    here, there = (Problem.from_incidence(B, masses, SumOuter(), 1.0) for B in (stored, same))
    assert (here.matrix.to_scipy() != there.matrix.to_scipy()).nnz == 0


def test_the_linear_term_may_be_an_array_like_the_masses():
    incidence, linear = csr_array(np.array([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])), np.array([0.5, -1.0])
    here, there = (
        solve_newton(Problem.from_incidence(incidence, np.ones(3), SumOuter(), 1.0, term)).z
        for term in (linear, torch.from_numpy(linear))
    )
    assert torch.equal(here, there)


def test_an_incidence_matrix_that_is_not_sparse_is_refused():
    with pytest.raises(ValueError, match="must be 2-D sparse CSR"):
        Problem.from_incidence(torch.eye(2), torch.ones(2))


def test_masses_of_a_parameter_that_requires_a_gradient():
    aggregator = MassAggregator(1)
    masses, dst, src = nn.Parameter(torch.ones(2)), torch.tensor([1, 0]), torch.tensor([0, 1])
    aggregator.add(masses, dst, src)
    assert solve_newton(Problem.path_conditioning(aggregator)).converged
    linear = nn.Parameter(torch.zeros(1))
    assert solve_newton(Problem(GroupMatrix.of(2, [], dst, src, masses), SumOuter(), 2.0, linear, 1.0)).converged


@pytest.mark.parametrize(
    ("masses", "dst", "src", "message"),
    [
        ([1.0, math.inf], 1, 0, r"masses must be finite and at least 0, .* got inf at index \(1,\)"),
        ([math.nan, 1.0], 1, 0, r"masses must be finite and at least 0, .* got nan at index \(0,\)"),
        ([[1.0, 1.0], [-1.0, 1.0]], 1, 0, r"masses must be finite and at least 0, .* got -1.0 at index \(1, 0\)"),
        ([1e308, 1e308], 1, 0, "masses must be finite .* got inf as their sum"),
        ([1j, 1.0], 1, 0, "masses must be real"),
        ([1.0, 1.0], [0.0, 1.0], 0, "dst groups must be integers, got torch.float32"),
        ([1.0, 1.0], 1, [True, False], "src groups must be integers, got torch.bool"),
        ([1.0, 1.0], 1, [0, 3], "src groups must lie between 0 and 2; these are from 0 to 3"),
        ([1.0, 1.0], [-1, 1], 0, "dst groups must lie between 0 and 2; these are from -1 to 1"),
        ([1.0, 1.0, 1.0], [1, 2], 0, r"dst of shape \(2,\) does not broadcast to \(3,\)"),
        ([1.0, 1.0], 1, [[1, 2]], r"src of shape \(1, 2\) does not broadcast to \(2,\)"),
    ],
)
def test_bad_elements_are_refused(masses, dst, src, message):
    masses = torch.tensor(masses, dtype=None if 1j in masses else torch.float64)
    aggregator = MassAggregator(2)
    with pytest.raises(ValueError, match=message):
        aggregator.add(masses, torch.tensor(dst), torch.tensor(src))
    assert aggregator.num_live == 0


def test_groups_of_any_integer_type_are_taken():
    found = []
    for kind in (torch.uint8, torch.int16, torch.int32, torch.int64):
        aggregator = MassAggregator(200)  # 200² is beyond the first two types
        ends = torch.arange(1, 201, dtype=torch.int64).to(kind)
        aggregator.add(torch.arange(1.0, 201), ends, ends.flip(0))
        dst, src = ends[:100], ends[100:]
        by_hand = GroupMatrix.of(201, [], dst, src, torch.ones(100))
        found.append((aggregator.matrix().to_scipy().toarray(), by_hand.to_scipy().toarray()))
    for one, other in found:
        np.testing.assert_array_equal(one, found[-1][0])
        np.testing.assert_array_equal(other, found[-1][1])


@pytest.mark.parametrize(
    ("block", "entries", "message"),
    [
        (([[1.0, -2.0]], [1], [2, 3]), ([], [], []), "block 0: masses must be finite and at least 0"),
        (([[1.0, math.nan]], [1], [2, 3]), ([], [], []), "block 0: masses must be finite and at least 0"),
        (
            ([[1.0, 2.0]], [1], [2]),
            ([], [], []),
            r"block 0: masses of shape \(1, 2\) do not fit groups of shapes \(1,\) and \(1,\)",
        ),
        (([[1.0, 2.0]], [1], [2, 4]), ([], [], []), "block 0: src groups must lie between 0 and 3"),
        (([[1.0, 2.0]], [1], [2, 2]), ([], [], []), "names a group twice"),
        (([[1.0]], [1], [2]), ([1.0], [-1], [0]), "the entries: dst groups must lie between 0 and 3"),
        (([[1.0]], [1], [2]), ([1.0, 2.0], [1], [0]), "the entries: masses of shape"),
        (([[1.0]], [1], [2]), ([1.0, 2.0], [1, 1], [0, 0]), "a pair of groups twice"),
    ],
)
def test_bad_blocks_and_entries_are_refused(block, entries, message):
    masses, dst, src = (torch.tensor(part) for part in block)
    values, *ends = entries
    ends = [torch.tensor(end, dtype=torch.long) for end in ends]
    with pytest.raises(ValueError, match=message):
        GroupMatrix.of(4, [Block(masses, dst, src)], *ends, torch.tensor(values))


def test_bad_problems_are_refused():
    matrix, nothing = MassAggregator(1).matrix(), torch.zeros(1)
    good = {"matrix": matrix, "outer": SumOuter(), "kappa": 2.0, "linear": nothing, "scale": 1.0}
    for change, error, message in (
        ({"matrix": torch.ones(2, 2)}, TypeError, "matrix must be what GroupMatrix.of .* got Tensor"),
        ({"outer": math.log}, TypeError, "outer must have methods value, slope and curvature; .* has no value"),
        ({"bound": 0.0}, ValueError, "bound must be positive, got 0.0"),
        ({"kappa": 0.0}, ValueError, "kappa must be finite and not zero, got 0.0"),
        ({"scale": math.nan}, ValueError, "scale must be positive and finite, got nan"),
        ({"linear": torch.zeros(2)}, ValueError, r"linear must have shape \(1,\)"),
        ({"linear": torch.tensor([math.nan])}, ValueError, "linear must be finite"),
        ({"offset": math.nan}, ValueError, "offset must be finite, got nan"),
        ({"outer": SumOuter}, TypeError, r"outer is an instance: pass SumOuter\(\), not SumOuter"),
    ):
        with pytest.raises(error, match=message):
            Problem(**{**good, **change})
    with pytest.raises(ValueError, match=r"z must have shape \(1,\), one for each group, got \(2,\)"):
        Problem(**good).at(np.zeros(2))
    for p in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"p must be positive and finite, got {p}"):
            LogOuter(p)
    with pytest.raises(ValueError, match="size must be at least 1, the fixed group, got 0"):
        GroupMatrix.of(0, [], torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0))
    with pytest.raises(TypeError, match=r"matrix must be what GroupMatrix.of .* got Tensor"):
        RangeProblem(torch.ones(2, 2))
    with pytest.raises(ValueError, match="num_groups must be at least 0, got -1"):
        MassAggregator(-1)
    with pytest.raises(ValueError, match="logarithms of sums only, not SumOuter"):
        solve_coordinate(Problem(**good))
    with pytest.raises(ValueError, match="unknown solver 'nwton'; known are 'newton', 'coordinate'"):
        solve(Problem(**good), "nwton")
    with pytest.raises(ValueError, match="'coordinate' cannot solve equal ranges"):
        solve(RangeProblem(matrix), "coordinate")
    with pytest.raises(TypeError, match="expected a Problem or a RangeProblem, got Tensor"):
        solve(nothing)


@pytest.mark.parametrize("z", [[1e6, 1e6], [0.0, math.nan], [-math.inf, 0.0]])
def test_no_value_is_given_where_exponentials_leave_the_range(z):
    """Both ends of the second element move alike, and ``inf · 0`` is no mass."""
    ends = torch.tensor([[1, 2], [0, 1]])
    problem = Problem(GroupMatrix.of(3, [], *ends, torch.tensor([1.0, 5.0])), SumOuter(), 1.0, torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"\|z\| must be at most 350 everywhere, got "):
        problem.at(torch.tensor(z))
    assert problem.at(torch.full((2,), 350.0)).value == pytest.approx(math.exp(350))


@pytest.mark.parametrize("solve", [solve_newton, solve_coordinate, RangeProblem.solve])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol must be positive, got 0.0"),
        ({"tol": math.nan}, "tol must be positive, got nan"),
        ({"max_iter": -1}, "max_iter must be an integer of at least 0, or None, got -1"),
        ({"max_iter": 2.5}, "max_iter must be an integer of at least 0, or None, got 2.5"),
    ],
)
def test_every_solver_refuses_limits_that_mean_nothing(solve, options, message):
    masses = MassAggregator(2)
    masses.add(torch.ones(3), torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2]))
    ranges = solve is RangeProblem.solve
    problem = RangeProblem(masses.matrix()) if ranges else Problem.path_conditioning(masses)
    with pytest.raises(ValueError, match=message):
        solve(problem, **options)
