"""Numbers far from one: what is computed of them is right, or refused."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dagpath
from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import Later

from networks import Net, mlp


def log_gram(net: nn.Sequential) -> tuple[dict[str, np.ndarray], float]:
    """``log diag(G)`` and ``log Σ Φ²`` of a perceptron, by sums of exponentials of logarithms."""
    layers = [(name, layer) for name, layer in net.named_children() if isinstance(layer, nn.Linear)]
    with np.errstate(divide="ignore"):
        weights = [2 * np.log(np.abs(layer.weight.detach().double().numpy())) for _, layer in layers]
        biases = [2 * np.log(np.abs(layer.bias.detach().double().numpy())) for _, layer in layers]
    arriving, leaving = [np.zeros(layers[0][1].in_features)], [np.zeros(layers[-1][1].out_features)]
    for weight, bias in zip(weights, biases, strict=True):
        arriving.append(np.logaddexp(np.logaddexp.reduce(weight + arriving[-1], 1), bias))
    for weight in weights[::-1]:
        leaving.append(np.logaddexp.reduce(weight + leaving[-1][:, None], 0))
    expected = {}
    for (name, _), source, destination in zip(layers, arriving, leaving[-2::-1], strict=False):
        expected |= {f"{name}.weight": source + destination[:, None], f"{name}.bias": destination}
    return expected, float(np.logaddexp.reduce(arriving[-1]))


def sized_mlp(sizes: list[float], biases: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A perceptron whose layers have parameters of these sizes, over and over."""
    torch.manual_seed(0)
    net = mlp(3, 4, 5, 6, 2).double()
    for layer, size in zip((layer for layer in net if isinstance(layer, nn.Linear)), itertools.cycle(sizes)):
        with torch.no_grad():
            layer.weight.mul_(size)
            layer.bias.mul_(size if biases == "as large" else 0.0 if biases == "zero" else 1.0)
    return net.to(dtype)


def assert_gram_is_exact(net: nn.Sequential, dtype: torch.dtype, tolerance: float) -> None:
    traced = dagpath.trace(net, torch.zeros(1, 3, dtype=net[0].weight.dtype))
    expected, total = log_gram(net)
    assert 2 * dagpath.path_norm(traced, 2, log=True, dtype=dtype) == pytest.approx(total, rel=tolerance)
    found = dagpath.gram_diagonal(traced, log=True, dtype=dtype)
    for name, values in found.items():
        np.testing.assert_allclose(values.numpy(), np.broadcast_to(expected[name], values.shape), rtol=tolerance)
    for name, values in dagpath.gram_diagonal(traced, dtype=dtype).items():
        with np.errstate(over="ignore"):
            whole = torch.from_numpy(np.exp(np.broadcast_to(expected[name], values.shape)))
        torch.testing.assert_close(values, whole.to(dtype), rtol=tolerance * 2000, atol=0)


EXTREMES = [
    *([1e-200], [1e200], [1e300, 1e-300], [1e-300, 1e300], [1e-300], [1e300], [1e-310], [1.0, 1e-160], [1e160, 1.0]),
    *([1e-155], [1e-30], [1e30, 1e-30]),
]


@pytest.mark.parametrize("biases", ["as large", "zero", "of one"])
@pytest.mark.parametrize("sizes", EXTREMES)
def test_the_gram_diagonal_of_parameters_of_any_size_is_exact(sizes, biases):
    assert_gram_is_exact(sized_mlp(sizes, biases), torch.float64, 1e-12)


@pytest.mark.parametrize("biases", ["as large", "zero", "of one"])
@pytest.mark.parametrize("sizes", [[1e-20], [1e20], [1e-30, 1e30], [1e30, 1e-30], [1e-36], [1e-40], [1e36]])
def test_float32_passes_over_parameters_of_any_size_are_right(sizes, biases):
    assert_gram_is_exact(sized_mlp(sizes, biases, torch.float32), torch.float32, 2e-6)


