"""Criteria: their numbers against autograd, and what their minima promise."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath
from dagpath.solver import (
    Block,
    GroupMatrix,
    LogOuter,
    MassAggregator,
    Problem,
    SumOuter,
    solve_newton,
)
from dagpath.solver.newton import NewtonSystem
from dagpath.solver.preconditioner import SeparableHessian

from networks import RandomNet

seeds = st.integers(0, 2**31 - 1)
BOUND = 20 * math.log(2)


def mlp(*widths):
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def written_out(criterion, traced):
    """The criterion as a function of z, parameter element by element, as it stands in the papers."""
    exponents = {}
    for name, ends in traced.graph.ends.items():
        exponents[name] = (ends.dst.expand(traced.graph.shapes[name]), ends.src.expand(traced.graph.shapes[name]))
    parameters = {name: p.detach().double() for name, p in traced.model.named_parameters()}
    gram = dagpath.gram_diagonal(traced)

    def function(z):
        padded = torch.cat([z.new_zeros(1), z])
        total, linear, p = 0.0, 0.0, 0
        for name, (dst, src) in exponents.items():
            moved = padded[dst] - padded[src]
            if isinstance(criterion, dagpath.EquiNorm):
                total = total + (parameters[name].abs() * moved.exp()).pow(criterion.p).sum()
            else:
                g = gram[name] / (1.0 if criterion.reference is None else criterion.reference[name])
                live = g > 0
                total = total + (g * (-2 * moved).exp())[live].sum()
                linear = linear + 2 * moved[live].sum()
                p += int(live.sum())
        return total.log() if isinstance(criterion, dagpath.EquiNorm) else p * total.log() + linear

    return function


@settings(max_examples=10)
@given(seeds, st.sampled_from(["none", "numbers", "tensors", 1.0, 2.0, 3.5]))
def test_value_gradient_and_hessian_product_are_those_of_autograd(seed, kind):
    net = RandomNet(seed).double()
    traced = dagpath.trace(net, net.example())
    generator = torch.Generator().manual_seed(seed)
    if isinstance(kind, float):
        criterion = dagpath.EquiNorm(kind)
    else:
        reference = {
            "none": None,
            "numbers": {name: 1.0 + len(name) for name in traced.graph.shapes},
            "tensors": {
                name: torch.rand(shape, generator=generator) + 0.5 for name, shape in traced.graph.shapes.items()
            },
        }[kind]
        criterion = dagpath.PathConditioning(reference)
    problem = criterion.problem(traced, BOUND, torch.device("cpu"))
    if not problem.num_groups or not problem.live:
        return
    z, v = torch.randn(2, problem.num_groups, dtype=torch.float64, generator=generator) / 2
    function, point = written_out(criterion, traced), problem.at(z)
    assert point.value == pytest.approx(float(function(z)), rel=1e-10, abs=1e-10)
    kept = point.rows[1:] + point.columns[1:] > 0  # equal norms fix the groups that lack a side
    gradient = torch.autograd.functional.jacobian(function, z).numpy()
    np.testing.assert_allclose(point.gradient[kept], gradient[kept], rtol=1e-8, atol=1e-8 * problem.scale)

    model = SeparableHessian(point)
    scale = model.scale[1:]
    took_part = torch.from_numpy(scale > 0)
    _, product = torch.autograd.functional.hvp(function, z, v * took_part)
    slope = problem.outer.slope(point.total)
    found = NewtonSystem(point, torch.float64).product(model)(
        np.append(0.0, np.divide(v.numpy(), scale, out=np.zeros_like(scale), where=scale > 0))
    )[1:]
    expected = product.numpy() * scale / (problem.kappa**2 * slope) + model.damping[1:] * scale * v.numpy()
    np.testing.assert_allclose(found[scale > 0], expected[scale > 0], rtol=1e-7, atol=1e-7 * np.abs(expected).max())


@settings(max_examples=10)
@given(seeds)
def test_the_separable_model_agrees_where_it_was_made_and_its_hessian_is_inverted_exactly(seed):
    rng = np.random.default_rng(seed)
    aggregator = MassAggregator(12)
    a, b, c = np.arange(1, 5), np.arange(5, 9), np.arange(9, 13)
    for dst, src in ((a, np.zeros(3, int)), (b, a), (c, b), (np.zeros(2, int), c)):
        masses = torch.from_numpy(np.exp(rng.normal(0, 2, (len(dst), len(src)))))
        aggregator.add(masses, torch.from_numpy(dst[:, None]), torch.from_numpy(src[None, :]))
    aggregator.add(torch.from_numpy(np.exp(rng.normal(0, 2, 4))), torch.from_numpy(a), torch.from_numpy(a))
    point = Problem.path_conditioning(aggregator).at(rng.normal(0, 1, 12))
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
    every, fixed = np.arange(1, 9), np.zeros(8, int)
    dst, src = (
        np.concatenate([every, fixed, rng.integers(0, 9, 20)]),
        np.concatenate([fixed, every, rng.integers(0, 9, 20)]),
    )
    aggregator = MassAggregator(8)
    aggregator.add(torch.from_numpy(np.exp(rng.normal(0, 3, len(dst)))), torch.from_numpy(dst), torch.from_numpy(src))
    point = Problem.path_conditioning(aggregator).at(rng.normal(0, 1, 8))
    model = SeparableHessian(point)
    dense = np.stack([NewtonSystem(point, torch.float64).product(model)(unit) for unit in np.eye(9)[1:]], 1)[1:]
    inverse = np.stack([model.precondition(unit) for unit in np.eye(9)[1:]], 1)[1:]
    eigenvalues = np.linalg.eigvals(inverse @ dense).real
    assert eigenvalues.min() > 0
    assert eigenvalues.max() <= 1 + 1e-6


@settings(max_examples=10)
@given(seeds, st.sampled_from([1.0, 2.0, 4.0]))
def test_equal_norms_are_equal_on_both_sides_of_every_group(seed, p):
    net = RandomNet(seed, max_convolutions=6).double()
    x = net.example(2)
    with torch.no_grad():
        before = net(x)
        rescaling = dagpath.rescale_(net, x, dagpath.EquiNorm(p))
        after = net(x)
    assert rescaling.converged
    assert float((after - before).abs().max()) <= 1e-10 * float(before.abs().max())
    graph = rescaling.traced.graph
    into, out_of = torch.zeros(2, graph.num_groups + 1, dtype=torch.float64)
    for name, parameter in net.named_parameters():
        dst, src = (end.expand(parameter.shape) for end in (graph.ends[name].dst, graph.ends[name].src))
        masses = parameter.detach().abs().pow(p) * (dst != src)
        into.index_add_(0, dst.flatten(), masses.flatten())
        out_of.index_add_(0, src.flatten(), masses.flatten())
    both = (into > 0) & (out_of > 0) & (torch.cat([torch.ones(1), rescaling.log_scales]).abs() < BOUND)
    both[0] = False
    torch.testing.assert_close(into[both], out_of[both], rtol=1e-6, atol=1e-9 * float(into.sum() + 1))
    total = sum(float(parameter.detach().abs().pow(p).sum()) for parameter in net.parameters())
    assert rescaling.objective[1] == pytest.approx(math.log(total), abs=1e-9)


class Residual(nn.Module):
    """A residual stream whose head is zero: nothing leaves it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.bs = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.cs = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = torch.relu(self.a(x))
        for b, c in zip(self.bs, self.cs, strict=True):
            x = x + torch.relu(c(torch.relu(b(x))))
        return self.head(x)


