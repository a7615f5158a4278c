"""Every quantity of small odd networks is that of their explicit paths, or is refused with its cause."""

import contextlib
import copy
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from odd_networks import DIRECT, WEIGHTS, Odd, all_networks, first
from torch import Tensor, nn

import dagpath

from networks import Net

NETWORKS = all_networks()
REFUSED = {"padded", "padded with a number", "joined with zeros", "a masked product", "one row of a product twice"}
"""Networks whose weights have holes, or entries that their factors do not have: no edges of channels."""


@functools.cache
def lifted(name: str) -> tuple[nn.Module, dagpath.TracedModel, dagpath.PathLifting, Tensor]:
    function, x = NETWORKS[name]
    net = Odd(function).double().eval()
    traced = dagpath.trace(net, x)
    return net, traced, dagpath.PathLifting(traced), x


def norm(values: Tensor, p: float) -> float:
    return float((values.abs() ** p).sum()) ** (1 / p)


@pytest.mark.parametrize("name", NETWORKS)
def test_quantities_of_odd_networks_are_those_of_their_paths(name):
    net, traced, lifting, x = lifted(name)
    graph, values, jacobian = lifting.graph, lifting.values, lifting.jacobian().to_dense()
    for p in (1, 2, 3):
        assert dagpath.path_norm(traced, p) == pytest.approx(norm(values, p), rel=1e-10)
        assert graph.path_norm(p) == pytest.approx(dagpath.path_norm(traced, p), rel=1e-12)
    assert dagpath.path_count(traced) == graph.path_count() == len(lifting)
    gram = jacobian.T @ jacobian
    v = torch.linspace(-1, 1, len(gram), dtype=torch.float64)
    scale = float(gram.abs().amax())
    torch.testing.assert_close(dagpath.gram(traced) @ v, gram @ v, rtol=1e-9, atol=1e-10 * scale)
    torch.testing.assert_close(dagpath.gram(traced).diagonal(), gram.diagonal(), rtol=1e-9, atol=1e-10 * scale)
    unrolled = graph.gram_diagonal()
    for parameter, diagonal in dagpath.gram_diagonal(traced).items():
        torch.testing.assert_close(diagonal, unrolled[parameter], rtol=1e-9, atol=0)
    assert sum(dagpath.path_length_profile(traced).values()) == len(lifting)
    for p in (1, 2):
        total = sum(dagpath.path_length_profile(traced, p).values())
        assert total == pytest.approx(1.0 if bool(values.any()) else 0.0)
    moments = {parameter: tensor.detach() ** 2 for parameter, tensor in traced.values.items()}
    for diagonal in dagpath.expected_gram_diagonal(traced, moments).values():
        assert bool((diagonal >= 0).all())
    assert bool(dagpath.conserved_quantities(traced).isfinite().all())
    with contextlib.suppress(dagpath.UnsupportedOpError):
        mass = dagpath.path_mass(traced)
        assert bool(((mass >= 0) & (mass <= 1 + 1e-9)).all())
    with contextlib.suppress(dagpath.UnsupportedOpError):
        found, expected = lifting.realize(x), net(x)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for one, other in pairs:
            torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-10, check_dtype=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_distances_of_odd_networks_are_those_of_their_paths(name):
    net, traced, lifting, x = lifted(name)
    assert dagpath.path_metric(traced, traced) == dagpath.path_metric(traced, traced, p=1) == 0.0
    for size in (0.3, 1e-4):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + size * torch.linspace(0.2, 1, parameter.numel()).view(parameter.shape))
        beside = dagpath.trace(other, x)
        difference = dagpath.PathLifting(beside).values - lifting.values
        assert dagpath.path_metric(beside, traced) == pytest.approx(norm(difference, 2), rel=1e-8, abs=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = dagpath.path_metric(beside, traced, p=1)
        if caught:
            assert found >= norm(difference, 1) * (1 - 1e-8)
        else:
            assert found == pytest.approx(norm(difference, 1), rel=1e-8, abs=0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_shares_of_all_paths_are_one_or_the_weight_is_named(name):
    _, traced, lifting, _ = lifted(name)
    if name in REFUSED:
        with pytest.raises(dagpath.UnsupportedOpError, match=r"odd_networks.py:\d+ \(.* a weight( of parameters|:)"):
            dagpath.top_paths(traced, 1)
        return
    paths = dagpath.top_paths(traced, len(lifting), progress=False)
    assert sum(path.share for path in paths) == pytest.approx(1.0, abs=1e-9)
    assert traced.graph.adjacency().shape == (traced.graph.num_neurons,) * 2
    assert traced.graph.to_networkx("neuron").number_of_edges() > 0
    if name not in ("a constant matrix", "weights 1, 1, 4"):  # constants on the way make parallel paths
        expected = sorted(lifting.values.abs()[lifting.values != 0].tolist(), reverse=True)
        assert [path.value for path in paths] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", DIRECT)
def test_the_paths_of_inputs_that_enter_no_linear_layer_are_found(name):
    _, traced, lifting, _ = lifted(name)
    paths = dagpath.top_paths(traced, len(lifting) + 1, progress=False)
    expected = sorted(lifting.values.abs()[lifting.values != 0].tolist(), reverse=True)
    assert [path.value for path in paths] == pytest.approx(expected, rel=1e-9)


ENDS_WITHOUT_ELEMENTS = {"a barrier at the end", "no parameter", "constants alone", "booleans", "no path"}
"""Networks with paths that cross no element: from one input, barrier or constant to an output they are one."""


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(WEIGHTS) - ENDS_WITHOUT_ELEMENTS))
def test_the_shares_of_all_paths_are_one_beside_integers_and_behind_barriers(name):
    _, traced, lifting, _ = lifted(name)
    paths = dagpath.top_paths(traced, len(lifting), progress=False)
    assert sum(path.share for path in paths) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["convolution", "transposed", "separable"])