@pytest.mark.parametrize("sizes", EXTREMES)
def test_float32_passes_over_wider_parameters_are_right(sizes):
    assert_gram_is_exact(sized_mlp(sizes, "as large"), torch.float32, 2e-6)


def assert_products_are_exact(net: nn.Sequential, dtype: torch.dtype, tolerance: float) -> None:
    """Of the Gram operator: its diagonal, element by element, and a symmetric whole; or they are refused."""
    traced = dagpath.trace(net, torch.zeros(1, 3, dtype=net[0].weight.dtype))
    expected, _ = log_gram(net)
    try:
        gram = dagpath.gram(traced, dtype=dtype).to_dense()
    except OverflowError:
        return
    with np.errstate(over="ignore"):
        values = [np.exp(np.broadcast_to(expected[name], p.shape)) for name, p in net.named_parameters()]
    diagonal = torch.from_numpy(np.concatenate([value.ravel() for value in values]))
    torch.testing.assert_close(gram.diagonal(), diagonal, rtol=tolerance, atol=1e-290)
    torch.testing.assert_close(gram, gram.T, rtol=tolerance, atol=1e-290)


@pytest.mark.parametrize("biases", ["as large", "zero", "of one"])
@pytest.mark.parametrize("sizes", EXTREMES)
def test_products_with_the_gram_matrix_are_right_or_refused(sizes, biases):
    assert_products_are_exact(sized_mlp(sizes, biases), torch.float64, 1e-9)


@pytest.mark.parametrize("biases", ["as large", "zero", "of one"])
@pytest.mark.parametrize("sizes", [[1.0], [1e-20], [1e20], [1e-30, 1e30], [1e30, 1e-30], [1e-36], [1e-40], [1e36]])
def test_float32_products_with_the_gram_matrix_are_right_or_refused(sizes, biases):
    assert_products_are_exact(sized_mlp(sizes, biases, torch.float32), torch.float32, 1e-4)


def test_products_that_leave_float32_say_to_use_float64():
    traced = dagpath.trace(sized_mlp([1e-20], "of one", torch.float32), torch.zeros(1, 3))
    with pytest.raises(OverflowError, match=r"beyond the range of torch.float32: use dtype=torch.float64"):
        dagpath.gram(traced, dtype=torch.float32) @ torch.ones(traced.graph.num_parameters)
    assert bool((dagpath.gram(traced) @ torch.ones(traced.graph.num_parameters)).isfinite().all())


@pytest.mark.parametrize("sizes", EXTREMES)
def test_distances_of_networks_of_any_size_are_exact(sizes):
    first, second = sized_mlp(sizes, "zero"), sized_mlp(sizes, "zero")
    with torch.no_grad():
        second[-1].weight.mul_(-1.5)  # all paths: Φ' = −1.5 Φ
    traced = [dagpath.trace(net, torch.zeros(1, 3, dtype=torch.float64)) for net in (first, second)]
    norm = dagpath.path_norm(traced[0], 2, log=True)
    assert dagpath.path_metric(*traced, log=True) == pytest.approx(norm + np.log(2.5), rel=1e-12)
    assert dagpath.path_metric(traced[0], traced[0], log=True) < norm - 15


def imbalance(net: nn.Sequential) -> float:
    """The largest ``|log max in − log max out|`` of a hidden neuron of a perceptron."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    worst = 0.0
    for before, after in itertools.pairwise(layers):
        into = torch.maximum(before.weight.detach().abs().amax(1), before.bias.detach().abs()).log()
        worst = max(worst, float((into - after.weight.detach().abs().amax(0).log()).abs().max()))
    return worst


@pytest.mark.parametrize("sizes", [[1e300, 1e-300], [1e-300], [1e308], [1e-30, 1e30], [1.0]])
def test_ranges_of_parameters_of_any_size_are_equal(sizes):
    net = sized_mlp(sizes, "as large")
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 3, dtype=torch.float64)), "range", bound=800.0)
    assert rescaling.live == sum(p.numel() for p in net.parameters())
    assert rescaling.converged
    if sizes != [1e308]:  # whose largest cannot grow
        rescaling.apply_()
        assert imbalance(net) < 1e-8


HALF = [torch.float16, torch.bfloat16]


def two_layers(first: float, second: float, dtype: torch.dtype) -> nn.Sequential:
    """Two layers of two neurons each, whose weights are these numbers."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).to(dtype)
    with torch.no_grad():
        net[0].weight.fill_(first)
        net[2].weight.fill_(second)
    return net


