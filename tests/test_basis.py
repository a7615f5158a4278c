"""Basis paths: how many, independent, generating all paths; gradients and steps in path space."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_top_paths import paths_of
from torch import nn

import dagpath
from dagpath.paths.basis import BasisPaths, ElementOrder, basis_paths, choose_basis

from networks import BruteForce, Net, RandomNet

seeds = st.integers(0, 2**31 - 1)


def flat_numbers(net: nn.Module) -> dict[tuple, int]:
    """(parameter, index) -> number of the element."""
    found: dict[tuple, int] = {}
    for name, parameter in net.named_parameters():
        for index in np.ndindex(*parameter.shape):
            found[name, index] = len(found)
    return found


def decomposition(basis: BasisPaths, path: np.ndarray) -> np.ndarray:
    """``Σ_{e ∈ P} p_e − Σ q_γ`` of a path that counts elements."""
    matrix = basis.to_scipy().toarray()
    result = np.zeros(len(path))
    for element in np.flatnonzero(path):
        result += path[element] * matrix[:, basis.class_of[element]]
        group = int(basis.dst[element])
        if group:
            result -= path[element] * matrix[:, basis.group_class[group]]
    return result


def random_dag(seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Elements of a random DAG of hidden neurons 1 .. n, each between a source (0), hidden ones and a sink (0)."""
    rng = random.Random(seed)
    n = rng.randint(1, 7)
    edges = {(0, v) for v in range(1, n + 1) if rng.random() < 0.5} | {
        (v, 0) for v in range(1, n + 1) if rng.random() < 0.5
    }
    edges |= {(u, v) for u in range(1, n + 1) for v in range(u + 1, n + 1) if rng.random() < 0.5}
    for v in range(1, n + 1):  # each neuron is on a path
        if not any(w == v for _, w in edges):
            edges.add((rng.randint(0, v - 1), v))
        if not any(u == v for u, _ in edges):
            edges.add((v, 0))
    found = sorted(edges) + [(0, 0)] * rng.randint(0, 2)
    src, dst = torch.tensor(found, dtype=torch.int32).T
    return src.contiguous(), dst.contiguous(), n


def random_basis(seed: int) -> tuple[torch.Tensor, BasisPaths]:
    """Random values of the elements of a random DAG, and its basis paths."""
    src, dst, groups = random_dag(seed)
    entry = torch.where(dst > 0, dst, groups + 1).to(torch.int32)
    torch.manual_seed(seed)
    theta = torch.randn(len(src), dtype=torch.float64)
    return theta, choose_basis(ElementOrder(dst, src, entry, src, groups), theta)


def all_paths(src: torch.Tensor, dst: torch.Tensor) -> list[np.ndarray]:
    found = []

    def walk(node: int, path: list[int]) -> None:
        for element in np.flatnonzero(src.numpy() == node):
            if dst[element] == 0:
                found.append(np.bincount([*path, element], minlength=len(src)))
            else:
                walk(int(dst[element]), [*path, element])

    walk(0, [])
    return found


@settings(max_examples=300)
@given(seeds)
def test_basis_paths_of_a_random_dag_are_independent_and_make_every_path(seed):
    src, dst, groups = random_dag(seed)
    _, basis = random_basis(seed)
    matrix = basis.to_scipy().toarray()
    assert basis.num_paths == matrix.shape[1] == len(src) - groups
    assert np.linalg.matrix_rank(matrix) == basis.num_paths
    paths = all_paths(src, dst)
    assert {tuple(column) for column in matrix.T} <= {tuple(path) for path in paths}
    for path in paths:
        np.testing.assert_array_equal(decomposition(basis, path), path)


def exponents(basis: BasisPaths, path: np.ndarray) -> np.ndarray:
    """The path's value is the product of the basis paths' values to these powers."""
    found = np.zeros(basis.num_paths)
    for element in np.flatnonzero(path):
        found[basis.class_of[element]] += path[element]
        group = int(basis.dst[element])
        if group:
            found[basis.group_class[group]] -= path[element]
    return found


