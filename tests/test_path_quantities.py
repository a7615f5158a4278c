"""Counts, lengths, the Gram operator, expectations and distances, against brute force over explicit paths."""

import copy
import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dagpath

from networks import CONSTANT, BruteForce, Net, RandomNet, ScalarGraph

SEEDS = range(12)


def traced_net(seed: int, **options) -> tuple[RandomNet, dagpath.TracedModel]:
    net = RandomNet(seed, **options).double()
    return net, dagpath.trace(net, torch.zeros(1, *net.input_shape, dtype=torch.float64))


def rescaled(traced: dagpath.TracedModel, seed: int = 0) -> None:
    dagpath.random_rescaling(traced, 1.0, generator=torch.Generator().manual_seed(seed)).apply_()


def small_mlp(*sizes: int, seed: int = 0) -> dagpath.TracedModel:
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return dagpath.trace(nn.Sequential(*layers[:-1]).double(), torch.zeros(1, sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_paths_are_counted_exactly_and_by_length(seed):
    net, traced = traced_net(seed)
    expected = BruteForce.count(net)
    assert dagpath.path_count(traced) == expected
    assert dagpath.path_count(traced, log=True) == pytest.approx(math.log(expected), rel=1e-12)
    profile = dagpath.path_length_profile(traced)
    assert sum(profile.values()) == expected
    assert all(isinstance(count, int) and count > 0 for count in profile.values())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert dagpath.path_count(traced) == expected  # a parameter is an edge whatever its value


def test_path_counts_of_a_chain_are_products_of_its_widths():
    widths = (7, 50, 60, 70, 3)
    by_length = {
        len(widths) - 1 - start: math.prod(widths[start + 1 :]) + (math.prod(widths) if start == 0 else 0)
        for start in range(len(widths) - 1)
    }
    traced = small_mlp(*widths)
    assert dagpath.path_length_profile(traced) == dict(sorted(by_length.items()))
    assert dagpath.path_count(traced) == sum(by_length.values())


def test_a_deep_chain_has_a_count_of_hundreds_of_digits():
    depth, width = 200, 16
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    traced = dagpath.trace(nn.Sequential(*layers), torch.zeros(1, width))
    assert dagpath.path_count(traced) == width ** (depth + 1)
    assert dagpath.path_count(traced, log=True) == pytest.approx((depth + 1) * math.log(width), rel=1e-12)


def test_the_length_profile_of_a_residual_network_is_binomial():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(10))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + torch.relu(block(x))
            return x

    traced = dagpath.trace(Residual(), torch.zeros(1, 1))
    assert dagpath.path_length_profile(traced) == {length: math.comb(10, length) for length in range(11)}


class PathLengths(BruteForce):
    """Every path by brute force, with the number of linear layers that it crosses."""

    def __init__(self, net: RandomNet) -> None:
        self.linear = {
            f"layers.{index}."
            for index, layer in enumerate(net.layers)
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))
        }
        self.lengths: list[int] = []
        super().__init__(net)

    def _finish(self, edges: list) -> None:
        super()._finish(edges)
        names = [{name for name, _ in terms} for _, terms in edges]
        self.lengths.append(sum(any(name.rsplit(".", 1)[0] + "." in self.linear for name in found) for found in names))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_the_masses_of_lengths_are_those_of_explicit_paths(seed, p):
    net, traced = traced_net(seed)
    brute = PathLengths(net)
    masses = np.abs(brute.values) ** p
    expected = {
        length: masses[np.array(brute.lengths) == length].sum() / masses.sum() for length in sorted(set(brute.lengths))
    }
    for _ in range(2):
        shares = dagpath.path_length_profile(traced, p)
        assert shares == pytest.approx(
            {k: v for k, v in expected.items() if v > 0 or k in shares}, rel=1e-11, abs=1e-15
        )
        assert sum(shares.values()) == pytest.approx(1)
        rescaled(traced)
    counts = {length: brute.lengths.count(length) for length in sorted(set(brute.lengths))}
    assert dagpath.path_length_profile(traced) == counts