@pytest.mark.parametrize("criterion", ["equinorm", "range"])
@pytest.mark.parametrize("seed", range(5))
def test_what_leads_to_no_output_is_not_shrunk_without_end(criterion, seed):
    rescaling = dagpath.balance(dagpath.trace(Residual(seed), torch.zeros(1, 4)), criterion)
    assert rescaling.converged
    assert rescaling.log_scales.tolist() == [0] * 24


@pytest.mark.parametrize("criterion", ["equinorm", "range"])
def test_groups_that_lack_a_side_keep_their_scale(criterion):
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 3)
    with torch.no_grad():
        net[2].weight[:, 1] = 0  # nothing leaves the second neuron of the first layer
    traced = dagpath.trace(net, torch.zeros(1, 4))
    rescaling = dagpath.balance(traced, criterion)
    assert rescaling.converged
    assert rescaling.log_scales[1] == 0
    assert (rescaling.log_scales[[0, *range(2, 11)]] != 0).all()
    nn.init.zeros_(net[4].weight)
    assert dagpath.balance(traced, criterion).log_scales.tolist() == [0] * 11


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_a_network_of_zeros_is_left_alone(criterion):
    net = mlp(3, 4, 2)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 3)), criterion)
    assert rescaling.converged
    assert rescaling.log_scales.tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_the_type_of_the_parameters_does_not_matter(criterion, dtype):
    torch.manual_seed(0)
    net = mlp(8, 16, 12, 4).to(dtype)
    exact = mlp(8, 16, 12, 4).double()
    exact.load_state_dict(net.state_dict())
    scales = [
        dagpath.balance(dagpath.trace(model, torch.zeros(1, 8, dtype=kind)), criterion).log_scales
        for model, kind in ((net, dtype), (exact, torch.float64))
    ]
    torch.testing.assert_close(*scales, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (dagpath.EquiNorm(0.5), "p must be at least 1"),
        (dagpath.EquiNorm(math.inf), "p must be at least 1"),
        (dagpath.PathConditioning({}), "no entry for '0.weight'"),
        (
            dagpath.PathConditioning({"0.weight": 0.0, "0.bias": 1.0, "2.weight": 1.0, "2.bias": 1.0}),
            "must be positive",
        ),
        ("ranges", "unknown criterion 'ranges'"),
    ],
)
def test_bad_criteria_are_refused(criterion, message):
    traced = dagpath.trace(mlp(3, 4, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=message):
        dagpath.balance(traced, criterion)


@pytest.mark.parametrize("criterion", ["equinorm", "range"])
def test_coordinate_descent_is_for_path_conditioning_only(criterion):
    traced = dagpath.trace(mlp(3, 4, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="newton"):
        dagpath.balance(traced, criterion, solver="coordinate")


# ---------------------------------------------------------------------------------------------- sparse problems


@settings(max_examples=15)
@given(seeds)
def test_the_sparse_form_and_the_blocks_give_the_same_answer(seed):
    net = RandomNet(seed).double()
    traced = dagpath.trace(net, net.example())
    gram = dagpath.gram_diagonal(traced)
    masses = torch.cat([gram[name].flatten() for name in traced.graph.shapes])
    sparse = Problem.from_incidence(traced.graph.incidence(), masses)
    blocks = dagpath.PathConditioning().problem(traced, BOUND, torch.device("cpu"))
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


def test_a_group_without_mass_goes_where_the_linear_term_takes_it():
    linear = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    solution = solve_newton(Problem(MassAggregator(3).matrix(), SumOuter(), 1.0, linear, 1.0, bound=2.0))
    assert solution.converged
    assert solution.z.tolist() == [-2.0, 2.0, 0.0]


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


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_the_size_of_all_masses_does_not_matter(size):
    factors = []
    for unit in (1.0, size):
        aggregator = MassAggregator(2)
        masses = unit * torch.tensor([2.0, 9.0, 5.0], dtype=torch.float64)
        aggregator.add(masses, torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2]))
        solution = solve_newton(Problem.path_conditioning(aggregator))
        assert solution.converged
        factors.append(solution.z)
    torch.testing.assert_close(*factors, rtol=0, atol=1e-8)