@settings(max_examples=200)
@given(seeds)
def test_the_chain_rule_and_the_ratios_of_all_paths_hold_on_random_dags(seed):
    src, dst, _ = random_dag(seed)
    theta, basis = random_basis(seed)
    paths = np.stack(all_paths(src, dst))
    powers = np.stack([exponents(basis, path) for path in paths])
    values = np.prod(theta.numpy() ** paths, axis=1)
    slopes = np.random.default_rng(seed).standard_normal(len(paths))  # L = Σ slope · value
    flows = torch.from_numpy((slopes * values) @ paths)
    np.testing.assert_allclose(basis.path_flows(flows).numpy(), (slopes * values) @ powers, rtol=1e-9, atol=1e-9)
    ratios = torch.rand(basis.num_paths, dtype=torch.float64) + 0.5
    moved = np.prod((theta * basis.multipliers(ratios)).numpy() ** paths, axis=1)
    np.testing.assert_allclose(moved, values * np.prod(ratios.numpy() ** powers, axis=1), rtol=1e-9, atol=0)


@settings(max_examples=60)
@given(seeds)
def test_basis_paths_of_a_random_network_make_every_path(seed):
    net = RandomNet(seed).double()
    assume(BruteForce.count(net) <= 1_000)
    number = flat_numbers(net)
    paths = [np.bincount([number[e] for e in elements], minlength=len(number)) for elements in paths_of(net)]
    basis = basis_paths(dagpath.trace(net, net.example()))
    on_paths = np.any(paths, axis=0)
    assert ((basis.class_of >= 0).numpy() == on_paths).all()
    matrix = basis.to_scipy().toarray()
    groups = int((basis.entering >= 0).sum())
    assert basis.num_paths == on_paths.sum() - groups
    assert np.linalg.matrix_rank(matrix) == basis.num_paths
    for path in paths:
        np.testing.assert_array_equal(decomposition(basis, path), path)
    values = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]).numpy()
    expected = [np.prod(values**column) for column in matrix.T]
    np.testing.assert_allclose((basis.signs * basis.log_values.exp()).numpy(), expected, rtol=1e-10)


def residual(m, x):
    y = F.relu(m.stem(x))
    y = F.relu(y + m.b(F.relu(m.a(y))))
    y = F.relu(m.skip(y) + m.d(F.relu(m.c(y))))
    return m.head(y.mean((2, 3)))


def residual_net(seed: int) -> nn.Module:
    """Convolutions with an identity skip, a projection skip and a batch norm."""
    torch.manual_seed(seed)
    sizes = {"a": (4, 3), "b": (3, 4), "c": (4, 3), "d": (3, 5)}
    layers = {name: nn.Conv2d(*size, 3, padding=1) for name, size in sizes.items()}
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    net = Net(residual, stem=stem, skip=nn.Conv2d(4, 5, 1), head=nn.Linear(5, 3), **layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
        stem[1].running_mean.normal_()
    return net.double().eval()


def loss_of(net: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64)
    return F.cross_entropy(net(x), torch.randint(3, (8,), generator=generator))


def flows(net: nn.Module) -> torch.Tensor:
    gradients = torch.autograd.grad(loss_of(net), list(net.parameters()))
    return torch.cat([(g * p).detach().reshape(-1) for g, p in zip(gradients, net.parameters(), strict=True)])


def multiply_(net: nn.Module, factors: torch.Tensor) -> None:
    with torch.no_grad():
        parts = factors.split([parameter.numel() for parameter in net.parameters()])
        for parameter, part in zip(net.parameters(), parts, strict=True):
            parameter.mul_(part.view_as(parameter))


def values_of(basis: BasisPaths, net: nn.Module) -> torch.Tensor:
    """The values of all basis paths at the parameters' current values, by the element-by-path matrix."""
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])
    matrix = torch.from_numpy(basis.to_scipy().toarray()).double()
    signs = torch.from_numpy(1.0 - 2.0 * ((theta < 0).double() @ matrix % 2).numpy())
    return signs * (theta.abs().log() @ matrix).exp()