@pytest.mark.parametrize("seed", SEEDS)
def test_norms_per_output_are_those_of_the_paths_that_end_there(seed):
    net, traced = traced_net(seed)
    graph = ScalarGraph(net)
    mass: dict[int, float] = {CONSTANT: 1.0, **dict.fromkeys(graph.inputs, 1.0)}
    for v in sorted(graph.into):
        mass[v] = sum(mass.get(u, 0.0) * abs(value) for u, value, _ in graph.into[v])
    norms = dagpath.path_norm(traced, 1, per_output=True)
    expected = torch.tensor([mass.get(v, 0.0) for v in graph.outputs], dtype=torch.float64)
    torch.testing.assert_close(norms.reshape(-1), expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(dagpath.path_norm(traced, 1, log=True, per_output=True), norms.log())
    assert dagpath.path_norm(traced) == pytest.approx(float(norms.sum()))
    rescaled(traced)
    torch.testing.assert_close(dagpath.path_norm(traced, 1, per_output=True), norms, rtol=1e-10, atol=0)


def jacobian(net: RandomNet) -> tuple[np.ndarray, np.ndarray]:
    """Path values and their derivatives with respect to all parameters, by brute force."""
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    rows: list[np.ndarray] = []

    class Collect(BruteForce):
        def _finish(self, edges: list) -> None:
            self.values.append(float(np.prod([value for value, _ in edges])))
            row = np.zeros(sum(sizes.values()))
            for position, (_, terms) in enumerate(edges):
                others = np.prod([value for index, (value, _) in enumerate(edges) if index != position])
                for (name, index), derivative in terms.items():
                    row[starts[name] + np.ravel_multi_index(index, shapes[name])] += derivative * others
            rows.append(row)

    return np.array(Collect(net).values), np.array(rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gram_operator_is_the_product_of_explicit_jacobians(seed):
    net, traced = traced_net(seed)
    _, J = jacobian(net)
    expected = torch.from_numpy(J.T @ J)
    G = dagpath.gram(traced)
    dense = G.to_dense()
    torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    torch.testing.assert_close(G.diagonal(), dense.diagonal())
    assert G.trace() == pytest.approx(float(expected.trace()))
    torch.testing.assert_close(G.to_sparse().to_dense(), dense)
    v = torch.randn(G.shape[0], 3, dtype=torch.float64)
    torch.testing.assert_close(G @ v, dense @ v)
    torch.testing.assert_close(G @ v[:, 0], dense @ v[:, 0])
    torch.testing.assert_close(torch.from_numpy(G @ v.numpy()), dense @ v)
    torch.testing.assert_close(torch.from_numpy(G.T.matvec(v[:, 1].numpy())), dense @ v[:, 1])
    values = np.linalg.eigvalsh(expected.numpy())
    np.testing.assert_allclose(G.eigvalsh(), values, atol=1e-10 * values[-1])
    if G.shape[0] > 3:
        np.testing.assert_allclose(G.eigvalsh(2), values[-2:], rtol=1e-8)


def test_the_gram_operator_follows_a_rescaling():
    _, traced = traced_net(3)
    before = dagpath.gram(traced).to_dense()
    rescaling = dagpath.random_rescaling(traced, 1.0, generator=torch.Generator().manual_seed(1))
    rescaling.apply_()
    multipliers = rescaling.multipliers()
    shapes = {name: p.shape for name, p in traced.model.named_parameters()}
    d = torch.cat([multipliers[name].expand(shape).reshape(-1) for name, shape in shapes.items()]).double()
    torch.testing.assert_close(dagpath.gram(traced).to_dense(), before / d[:, None] / d[None, :])


def test_the_condition_number_leaves_out_what_a_rescaling_can_reach():
    traced = small_mlp(3, 4, 4, 2)
    values = dagpath.gram(traced).eigvalsh()
    live = traced.graph.num_parameters - traced.graph.num_groups
    assert dagpath.gram(traced).condition_number() == pytest.approx(values[-1] / values[-live], rel=1e-6)
    with torch.no_grad():
        for parameter in traced.model.parameters():
            parameter.zero_()
    assert dagpath.gram(small_mlp(2, 2)).condition_number() >= 1


def test_a_weight_that_a_path_meets_twice_is_exact_in_the_operator():
    torch.manual_seed(0)
    layer = nn.Linear(1, 1, bias=False)
    net = nn.Sequential(layer, nn.ReLU(), layer).double()
    traced = dagpath.trace(net, torch.zeros(1, 1, dtype=torch.float64))
    w = float(layer.weight.detach())  # one path of value w², whose derivative is 2w
    assert float(dagpath.gram(traced).to_dense()) == pytest.approx(4 * w * w)
    assert float(dagpath.gram(traced).diagonal()) == pytest.approx(4 * w * w)


def test_a_parameter_without_elements_has_no_rows_in_the_operator():
    layers = {"first": nn.Linear(2, 3), "last": nn.Linear(3, 1)}
    with_empty = Net(lambda m, x: m.last(torch.relu(m.first(x))) + x[:, :0] @ m.empty, **layers, empty=torch.ones(0, 1))
    without = Net(lambda m, x: m.last(torch.relu(m.first(x))), **layers)
    G, expected = (dagpath.gram(dagpath.trace(net, torch.zeros(1, 2))) for net in (with_empty, without))
    torch.testing.assert_close(G.to_dense(), expected.to_dense())
    torch.testing.assert_close(G @ torch.ones(13), expected @ torch.ones(13))


def test_eigenvalues_and_dense_matrices_of_wrong_sizes_are_refused():
    G = dagpath.gram(small_mlp(2, 3, 1))
    for k in (0, -1, 13):
        with pytest.raises(ValueError, match=str(k)):
            G.eigvalsh(k)
    with pytest.raises(ValueError, match=r"13 rows"):
        G @ torch.zeros(12)
    with pytest.raises(ValueError, match=r"24,963"):
        dagpath.gram(small_mlp(100, 240, 3)).to_dense()


@pytest.mark.parametrize("seed", range(6))
def test_the_expected_gram_diagonal_is_that_of_the_moments(seed):
    _, traced = traced_net(seed)
    for buffer_name, buffer in traced.model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.zero_()
    squares = {name: p.detach().square() for name, p in traced.model.named_parameters()}
    expected = dagpath.expected_gram_diagonal(traced, squares)
    for name, values in dagpath.gram_diagonal(traced).items():
        torch.testing.assert_close(expected[name], values, rtol=1e-11, atol=0)


def test_the_expected_gram_diagonal_is_the_mean_of_sampled_networks():
    traced = small_mlp(3, 4, 2)
    deviations = {"0.weight": 0.5, "0.bias": 0.3, "2.weight": 1.2, "2.bias": 0.1}
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Tensor] = {}
    draws = 4000
    for _ in range(draws):
        with torch.no_grad():
            for name, parameter in traced.model.named_parameters():
                parameter.copy_(deviations[name] * torch.randn(parameter.shape, generator=generator))
        for name, values in dagpath.gram_diagonal(traced).items():
            sums[name] = sums.get(name, 0) + values
    expected = dagpath.expected_gram_diagonal(traced, {name: std**2 for name, std in deviations.items()})
    for name, values in expected.items():
        assert torch.allclose(sums[name] / draws, values, rtol=0.1)
        assert float((sums[name] / draws).mean()) == pytest.approx(float(values.mean()), rel=0.03)


@pytest.mark.parametrize(
    ("moments", "match"),
    [
        ({"0.weight": 1.0}, "0.bias"),
        ({"0.weight": -1.0, "0.bias": 1.0}, "-1.0"),
        ({"0.weight": torch.ones(3), "0.bias": 1.0}, r"\(3,\)"),
        ({"0.weight": 1.0, "0.bias": float("nan")}, "nan"),
        ({"0.weight": 1.0, "0.bias": torch.tensor([1.0, math.inf])}, "got inf"),
        ({"0.weight": 1.0, "0.bias": 1.0, "typo": 1.0}, "typo"),
    ],
)
def test_wrong_moments_are_refused(moments, match):
    traced = dagpath.trace(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=match):
        dagpath.expected_gram_diagonal(traced, moments)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_path_metric_is_the_distance_of_explicit_paths(seed):
    net, traced = traced_net(seed)
    other = copy.deepcopy(net)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
                tensor.mul_(torch.where(torch.rand_like(tensor) < 0.2, -1, 1) if tensor.requires_grad else 1)
    traced_other = dagpath.trace(other, torch.zeros(1, *net.input_shape, dtype=torch.float64))
    a, b = (np.array(BruteForce(model).values) for model in (net, other))
    expected = np.linalg.norm(a - b)
    assert dagpath.path_metric(traced, traced_other) == pytest.approx(expected, rel=1e-8)
    assert dagpath.path_metric(traced_other, traced, log=True) == pytest.approx(math.log(expected), abs=1e-8)
    rescaled(traced)
    assert dagpath.path_metric(traced, traced_other) == pytest.approx(expected, rel=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert dagpath.path_metric(traced, traced_other, p=1) >= np.abs(a - b).sum() * (1 - 1e-12)


def test_the_distance_in_the_1_norm_is_exact_where_one_network_dominates():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    larger, mixed = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for p, q in zip(larger.parameters(), mixed.parameters(), strict=True):
            p.mul_(1 + torch.rand_like(p))
            q.mul_(0.5 + torch.rand_like(q))
    a, b, c = (dagpath.trace(model, torch.zeros(1, 2, dtype=torch.float64)) for model in (net, larger, mixed))

    def paths(model: nn.Module) -> Tensor:
        w, bias, v, last = (p.detach() for p in model.parameters())
        return torch.cat([(v.t() * w).flatten(), (v[0] * bias), last])

    exact = float((paths(net) - paths(larger)).abs().sum())
    assert dagpath.path_metric(a, b, p=1) == pytest.approx(exact)
    assert dagpath.path_metric(b, a, p=1) == pytest.approx(exact)
    with pytest.warns(UserWarning, match="upper bound"):
        bound = dagpath.path_metric(a, c, p=1)
    assert float((paths(net) - paths(mixed)).abs().sum()) <= bound <= dagpath.path_norm(a) + dagpath.path_norm(c)
    with pytest.raises(ValueError, match="got 3"):
        dagpath.path_metric(a, b, p=3)
    with pytest.raises(ValueError, match="architectures"):
        dagpath.path_metric(a, small_mlp(2, 4, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mass_through_a_neuron_is_that_of_the_paths_that_cross_it(seed):
    net, traced = traced_net(seed)
    graph = ScalarGraph(net)
    made: dict[str, dict[int, set[int]]] = {}  # layer -> channel -> its scalar activations
    for v, edges in graph.into.items():
        for name, index in {term for _, _, terms in edges for term in terms}:
            made.setdefault(name.rsplit(".", 1)[0], {}).setdefault(index[0], set()).add(v)
    values = {CONSTANT: 1.0, **dict.fromkeys(graph.inputs, 1.0)}
    for v in sorted(graph.into):
        values[v] = sum(values.get(u, 0.0) * value**2 for u, value, _ in graph.into[v])
    back = dict.fromkeys(graph.outputs, 1.0)
    for v in sorted(graph.into, reverse=True):
        for u, value, _ in graph.into[v]:
            back[u] = back.get(u, 0.0) + back.get(v, 0.0) * value**2
    total = sum(values.get(v, 0.0) for v in graph.outputs)
    shares = dagpath.path_mass(traced)
    sites = [traced.graph.sites[index].module for index in traced.graph.maker_of.tolist()]
    for layer, channels in made.items():
        numbers = [index for index, module in enumerate(sites) if module == layer]
        for channel, nodes in channels.items():
            expected = sum(values[v] * back.get(v, 0.0) for v in nodes) / total
            assert float(shares[numbers[channel]]) == pytest.approx(expected, rel=1e-11, abs=1e-15)
    rescaled(traced)
    torch.testing.assert_close(dagpath.path_mass(traced), shares)


def test_the_mass_through_the_units_of_a_low_rank_update_is_found():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.head(torch.relu(x @ (m.w + m.b @ m.a).t())), head=nn.Linear(3, 1, bias=False))
    net.w, net.b, net.a = (nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (3, 2), (2, 2)))
    traced = dagpath.trace(net.double(), torch.zeros(1, 2, dtype=torch.float64))
    head, w, b, a = (p.detach() ** 2 for p in (net.head.weight, net.w, net.b, net.a))
    through = (head @ b)[0] * a.sum(1)
    total = float((head @ (w + b @ a)).sum())
    shares = dagpath.path_mass(traced)
    units = sorted(float(share) for share in shares)
    for share in (through / total).tolist():
        assert min(abs(share - unit) for unit in units) < 1e-12
    assert traced.graph.num_neurons == 3 + 1 + 2


def test_norms_and_counts_go_on_behind_a_gate():
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(torch.relu(m.a(x)) * torch.sigmoid(m.c(x))),
        a=nn.Linear(2, 3),
        b=nn.Linear(3, 1),
        c=nn.Linear(2, 3),
    )
    traced = dagpath.trace(net, torch.zeros(1, 2))
    assert dagpath.path_count(traced) == (2 + 1) * 3 + 1 + (2 + 1) * 3  # through a and b; the last bias; into the gate
    assert dagpath.path_length_profile(traced) == {1: 1 + 9, 2: 9}


def test_wrong_powers_are_refused():
    traced = small_mlp(2, 2)
    for p in (0.5, float("inf"), float("nan"), "two"):
        with pytest.raises(ValueError, match=str(p)):
            dagpath.path_norm(traced, p)
        with pytest.raises(ValueError, match=str(p)):
            dagpath.path_length_profile(traced, p)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p", [30, 100])
def test_norms_of_high_order_stay_in_range(seed, p):
    net, traced = traced_net(seed)
    values = np.abs(BruteForce(net).values)
    values = values[values > 0]
    expected = math.log(values.max()) + math.log(((values / values.max()) ** p).sum()) / p
    assert dagpath.path_norm(traced, p, log=True) == pytest.approx(expected, abs=1e-9)
    assert dagpath.path_norm(traced, p) == pytest.approx(math.exp(expected), rel=1e-9)
    rescaled(traced)
    assert dagpath.path_norm(traced, p, log=True) == pytest.approx(expected, abs=1e-9)
    shares = dagpath.path_mass(traced, p)
    assert bool(((shares >= 0) & (shares <= 1 + 1e-9)).all())
    assert float(shares.max()) > 0.5  # one path dominates


class Derived(nn.Module):
    """A weight that is used twice after something was computed of it, a product with itself, and parts of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.w = kind, nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.head = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "transposed":
            w = self.w.t()
            return self.head(torch.relu(x @ w) @ w)
        if self.kind == "matrix product":
            return self.head(x @ (self.w @ self.w))
        if self.kind == "square":
            return self.head(x @ (self.w * self.w))
        if self.kind == "split":
            a, b = self.w.split([1, 2], dim=1)
            return self.head(torch.cat([torch.relu(x @ a), x @ b], 1))
        return self.head(torch.relu(x @ self.w)[:, self.order])


@pytest.mark.parametrize("kind", ["transposed", "matrix product", "square", "split", "integer parameter"])
def test_the_diagonal_and_the_products_of_the_gram_operator_are_exact_for_derived_weights(kind):
    traced = dagpath.trace(Derived(kind), torch.zeros(1, 3, dtype=torch.float64))
    jacobian = dagpath.PathLifting(traced).jacobian().to_dense()
    expected = jacobian.T @ jacobian
    gram = dagpath.gram(traced)
    assert torch.allclose(gram.to_dense(), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(gram.diagonal(), expected.diagonal(), rtol=1e-12, atol=1e-12)
    assert gram.trace() == pytest.approx(float(expected.trace()), rel=1e-12)


class Scaled(nn.Module):
    def __init__(self, factor: float, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout, self.factor = nn.Linear(3, 2).double(), nn.Dropout(dropout), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.linear(x)).mean(1, keepdim=True)) * self.factor


@pytest.mark.parametrize(
    ("other", "x", "match"),
    [
        (Scaled(0.25), torch.zeros(1, 3), r"mul.* at .*0\.5.* in the first, .*0\.25.* in the second"),
        (Scaled(0.5), torch.zeros(1, 4, 3), r"\(1, 3\).* in the first, .*\(1, 4, 3\)"),
        (nn.Linear(3, 2), torch.zeros(1, 3), "'linear.weight' has shape .* is absent in the second"),
    ],
)
def test_the_path_metric_names_what_differs_in_two_architectures(other, x, match):
    first = dagpath.trace(Scaled(0.5), torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=match):
        dagpath.path_metric(first, dagpath.trace(other.double(), x.double()))


def test_what_only_train_mode_uses_makes_no_other_architecture():
    a, b = (dagpath.trace(Scaled(0.5, dropout), torch.zeros(1, 3).double()) for dropout in (0.1, 0.5))
    assert dagpath.path_metric(a, b) == 0


def test_the_distance_of_a_network_with_a_weight_that_is_no_number_is_none():
    model, other = Scaled(0.5), Scaled(0.5)
    with torch.no_grad():
        other.linear.weight[0, 0] = math.nan
    a, b = (dagpath.trace(net, torch.zeros(1, 3, dtype=torch.float64)) for net in (model, other))
    for p in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert math.isnan(dagpath.path_metric(a, b, p=p))


def test_paths_to_very_many_outputs_are_counted_exactly():
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(100 if index else 1, 100) for index in range(6))

        def forward(self, x: Tensor) -> Tensor:
            found = []
            for layer in self.layers:
                x = torch.relu(layer(x))
                found.append(x[:, :1].expand(-1, 300_001))
            return torch.cat(found, 1)

    to_a_neuron = list(itertools.accumulate(range(5), lambda paths, _: 100 * paths + 1, initial=2))
    assert dagpath.path_count(dagpath.trace(Repeated(), torch.zeros(1, 1))) == 300_001 * sum(to_a_neuron)


@pytest.mark.parametrize(
    "quantity",
    [
        dagpath.path_norm,
        dagpath.path_count,
        dagpath.path_length_profile,
        dagpath.path_mass,
        dagpath.gram_diagonal,
        dagpath.conserved_quantities,
        dagpath.PathLifting,
        lambda traced: dagpath.gram(traced).diagonal(),
        lambda traced: dagpath.top_paths(traced, 1),
        lambda traced: dagpath.path_metric(traced, traced),
        lambda traced: traced.unroll(),
        lambda traced: traced.graph.adjacency(),
        lambda traced: traced.graph.to_networkx(),
    ],
)
def test_quantities_of_a_model_without_values_name_the_parameter(quantity):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    traced = dagpath.trace(model, torch.zeros(1, 3, device="meta"))
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        quantity(traced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, "float64"])
def test_passes_of_another_type_are_refused(dtype):
    traced = dagpath.trace(nn.Linear(2, 1), torch.zeros(1, 2))
    for quantity in (dagpath.path_norm, dagpath.gram_diagonal, dagpath.gram):
        with pytest.raises(ValueError, match=f"dtype must be torch.float64 or torch.float32, got {dtype!r}"):
            quantity(traced, dtype=dtype)


@pytest.mark.parametrize("p", [np.float32(2), np.int64(2), Fraction(2)])
def test_a_power_is_any_real_number(p):
    traced = dagpath.trace(nn.Linear(2, 1), torch.zeros(1, 2))
    assert dagpath.path_norm(traced, p=p) == dagpath.path_norm(traced, p=2.0)
    assert torch.equal(dagpath.path_mass(traced, p=p), dagpath.path_mass(traced, p=2.0))
    assert traced.unroll().path_norm(p) == pytest.approx(dagpath.path_norm(traced, p=2.0), rel=1e-12)


def broken(value: float) -> dagpath.TracedModel:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[2].weight[0, 1] = value
    return dagpath.trace(model, torch.zeros(1, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "quantity",
    [
        lambda traced: dagpath.top_paths(traced, 3),
        lambda traced: dagpath.gram(traced).eigvalsh(),
        lambda traced: dagpath.gram(traced).eigvalsh(2),
        lambda traced: dagpath.gram(traced).condition_number(),
    ],
)
def test_what_sorts_paths_or_solves_refuses_weights_that_are_not_finite(quantity, value):
    with pytest.raises(ValueError, match=rf"'2.weight' has 1 .* not finite, the first at \(0, 1\): {value}"):
        quantity(broken(value))


def test_the_gram_matrix_refuses_complex_vectors_and_no_number_of_eigenvalues():
    gram = dagpath.gram(dagpath.trace(nn.Linear(2, 2), torch.zeros(1, 2)))
    for vector in (np.zeros(6, dtype=complex), torch.zeros(6, dtype=torch.complex128)):
        with pytest.raises(TypeError, match="complex"):
            gram @ vector
    for k in (0, 6, 2.5, "two"):
        with pytest.raises(ValueError, match=f"k must be an integer .* got {k!r}"):
            gram.eigvalsh(k)
    assert len(gram.eigvalsh(np.int64(2))) == 2