def rescaled_by(net: nn.Sequential, factor: float, power_of_two: bool = False) -> nn.Sequential:
    traced = dagpath.trace(net, torch.zeros(1, 2, dtype=net[0].weight.dtype))
    log_scales = torch.full((traced.graph.num_groups,), factor, dtype=torch.float64).log()
    return dagpath.Rescaling(traced, log_scales, power_of_two).apply_()


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
@pytest.mark.parametrize("dtype", HALF)
def test_ordinary_half_precision_models_are_rescaled(dtype, criterion):
    torch.manual_seed(0)
    net = mlp(64, 512, 256, 10).to(dtype)  # hundreds of whose weights are subnormal in float16
    rescaling = dagpath.rescale_(net, torch.randn(4, 64, dtype=dtype), criterion)
    assert rescaling.converged
    assert float(rescaling.log_scales.abs().max()) > 0.1
    assert all(bool(p.isfinite().all()) and p.dtype == dtype for p in net.parameters())


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_models_of_several_types_are_rescaled(criterion):
    torch.manual_seed(0)
    net = nn.Sequential(*mlp(8, 32, 16, 4))
    net[0].to(torch.bfloat16), net[4].double()
    net[1] = nn.Sequential(nn.ReLU(), Cast(torch.float32))
    net[3] = nn.Sequential(nn.ReLU(), Cast(torch.float64))
    dtypes = [p.dtype for p in net.parameters()]
    assert dagpath.rescale_(net, torch.randn(4, 8, dtype=torch.bfloat16), criterion).converged
    assert [p.dtype for p in net.parameters()] == dtypes


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize(
    ("dtype", "first", "second", "factor"),
    [
        (torch.float16, 1e-3, 1.0, 1e-6),  # the first becomes zero
        (torch.float16, 1e-3, 1.0, 1e-3),  # the first becomes subnormal
        (torch.float16, 1.0, 1e-3, 1e5),  # the second becomes zero, the first infinite
        (torch.float16, 1.0, 1e-3, 1e4),  # the second becomes subnormal
        (torch.bfloat16, 1e-35, 1.0, 1e-6),
        (torch.float32, 1e-35, 1.0, 1e-6),
        (torch.float32, 1e35, 1.0, 1e6),
        (torch.float64, 1e-305, 1.0, 1e-6),
        (torch.float64, 1e305, 1.0, 1e6),
    ],
)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_weights_that_would_leave_the_range_of_their_type_are_refused(dtype, first, second, factor, power_of_two):
    net = two_layers(first, second, dtype)
    before = [p.detach().clone() for p in net.parameters()]
    factor = 2.0 ** round(float(np.log2(factor))) if power_of_two else factor
    with pytest.raises(dagpath.BalanceError, match=r"weight: .* (leave the range|fall below the normal range)"):
        rescaled_by(net, factor, power_of_two)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_weights_that_do_not_count_may_become_zero():
    net = two_layers(1.0, 1.0, torch.float16)
    with torch.no_grad():
        net[0].weight[0, 0] = 6e-8  # beside a one, into the same neuron and from the same input
    rescaled_by(net, 0.3)
    assert net[0].weight.tolist()[0] == [0.0, pytest.approx(0.3, rel=1e-3)]


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_large_factors_of_extreme_weights_take_no_detour_beyond_the_range(size):
    net = two_layers(size, size, torch.float64)
    with torch.no_grad():
        net[2].weight.fill_(1.0)
    traced = dagpath.trace(net, torch.zeros(1, 2, dtype=torch.float64))
    log_scales = torch.full((traced.graph.num_groups,), -np.log(size) / 2, dtype=torch.float64)
    dagpath.Rescaling(traced, log_scales).apply_()
    torch.testing.assert_close(net[0].weight, torch.full((2, 2), size**0.5, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("inputs", "difference", "match"),
    [
        (torch.full((2, 4), float("nan")), None, "of 4 outputs in eval mode .* 4 are NaN and 0 finite.* nothing was"),
        (torch.tensor([[1.0] * 4, [float("nan")] * 4]), 0.0, "2 are NaN and 2 finite.* the others were compared"),
        (torch.zeros(0, 4), None, "of 0 outputs .* 0 finite.* nothing was compared"),
    ],
)
def test_outputs_that_say_nothing_are_named_when_a_rescaling_is_verified(inputs, difference, match):
    torch.manual_seed(0)
    net = mlp(4, 8, 2)
    with pytest.warns(UserWarning, match=match):
        rescaling = dagpath.rescale_(net, inputs, power_of_two=True)
    assert rescaling.difference == difference
    assert rescaling.converged


def test_infinities_among_the_outputs_are_compared_without_a_warning():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).masked_fill(torch.tensor([True, False, False]), -float("inf"))

    assert dagpath.rescale_(Masked(), torch.randn(2, 4)).difference < 1e-5


