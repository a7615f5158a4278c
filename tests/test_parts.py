"""Masses that are products of two vectors are those of their table, in whatever is done with them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagpath.solver import Block, GroupMatrix, LogOuter, MassAggregator, Problem, solve
from dagpath.solver.parts import Product, Table


def vectors(rng: np.random.Generator, *sizes: int) -> list[torch.Tensor]:
    return [torch.from_numpy(np.exp(rng.normal(size=size)) * (rng.random(size) < 0.8)) for size in sizes]


@settings(max_examples=60)
@given(st.integers(0, 2**31 - 1))
def test_products_collect_as_their_tables_do(seed):
    rng = np.random.default_rng(seed)
    groups, rows, columns = (int(rng.integers(low, 8)) for low in (1, 1, 1))
    left, right = vectors(rng, rows, columns)

    def ends(shapes: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, groups + 1, shapes[rng.integers(len(shapes))]))

    dst = ends([(rows, 1), (1, 1), (), (rows, columns)])
    src = ends([(1, columns), (columns,), (), (rows, columns)])
    products, tables = (MassAggregator(groups) for _ in range(2))
    products.add_product(left, right, dst, src)
    tables.add(left[:, None] * right, dst, src)
    every = torch.arange(1, groups + 1)  # so that no group is without masses on either side
    for one in (products, tables):
        one.add(torch.ones(groups), every, torch.tensor(0))
        one.add(torch.ones(groups), torch.tensor(0), every)
    assert products.num_live == tables.num_live
    assert torch.equal(products.balance, tables.balance)
    found, expected = (one.matrix().to_scipy().toarray() for one in (products, tables))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    solutions = [solve(Problem.path_conditioning(one)) for one in (products, tables)]
    np.testing.assert_allclose(solutions[0].z, solutions[1].z, rtol=0, atol=1e-8)
    assert solutions[0].objective[1] == pytest.approx(solutions[1].objective[1], rel=1e-12, abs=1e-9)


def test_parts_are_matrices():
    rng = np.random.default_rng(0)
    left, right, x, y = vectors(rng, 5, 7, 5, 7)
    product, table = Product(left, right), Table(left[:, None] * right)
    assert tuple(product.shape) == tuple(table.masses.shape)
    for one, other in [
        (product, table),
        (product.scaled(x, y, torch.float32), table.scaled(x, y, torch.float32)),
        (product.divided(3.0), table.divided(3.0)),
        (product.tempered(0.25), table.tempered(0.25)),
    ]:
        torch.testing.assert_close(one.table(), other.table())
        for found, expected in zip(
            one.products(x.numpy(), y.numpy()), other.products(x.numpy(), y.numpy()), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert one.log_range() == pytest.approx(other.log_range(), abs=1e-5)
    assert Product(torch.zeros(2).double(), right).log_range() == (np.inf, -np.inf)
    far = torch.tensor([1.0, 1e-200], dtype=torch.float64)
    assert Product(far, far).log_range() == pytest.approx((-400 * np.log(10), 0))
    with pytest.raises(ValueError, match=r"dst of shape \(3, 1\) does not broadcast to \(2, 2\)"):
        MassAggregator(3).add_product(far, far, torch.ones(3, 1).long(), torch.tensor(0))


def test_a_product_within_groups_stands_where_the_fixed_group_meets_itself():
    left, right = torch.tensor([2.0, 3.0]).double(), torch.tensor([5.0, 7.0]).double()
    ends = torch.tensor([1, 2])
    nothing = torch.zeros(0, dtype=torch.long)
    matrix = GroupMatrix.of(3, [Block(Product(left, right), ends, ends)], nothing, nothing, nothing.double())
    assert matrix.to_scipy().toarray().tolist() == [[31, 0, 0], [0, 0, 14], [0, 15, 0]]
    with pytest.raises(ValueError, match="block 0"):
        GroupMatrix.of(3, [Block(Product(-left, right), ends, ends)], nothing, nothing, nothing.double())


def test_a_large_table_is_multiplied_in_steps():
    rng = np.random.default_rng(0)
    masses = rng.random((3000, 700))
    x, y = rng.random(3000), rng.random(700)
    for found, expected in zip(Table(torch.from_numpy(masses)).products(x, y), (masses @ y, x @ masses), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_problem_of_products_alone_is_solved_at_once():
    rng = np.random.default_rng(0)
    widths, masses = (40, 30, 20), MassAggregator(90)
    start = 1
    for wide, narrow in itertools.pairwise(widths):
        columns = torch.arange(start, start + wide)
        rows = torch.arange(start + wide, start + wide + narrow)
        masses.add_product(*vectors(rng, narrow, wide), rows[:, None], columns)
        start += wide
    every = torch.arange(1, 91)
    masses.add(torch.ones(90), every, torch.tensor(0))
    masses.add(torch.ones(90), torch.tensor(0), every)
    solution = solve(Problem(masses.matrix(), LogOuter(1.0), -2.0, torch.zeros(90).double(), 1.0, 20.0))
    assert solution.converged
    assert solution.products == 0  # the separable model is the problem
