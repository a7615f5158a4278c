"""Masses in every form, aggregated, in blocks and sparse, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath
from dagpath.solver import Block, GroupMatrix, MassAggregator, Problem, SumOuter, solve_coordinate, solve_newton
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


def test_an_incidence_matrix_that_is_not_sparse_is_refused():
    with pytest.raises(ValueError, match="must be 2-D sparse CSR"):
        Problem.from_incidence(torch.eye(2), torch.ones(2))


def test_masses_of_a_parameter_that_requires_a_gradient():
    aggregator = MassAggregator(1)
    aggregator.add(nn.Parameter(torch.ones(2)), torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert solve_newton(Problem.path_conditioning(aggregator)).converged


def test_groups_out_of_range_are_refused():
    with pytest.raises(ValueError, match="groups must be integers"):
        MassAggregator(2).add(torch.ones(3), torch.zeros(3), torch.tensor(0))
    with pytest.raises(ValueError, match="groups must lie between 0 and 2"):
        MassAggregator(2).add(torch.ones(3), torch.tensor([0, 1, 3]), torch.tensor(0))
    with pytest.raises(ValueError, match="broadcast"):
        MassAggregator(2).add(torch.ones(3), torch.tensor([0, 1]), torch.tensor(0))


@pytest.mark.parametrize(
    ("block", "entries", "message"),
    [
        (([[1.0, -2.0]], [1], [2, 3]), ([], [], []), "block 0: masses must be finite and at least 0"),
        (([[1.0, math.nan]], [1], [2, 3]), ([], [], []), "block 0: masses must be finite and at least 0"),
        (([[1.0, 2.0]], [1], [2]), ([], [], []), r"block 0 have masses of shape \(1, 2\)"),
        (([[1.0, 2.0]], [1], [2, 4]), ([], [], []), "block 0: groups must lie between 0 and 3"),
        (([[1.0, 2.0]], [1], [2, 2]), ([], [], []), "names a group twice"),
        (([[1.0]], [1], [2]), ([1.0], [-1], [0]), "the entries: groups must lie between 0 and 3"),
        (([[1.0]], [1], [2]), ([1.0, 2.0], [1], [0]), "the entries have masses of shape"),
        (([[1.0]], [1], [2]), ([1.0, 2.0], [1, 1], [0, 0]), "a pair of groups twice"),
    ],
)
def test_bad_blocks_and_entries_are_refused(block, entries, message):
    masses, dst, src = (torch.tensor(part) for part in block)
    values, *ends = entries
    ends = [torch.tensor(end, dtype=torch.long) for end in ends]
    with pytest.raises(ValueError, match=message):
        GroupMatrix.of(4, [Block(masses, dst, src)], *ends, torch.tensor(values))


def test_bad_numbers_are_refused():
    for bad in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"masses must be finite and at least 0, .* got {bad}"):
            MassAggregator(1).add(torch.tensor([1.0, bad]), torch.tensor(1), torch.tensor(0))
    with pytest.raises(ValueError, match="bound must be positive"):
        Problem.path_conditioning(MassAggregator(1), bound=0.0)
    general = Problem(MassAggregator(1).matrix(), SumOuter(), 2.0, torch.zeros(1, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="path-conditioning criterion only"):
        solve_coordinate(general)