@pytest.mark.parametrize("std", [0.5, 2.0, 0.1, 0.002])
def test_a_deep_perceptron_has_the_gram_diagonal_of_its_layers(std):
    torch.manual_seed(0)
    net = mlp(*[8] * 101)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, std)
            nn.init.zeros_(layer.bias)
    traced = dagpath.trace(net, torch.zeros(1, 8))
    expected, total = log_gram(net)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        assert 2 * dagpath.path_norm(traced, 2, log=True, dtype=dtype) == pytest.approx(total, rel=tolerance)
        for name, values in dagpath.gram_diagonal(traced, log=True, dtype=dtype).items():
            whole = np.broadcast_to(expected[name], values.shape)
            np.testing.assert_allclose(values.numpy(), whole, rtol=tolerance, atol=tolerance)
    if std == 0.5:
        rescaling = dagpath.balance(traced)
    else:
        with pytest.warns(UserWarning, match="groups are held by the bound"):  # float32 holds no factors like these
            rescaling = dagpath.balance(traced)
    assert rescaling.live == traced.graph.num_parameters


def test_deep_networks_are_balanced_counted_and_explained():
    class Residual(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(2, 2, 1, bias=False) for _ in range(depth))
            self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block, norm in zip(self.blocks, self.norms, strict=True):
                x = x + torch.relu(norm(block(x)))
            return x.mean((2, 3))

    torch.manual_seed(0)
    net, x = Residual(60).eval(), torch.randn(1, 2, 1, 1)
    traced = dagpath.trace(net, x)
    paths = 2
    for _ in range(60):  # a path into each channel goes on, or through both weights, or starts at a batch norm's bias
        paths = 3 * paths + 2
    assert dagpath.path_count(traced) == paths
    assert traced.unroll().path_count() == paths
    assert all(dagpath.balance(traced, name).converged for name in ("pathcond", "equinorm", "range"))
    assert "Residual" in traced.explain()
    assert len(dagpath.top_paths(traced, 2)) == 2


def test_nothing_counts_in_a_network_of_zeros():
    net = mlp(3, 4, 2)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3)
    traced = dagpath.trace(net, x)
    assert dagpath.path_norm(traced, log=True) == -float("inf")
    for criterion in ("pathcond", "equinorm", "range"):
        rescaling = dagpath.rescale_(net, x, criterion)
        assert rescaling.converged
        assert rescaling.log_scales.tolist() == [0.0] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_one_weight_that_is_not_finite_is_named_and_nothing_changes(criterion, value):
    net = mlp(3, 4, 2)
    with torch.no_grad():
        net[2].weight[1, 3] = value
    traced, before = dagpath.trace(net, torch.zeros(1, 3)), copy.deepcopy(net.state_dict())
    with pytest.raises(dagpath.BalanceError, match=rf"'2.weight' has 1 .*\(1, 3\): {value}; nothing was changed"):
        dagpath.rescale_(net, torch.zeros(1, 3), criterion)
    with pytest.raises(dagpath.BalanceError, match=r"weight holds values that are not finite; nothing was changed"):
        dagpath.random_rescaling(traced).apply_()
    after = net.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert np.isnan(dagpath.path_metric(traced, traced))