def test_convolutions_of_computed_weights_have_every_path_of_channels(kind):
    def forward(m, x):
        y = F.relu(m.stem(x))
        if kind == "transposed":
            return m.head(F.conv_transpose1d(y, (m.c @ m.b @ m.a)[:, :, None] * 0.5).mean(2))
        if kind == "separable":
            return m.head(F.conv1d(y, m.d[:, None] + 2 * m.e[:, None], groups=4).mean(2))
        return m.head(F.conv1d(y, (m.c @ m.b @ m.a)[:, :, None] * 0.5).mean(2))

    torch.manual_seed(0)
    shapes = {"a": (2, 4), "b": (3, 2), "c": (4, 3), "d": (4, 2), "e": (4, 2)}
    parts = {name: torch.randn(shape) for name, shape in shapes.items()}
    net = Net(forward, stem=nn.Conv1d(2, 4, 1), head=nn.Linear(4, 1), **parts).double()
    traced = dagpath.trace(net, torch.zeros(1, 2, 5).double())
    lifting = dagpath.PathLifting(traced)
    largest: dict[tuple[str, ...], float] = {}
    for path in lifting.paths:  # copies at other positions have the same elements
        key = tuple(weight for weight in path.weights if weight)
        largest[key] = max(largest.get(key, 0.0), abs(path.value))
    expected = sorted((value for value in largest.values() if value > 0), reverse=True)
    found = [path.value for path in dagpath.top_paths(traced, len(expected) + 1, progress=False)]
    assert found == pytest.approx(expected, rel=1e-9)