def test_the_gradient_in_path_space_is_the_loss_slope():
    net = residual_net(0)
    basis = basis_paths(dagpath.trace(net, torch.zeros(1, 2, 5, 5, dtype=torch.float64)))
    y = basis.path_flows(flows(net))
    for path in torch.randperm(basis.num_paths, generator=torch.Generator().manual_seed(0))[:40].tolist():
        losses = []
        for change in (1e-5, -1e-5):
            ratios = torch.ones(basis.num_paths, dtype=torch.float64)
            ratios[path] += change
            moved = copy.deepcopy(net)
            multiply_(moved, basis.multipliers(ratios))
            losses.append(float(loss_of(moved).detach()))
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(y[path]), rel=1e-5, abs=1e-9)


def test_multipliers_realize_the_ratios_and_leave_the_entering_skeleton():
    net = residual_net(1)
    basis = basis_paths(dagpath.trace(net, torch.zeros(1, 2, 5, 5, dtype=torch.float64)))
    before = values_of(basis, net)
    torch.testing.assert_close(before, basis.signs * basis.log_values.exp())
    ratios = torch.rand(basis.num_paths, dtype=torch.float64) * 3 - 1
    factors = basis.multipliers(ratios)
    assert (factors[basis.entering[basis.entering >= 0]] == 1).all()
    multiply_(net, factors)
    torch.testing.assert_close(values_of(basis, net), before * ratios, rtol=1e-9, atol=0)


def test_networks_that_differ_by_a_rescaling_stay_equal_under_steps_in_path_space():
    net = residual_net(2)
    x = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    twin = copy.deepcopy(net)
    dagpath.random_rescaling(dagpath.trace(twin, x), 1.0, generator=torch.Generator().manual_seed(0)).apply_()
    bases = [basis_paths(dagpath.trace(model, x)) for model in (net, twin)]
    torch.testing.assert_close(bases[0].class_of, bases[1].class_of, rtol=0, atol=0)
    first = float(loss_of(net).detach())
    for _ in range(20):
        for model, basis in zip((net, twin), bases, strict=True):
            value, y = values_of(basis, model), basis.path_flows(flows(model))
            step = 0.05 / float((y / value.square()).abs().max())
            multiply_(model, basis.multipliers(1 - step * y / value.square()))
        torch.testing.assert_close(loss_of(twin), loss_of(net), rtol=1e-9, atol=0)
    assert float(loss_of(net).detach()) < first


def test_the_skeleton_enters_a_residual_stream_at_its_stem_and_leaves_it_at_its_head():
    stream = Net(lambda m, y: F.relu(y + m.b(F.relu(m.a(y)))), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    net = Net(lambda m, x: m.head(m.stream(m.stem(x))), stem=nn.Linear(2, 3), stream=stream, head=nn.Linear(3, 1))
    traced = dagpath.trace(net, torch.zeros(1, 2))
    basis = basis_paths(traced)
    owner = np.repeat(list(traced.graph.shapes), [shape.numel() for shape in traced.graph.shapes.values()])
    groups = torch.unique(traced.graph.ends["stem.bias"].dst)
    assert all(owner[element].startswith("stem.") for element in basis.entering[groups])
    assert all(owner[element] == "head.weight" for element in basis.leaving[groups])
    inner = torch.unique(traced.graph.ends["stream.a.bias"].dst)
    assert all(owner[element].startswith("stream.a.") for element in basis.entering[inner])


def test_layers_that_nothing_reads_are_on_no_basis_path():
    net = Net(
        lambda m, x: (m.unread(x), m.head(F.relu(m.a(x))))[1],
        a=nn.Linear(2, 3),
        head=nn.Linear(3, 1),
        unread=nn.Linear(2, 2),
    )
    basis = basis_paths(dagpath.trace(net, torch.zeros(1, 2)))
    assert basis.num_paths == 13 - 3
    assert basis.class_of[-6:].tolist() == [-1] * 6
    assert basis.multipliers(torch.full((10,), 2.0))[-6:].tolist() == [1.0] * 6