def test_a_buffer_that_nothing_reads_may_hold_anything():
    net, x = mlp(3, 4, 2), torch.randn(2, 3)
    net.register_buffer("unread", torch.tensor([float("nan")]))
    assert dagpath.rescale_(net, x).converged
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    norm[1].running_mean[2] = float("nan")
    with pytest.raises(dagpath.BalanceError, match=r"buffer '1.running_mean' has 1 .* index \(2,\): nan"):
        dagpath.rescale_(norm, x)


@pytest.mark.parametrize("part", [torch.ones(0, 2), torch.tensor(2.0)], ids=["no element", "no dimension"])
def test_parameters_of_unusual_shapes_are_taken_along(part):
    def function(m: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(m.first(x))
        return m.last(hidden * m.part) if m.part.ndim == 0 else m.last(hidden) + x[:, :0] @ m.part

    torch.manual_seed(0)
    net, x = Net(function, first=nn.Linear(3, 4), last=nn.Linear(4, 2), part=part), torch.randn(2, 3)
    traced = dagpath.trace(net, x)
    assert dagpath.path_norm(traced) == pytest.approx(traced.unroll().path_norm(1))
    assert dagpath.gram_diagonal(traced)["part"].shape == part.shape
    assert len(dagpath.top_paths(traced, 2)) == 2
    for criterion in ("pathcond", "equinorm", "range"):
        assert dagpath.rescale_(net, x, criterion).difference < 1e-5


def test_a_rescaling_of_no_examples_and_of_no_neurons_is_one():
    assert dagpath.rescale_(nn.Linear(3, 2), torch.randn(2, 3)).log_scales.shape == (0,)
    assert dagpath.rescale_(nn.ReLU(), torch.randn(2, 3)).converged


def test_the_mass_of_a_parameter_is_replaced_like_any_other():
    net = mlp(2, 3, 1).double()
    traced = dagpath.trace(net, torch.zeros(1, 2, dtype=torch.float64))
    flow = traced.masses(PowerFlow, power=1)
    placeholder = next(node for node in traced.fx.graph.nodes if node.name in traced.captured.eval.parameters)
    later = Later(lambda node: flow.parameter("0.weight"), True, placeholder)
    changed = replace(later, data=True)
    assert (changed.data, changed.params, changed.node) == (True, True, placeholder)
    torch.testing.assert_close(changed.values, net[0].weight.detach().abs())


def test_derivatives_that_leave_float32_say_to_use_float64():
    torch.manual_seed(0)
    net = mlp(*[8] * 101)  # a third of the mass is left behind each layer, beside biases that carry as much again
    traced = dagpath.trace(net, torch.zeros(1, 8))
    with pytest.raises(OverflowError, match=r"leave the range of torch.float32 .*: use dtype=torch.float64"):
        dagpath.gram_diagonal(traced, dtype=torch.float32)
    expected, _ = log_gram(net)
    for name, values in dagpath.gram_diagonal(traced, log=True).items():
        whole = np.broadcast_to(expected[name], values.shape)
        np.testing.assert_allclose(values.numpy(), whole, rtol=1e-11, atol=1e-11)


def test_balancing_refuses_path_masses_that_leave_float64():
    torch.manual_seed(0)
    net = mlp(*[2] * 101).double()
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 1e-2)
            nn.init.normal_(layer.bias)
    traced = dagpath.trace(net, torch.zeros(1, 2, dtype=torch.float64))
    with pytest.raises(dagpath.BalanceError, match=r"the path masses through .* leave the range of torch.float64"):
        dagpath.balance(traced)
    assert dagpath.balance(traced, "equinorm").converged