def test_a_tiny_neuron_is_balanced_too():
    torch.manual_seed(0)
    net = mlp(4, 6, 2).double()
    with torch.no_grad():
        net[0].weight[0] *= 1e-9
        net[0].bias[0] *= 1e-9
        net[2].weight[:, 0] *= 1e-5
    dagpath.balance(dagpath.trace(net, torch.zeros(1, 4).double()), dagpath.EquiNorm(4)).apply_()
    into = net[0].weight[0].pow(4).sum() + net[0].bias[0].pow(4)
    torch.testing.assert_close(into, net[2].weight[:, 0].pow(4).sum(), rtol=1e-6, atol=0)


def test_groups_that_touch_nothing_fixed_still_converge():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = int(rng.integers(2, 10))
        ends = torch.arange(1, groups + 1)
        aggregator = MassAggregator(groups)
        aggregator.add(torch.from_numpy(np.exp(rng.uniform(-2, 2, (groups, groups)))), ends[:, None], ends[None, :])
        assert solve_newton(Problem.path_conditioning(aggregator)).converged


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
    for name, value in (("linear", torch.zeros(2)), ("kappa", 0.0), ("scale", 0.0)):
        with pytest.raises(ValueError, match=name):
            replace(problem, **{name: value})


# ---------------------------------------------------------------------------------------------- coordinate descent