MIXING = {
    "a mean": lambda m, x: m.head(first(m, x) - first(m, x).mean(0)),
    "a sum": lambda m, x: m.head(first(m, x) + first(m, x).sum(0)),
    "a small mean": lambda m, x: m.head(first(m, x) - 1e-6 * first(m, x).mean(0)),
    "statistics of the batch": lambda m, x: m.head(F.batch_norm(m.a(x), None, None, training=True)),
    "attention among examples": lambda m, x: m.head(torch.softmax(first(m, x) @ first(m, x).T, 1) @ first(m, x)),
    "a roll": lambda m, x: m.head(first(m, x).roll(1, 0)),
    "a flip": lambda m, x: m.head(first(m, x).flip(0)),
    "a cumulative sum": lambda m, x: m.head(first(m, x).cumsum(0)),
    "the first example": lambda m, x: m.head(first(m, x) + first(m, x)[:1]),
    "a sequence": lambda m, x: m.head(F.pad(first(m, x), (0, 0, 1, 0))[:-1]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MIXING)
def test_examples_that_mix_are_refused_or_realized_as_the_batch_that_they_are(name, dtype):
    net, x = Odd(MIXING[name]).eval().to(dtype), torch.randn(4, 3, dtype=dtype)
    lifting = dagpath.PathLifting(dagpath.trace(net, x))
    for quantity in (lifting.realize, lifting.activations, lifting.inputs):
        try:
            found = quantity(x)
        except dagpath.UnsupportedOpError:
            continue
        if quantity == lifting.realize:
            torch.testing.assert_close(found, net(x).detach().double(), rtol=1e-4, atol=1e-5)


def test_what_mixes_examples_is_named_with_its_line():
    lifting = dagpath.PathLifting(dagpath.trace(Odd(MIXING["a mean"]).double().eval(), torch.randn(4, 3).double()))
    with pytest.raises(
        dagpath.UnsupportedOpError, match=r"examples of a batch mix in sub at .*test_odd_networks.py:\d+"
    ):
        lifting.realize(torch.randn(5, 3).double())
    assert lifting.realize(torch.randn(1, 3).double()).shape == (1, 2)


def test_independent_examples_are_realized_in_any_number_and_leave_the_model_as_it_was():
    net = Net(lambda m, x: m.b(F.relu(m.norm(m.a(x)))), a=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 2))
    net = net.double().train()
    seen = []
    lifting = dagpath.PathLifting(dagpath.trace(net, torch.randn(2, 3).double()))
    net.a.register_forward_hook(lambda *given: seen.append(len(given[1][0])))
    before = copy.deepcopy(net.state_dict())
    for size in (1, 2, 7):
        x = torch.randn(size, 3).double()
        found = lifting.realize(x)
        assert net.training
        torch.testing.assert_close(found, net.eval()(x).detach(), rtol=1e-12, atol=1e-12)
        net.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("scale", "depth"), [(1e-200, 9), (1e200, 9), (1e-3, 200), (1.0, 3)])
def test_the_unrolled_graph_has_the_norms_of_the_passes_at_any_scale(scale, depth):
    torch.manual_seed(0)
    net = nn.Sequential(*[module for _ in range(depth) for module in (nn.Linear(3, 3), nn.ReLU())]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    traced = dagpath.trace(net, torch.zeros(1, 3).double())
    graph = traced.unroll()
    for p in (1, 2, 2.5, 40):
        assert graph.path_norm(p, log=True) == pytest.approx(dagpath.path_norm(traced, p, log=True), rel=1e-12)
        assert graph.path_norm(p) == pytest.approx(dagpath.path_norm(traced, p), rel=1e-12)
        forward, backward = graph.forward_mass(p, log=True), graph.backward_mass(p, log=True)
        starts, ends = (torch.logsumexp(mass[at], 0) for mass, at in ((backward, graph.starts), (forward, graph.ends)))
        torch.testing.assert_close(starts, ends, rtol=1e-12, atol=1e-12)
    if depth < 100:
        for name, expected in dagpath.gram_diagonal(traced, log=True).items():
            torch.testing.assert_close(graph.gram_diagonal(log=True)[name], expected, rtol=1e-12, atol=1e-11)


def test_values_of_paths_pass_through_numbers_beyond_float64():
    net = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(4)]).double()
    for layer, value in zip(net, (1e-200, -1e-200, 1e250, 1e150), strict=True):
        nn.init.constant_(layer.weight, value)
    lifting = dagpath.PathLifting(dagpath.trace(net, torch.zeros(1, 1).double()))
    assert lifting.values.tolist() == pytest.approx([-1.0])
    assert lifting.jacobian().to_dense()[0].tolist() == pytest.approx([-1e200, 1e200, -1e-250, -1e-150])


def test_a_bias_of_a_batch_norm_takes_nothing_from_a_distance_of_zero():
    _, traced, _, _ = lifted("a stored normalization")
    assert dagpath.path_metric(traced, traced, p=1, log=True) == -math.inf


def test_networks_near_each_other_have_their_distance_to_rounding():
    net, traced, lifting, x = lifted("three factors")
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-9 * torch.randn_like(parameter))
    exact = lifting.jacobian().to_dense() @ torch.cat(
        [(b - a).detach().flatten() for a, b in zip(net.parameters(), other.parameters(), strict=True)]
    )
    found = dagpath.path_metric(dagpath.trace(other, x), traced)
    assert found == pytest.approx(float(exact.norm()), rel=1e-7)  # but for terms of second order


def test_a_neuron_between_factors_that_paths_meet_again_has_no_share():
    _, traced, _, _ = lifted("a product used twice")
    with pytest.raises(
        dagpath.UnsupportedOpError, match=r"the parameter '[pq]' leads into neurons between the factors"
    ):
        dagpath.path_mass(traced)