def test_batches_of_groups_leave_the_iterates_of_coordinate_descent_as_they_are():
    torch.manual_seed(0)
    traced = dagpath.trace(mlp(5, 7, 6, 4).double(), torch.zeros(1, 5, dtype=torch.float64))
    gram = dagpath.gram_diagonal(traced)
    p = sum(masses.numel() for masses in gram.values())
    with pytest.warns(UserWarning, match="coordinate solver stopped after 3 iterations"):
        found = dagpath.balance(traced, solver="coordinate", max_iter=3)
    z = torch.zeros(14, dtype=torch.float64)
    function = written_out(dagpath.PathConditioning(), traced)
    for _ in range(3):
        for group in range(13):

            def along(value, group=group):
                moved = z[:13].clone()
                moved[group] = value
                return function(moved)

            low, high = -10.0, 10.0
            for _ in range(100):  # golden section, on a convex function of one variable
                a, b = low + 0.382 * (high - low), high - 0.382 * (high - low)
                low, high = (low, b) if along(a) < along(b) else (a, high)
            z[group] = (low + high) / 2
    assert p == found.live
    torch.testing.assert_close(found.log_scales, z[:13], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- rescalings


def test_rescalings_compose():
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 2).double()
    traced = dagpath.trace(net, torch.zeros(1, 4, dtype=torch.float64))
    a, b = dagpath.random_rescaling(traced), dagpath.random_rescaling(traced)
    expected = [parameter.detach().clone() for parameter in net.parameters()]
    (a @ b).apply_()
    together = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter, value in zip(net.parameters(), expected, strict=True):
        parameter.data.copy_(value)
    b.apply_()
    a.apply_()
    for parameter, value in zip(net.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=0)
    assert torch.equal((a @ a.inverse()).log_scales, torch.zeros(11, dtype=torch.float64))
    for other in (mlp(4, 6, 2), mlp(4, 5, 6, 2), mlp(4, 11, 2)):  # the last two have as many groups
        with pytest.raises(ValueError, match="different neuron graphs"):
            a @ dagpath.random_rescaling(dagpath.trace(other, torch.zeros(1, 4)))
    with pytest.raises(TypeError):
        a @ 2


def test_rescalings_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 2)
    traced = dagpath.trace(net, torch.zeros(1, 4))
    for rescaling in (dagpath.balance(traced, power_of_two=True), dagpath.random_rescaling(traced)):
        path = tmp_path / "rescaling.safetensors"
        rescaling.save(path)
        loaded = dagpath.Rescaling.load(path, traced)
        assert torch.equal(loaded.log_scales, rescaling.log_scales)
        assert loaded.summary(layers=True) == rescaling.summary(layers=True)
        assert loaded.power_of_two == rescaling.power_of_two
    for other in (mlp(4, 7, 5, 2), mlp(4, 5, 6, 2), mlp(4, 11, 2)):
        with pytest.raises(ValueError, match="another neuron graph"):
            dagpath.Rescaling.load(path, dagpath.trace(other, torch.zeros(1, 4)))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no rescaling"):
        dagpath.Rescaling.load(path, traced)


def test_the_summary_by_layers_has_a_row_for_each_layer_with_free_neurons():
    torch.manual_seed(0)
    rescaling = dagpath.balance(dagpath.trace(mlp(4, 6, 5, 2), torch.zeros(1, 4)))
    rows = rescaling.summary(layers=True).split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["0", "2"]
    z = rescaling.log_scales[:6]
    assert f"{float(z.exp().max()):.4g}" in rows[2]
    assert f"{float(z.std(correction=0)):.3f}" in rows[2]


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
