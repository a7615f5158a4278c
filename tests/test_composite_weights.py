"""Weights computed from several parameters: low-rank updates, sums and products, rescaled at the stored tensors."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dagpath

from networks import Net
from test_operations import check


def parts(**shapes) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class LowRank(nn.Module):
    """A parametrization ``W + 0.5 (B A)``, viewed in the shape of W."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight[0].numel()))
        self.b = nn.Parameter(torch.randn(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * (self.b @ self.a).view(weight.shape)


LORA = {"stem": (4, 3), "w": (6, 4), "b": (6, 2), "a": (2, 4), "head": (3, 6)}


@pytest.mark.parametrize(
    ("weight", "groups"),
    [
        (lambda m: m.w + m.b @ m.a, 4 + 6 + 2),
        (lambda m: m.w + 0.5 * (m.b @ m.a), 4 + 6 + 2),
        (lambda m: m.w - (m.b @ m.a) / 3, 4 + 6 + 2),
        (lambda m: torch.add(m.w, m.b @ m.a, alpha=0.3), 4 + 6 + 2),
        (lambda m: torch.addmm(m.w, m.b, m.a), 4 + 6 + 2),
        (lambda m: m.w + (m.a.t() @ m.b.t()).t(), 4 + 6 + 2),
        (lambda m: m.w + torch.einsum("ri,or->oi", m.a, m.b), 4 + 6 + 2),
        (lambda m: m.w + F.linear(m.b, m.a.t()), 4 + 6 + 2),
        (lambda m: m.b @ m.a, 4 + 6 + 2),
        (lambda m: sum([m.w, m.b @ m.a, (m.b @ m.a) * 2]), 4 + 6 + 2),
        (lambda m: (m.w + m.b @ m.a) * torch.eye(6, 4), 4 + 6 + 2),
        (lambda m: torch.cat([m.w[:3], (m.w + m.b @ m.a)[3:]]), 4 + 6 + 2),
        (
            lambda m: m.w + torch.tanh(m.w[0, 0]) * m.w,
            4 + 5,
        ),  # the entry that makes a gain is pinned: both its ends are tied
        (lambda m: m.w + torch.tanh(m.b[0, 0]) * (m.b @ m.a), 4 + 6 + 1),
    ],
)
def test_a_low_rank_update_of_a_layer(weight, groups):
    def forward(m, x):
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, m.stem)), weight(m))), m.head)

    check(Net(forward, **parts(**LORA)), torch.randn(5, 3), groups)


@pytest.mark.parametrize(
    ("kind", "shape", "layer"),
    [
        (nn.Conv1d, (2, 2, 9), nn.Conv1d(4, 6, 3, padding=1)),
        (nn.Conv2d, (2, 2, 5, 5), nn.Conv2d(4, 6, 3, stride=2)),
        (nn.Conv2d, (2, 2, 5, 5), nn.Conv2d(4, 6, 3, groups=2)),
        (nn.Conv3d, (2, 2, 4, 4, 4), nn.Conv3d(4, 6, 2)),
    ],
)
def test_a_low_rank_update_of_a_convolution(kind, shape, layer):
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight.detach(), 2))
    net = nn.Sequential(kind(2, 4, 1), nn.ReLU(), layer, nn.ReLU(), kind(6, 1, 1))
    # the two groups of a grouped convolution read different channels through one A: channels 0 and 2, 1 and 3 are tied
    check(net, torch.randn(shape), (4 if layer.groups == 1 else 2) + 6 + 2)


def test_a_kernel_whose_factors_mix_positions_and_channels_ties_what_they_mix():
    def forward(m, x):
        weight = (m.b @ m.a).view(6, 4, 2, 2)  # rows of B are (output, height); columns of A are (input, width) mixed
        return m.head(F.relu(F.conv2d(F.relu(m.stem(x)), m.w + weight)))

    net = Net(forward, stem=nn.Conv2d(2, 4, 1), head=nn.Conv2d(6, 1, 1), **parts(w=(6, 4, 2, 2), b=(12, 3), a=(3, 8)))
    # column j of A stands at inputs j // 4 and 2 + j // 4: inputs 0 and 2, 1 and 3 are tied
    check(net, torch.randn(2, 2, 5, 5), 2 + 6 + 3)


def test_weights_on_the_right_are_oriented_by_their_ends():
    net = Net(lambda m, x: F.relu(F.relu(x @ m.stem) @ (m.a @ m.b)) @ m.head, **parts(stem=(3, 4), a=(4, 2), b=(2, 6)))
    net.head = nn.Parameter(torch.randn(6, 1))
    check(net, torch.randn(5, 3), 4 + 2 + 6)


def test_factors_of_factors_and_batches_of_factors():
    def forward(m, x):
        weight = m.c @ (m.b @ m.a) + torch.einsum("kor,kri->oi", m.d, m.e)
        return m.head(F.relu(F.linear(F.relu(m.stem(x)), weight)))

    net = Net(forward, stem=nn.Linear(3, 4), head=nn.Linear(6, 1), **parts(a=(2, 4), b=(5, 2), c=(6, 5)))
    for name, value in parts(d=(3, 6, 2), e=(3, 2, 4)).items():
        setattr(net, name, nn.Parameter(value))
    check(net, torch.randn(5, 3), 4 + 6 + (5 + 2) + 3 * 2)


@pytest.mark.parametrize(
    "gated", [lambda g, w: w * g.mean(), lambda g, w: w * g[0].unsqueeze(1), lambda g, w: g.mean(0) * w.t()]
)
def test_a_weight_times_a_gate_is_a_weight(gated):
    def forward(m, x):
        weight = gated(torch.sigmoid(m.gate(x)), m.w)
        return m.head(F.relu(F.linear(F.relu(m.stem(x)), weight if weight.shape == m.w.shape else weight.t())))

    net = Net(forward, stem=nn.Linear(3, 4), gate=nn.Linear(3, 6), head=nn.Linear(6, 1), **parts(w=(6, 4)))
    check(net, torch.randn(5, 3), 4 + 6)


def test_a_learned_gain_of_an_update_keeps_its_value():
    def forward(m, x):
        return m.head(F.relu(F.linear(F.relu(m.stem(x)), m.w + m.gain * (m.b @ m.a) * m.rows.unsqueeze(1))))

    net = Net(forward, **parts(w=(6, 4), b=(6, 2), a=(2, 4), gain=(), rows=(6,)))
    net.stem, net.head = nn.Linear(3, 4), nn.Linear(6, 1)
    check(net, torch.randn(5, 3), 4 + 6 + 2)
    multipliers = dagpath.random_rescaling(dagpath.trace(net, torch.randn(5, 3))).multipliers()
    assert (multipliers["gain"] == 1).all()
    assert (multipliers["rows"] == 1).all()


def test_a_learned_gain_that_is_an_edge_elsewhere_is_pinned_there():
    def forward(m, x):
        y = F.relu(F.linear(F.relu(m.stem(x)), m.w * m.rows.unsqueeze(1)))
        return m.head(y) + m.other(F.relu(m.side(x) * m.rows))

    net = Net(forward, stem=nn.Linear(3, 4), head=nn.Linear(6, 1), side=nn.Linear(3, 6), **parts(w=(6, 4), rows=(6,)))
    net.other = nn.Linear(6, 1)
    # the gain ties its inputs, the units of `side`, to its outputs
    check(net, torch.randn(5, 3), 4 + 6 + 6)


def test_a_sum_of_biases_and_of_tables():
    def forward(m, i):
        x = F.embedding(i, m.table + m.b @ m.a)
        return m.head(F.relu(F.linear(F.relu(x), m.w, m.one + m.two)))

    net = Net(forward, head=nn.Linear(5, 1), **parts(table=(9, 4), b=(9, 2), a=(2, 4), w=(5, 4), one=(5,), two=(1,)))
    # the shared offset `two` ties all five biases
    check(net, torch.randint(0, 9, (3, 2)), 4 + 2 + 1)


def test_a_computed_parameter_is_a_neuron_where_an_activation_is_expected():
    def forward(m, x):
        code = F.linear(m.code, m.w, m.shift)  # learned inputs of a learned layer: 2 codes of 4 units
        return m.head(F.relu(torch.cat([x, code.expand(len(x), -1, -1)], 1)))

    net = Net(forward, head=nn.Linear(4, 1), **parts(code=(2, 3), w=(4, 3), shift=(4,)))
    # weights and shift are shared by the codes, the head reads the fixed input: all of it but the product's 3 x 1 units
    check(net, torch.randn(2, 5, 4), 3)


def test_parts_that_are_used_elsewhere_have_the_same_ends_there():
    def forward(m, x):
        x = F.relu(m.stem(x))
        return m.head(F.relu(F.linear(x, m.w + m.b @ m.a)) + F.relu(F.linear(F.relu(F.linear(x, m.a)), m.b)))

    net = Net(forward, stem=nn.Linear(3, 4), head=nn.Linear(6, 1), **parts(w=(6, 4), b=(6, 2), a=(2, 4)))
    check(net, torch.randn(5, 3), 4 + 6 + 2)


def test_a_sum_of_which_only_a_part_is_used():
    def forward(m, x):
        x = F.relu(m.stem(x))
        weight = m.w + m.b @ m.a
        return m.head(F.relu(F.linear(x, weight[6:] if m.training else weight[:6])))

    net = Net(forward, stem=nn.Linear(3, 4), head=nn.Linear(6, 1), **parts(w=(12, 4), b=(12, 2), a=(2, 4)))
    check(net, torch.randn(5, 3), 4 + 6 + 2)


@pytest.mark.parametrize(
    "reader",
    [
        lambda m, y: y + torch.tanh(m.w + m.b @ m.a).sum(),
        lambda m, y: y + torch.tanh((m.w + m.b @ m.a)[:, 1:].t()).sum(),
        lambda m, y: (y, m.w + m.b @ m.a),
        lambda m, y: (y, (m.b @ m.a).sum()),
    ],
)
def test_a_computed_weight_that_is_read_elsewhere_pins_its_parts(reader):
    def forward(m, x):
        return reader(m, F.linear(F.relu(F.linear(F.relu(F.linear(x, m.stem)), m.w + m.b @ m.a)), m.head))

    net, x = Net(forward, **parts(**LORA)), torch.randn(5, 3)
    with torch.no_grad():
        before = net(x)
        dagpath.random_rescaling(dagpath.trace(net, x), 3.0, power_of_two=True).apply_()
        after = net(x)
    for one, other in zip(*[y if isinstance(y, tuple) else (y,) for y in (before, after)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "weight",
    [
        lambda m: m.w + torch.ones(6, 4),
        lambda m: m.w - m.w.mean(1, keepdim=True),
        lambda m: 1 + m.w,
        lambda m: m.w + F.normalize(m.b @ m.a),
        lambda m: (m.w + m.b @ m.a).tanh(),
        lambda m: F.normalize(m.w + m.b @ m.a, dim=1),
    ],
)
def test_a_weight_made_with_a_constant_ties_its_inputs_to_its_outputs(weight):
    def forward(m, x):
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, m.stem)), weight(m))), m.head)

    net = Net(forward, **parts(**LORA))
    traced = dagpath.trace(net, torch.randn(5, 3))
    check(net, torch.randn(5, 3), traced.graph.num_groups)
    assert traced.graph.num_groups <= 1 + 2


def random_weight(rng: random.Random, sizes: dict[str, tuple], shape: tuple[int, int], depth: int) -> Callable:
    """A function that computes a matrix of a shape from parameters, whose names and sizes it adds to ``sizes``."""
    rows, columns = shape
    splits = ["rows"] * (rows > 2) + ["columns"] * (columns > 2)
    kind = rng.choice(["sum", "product", "transpose", "scaled", *splits]) if depth else "leaf"
    if kind == "leaf":
        same = [name for name, size in sizes.items() if size == shape]
        name = rng.choice(same) if same and rng.random() < 0.2 else f"p{len(sizes)}"
        sizes[name] = shape
        return lambda m: getattr(m, name)
    if kind == "transpose":
        inner = random_weight(rng, sizes, (columns, rows), depth - 1)
        return lambda m: inner(m).t()
    rank, cut = rng.randint(1, 3), rng.randint(1, 2)
    shapes = {
        "sum": [shape, shape],
        "product": [(rows, rank), (rank, columns)],
        "scaled": [shape, rng.choice([(), (columns,), (rows, 1)])],
        "rows": [(cut, columns), (rows - cut, columns)],
        "columns": [(rows, cut), (rows, columns - cut)],
    }[kind]
    if kind == "scaled":
        sizes[f"p{len(sizes)}"] = shapes[1]
        gain = f"p{len(sizes) - 1}"
        inner = random_weight(rng, sizes, shape, depth - 1)
        return lambda m: 0.7 * inner(m) * getattr(m, gain)
    left, right = (random_weight(rng, sizes, part, depth - 1) for part in shapes)
    if kind == "sum":
        return lambda m: left(m) - right(m)
    if kind == "product":
        return lambda m: left(m) @ right(m)
    return lambda m: torch.cat([left(m), right(m)], 0 if kind == "rows" else 1)


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1))
def test_any_expression_of_parameters_is_rescaled_exactly(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = {"stem": (4, 3), "head": (2, 5)}
    weight = random_weight(rng, sizes, (5, 4), rng.randint(1, 4))

    def forward(m, x):
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, m.stem)), weight(m))), m.head)

    net, x = Net(forward, **parts(**sizes)), torch.randn(5, 3)
    check(net, x, dagpath.trace(net, x).graph.num_groups)


def paths(net, q: float) -> dict[str, Tensor]:
    """Σ|Φ|^q and its derivatives, with W, and B after A, as branches of their own."""
    powers = {name: p.detach().abs() ** q for name, p in net.named_parameters()}
    leaves = {name: p.requires_grad_() for name, p in powers.items()}
    first = leaves["stem"].sum(1)
    second = leaves["w"] @ first + 0.5**q * (leaves["b"] @ (leaves["a"] @ first))
    (leaves["head"] @ second).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()} | {"": (leaves["head"] @ second).sum().detach()}


def low_rank_net() -> Net:
    torch.manual_seed(0)

    def forward(m, x):
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, m.stem)), m.w + 0.5 * (m.b @ m.a))), m.head)

    return Net(forward, **parts(**LORA)).double()


def test_the_terms_of_a_sum_count_as_branches_of_their_own():
    net = low_rank_net()
    traced = dagpath.trace(net, torch.zeros(1, 3, dtype=torch.float64))
    expected = paths(net, 2)
    for name, values in dagpath.gram_diagonal(traced).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=0)
        assert (values > 0).all()
    for q in (1, 2, 3):
        assert dagpath.path_norm(traced, q) == pytest.approx(float(paths(net, q)[""]) ** (1 / q), rel=1e-12)


@pytest.mark.parametrize("start_at_zero", [False, True])
def test_path_conditioning_of_a_low_rank_update_converges(start_at_zero):
    net, x = low_rank_net(), torch.randn(7, 3, dtype=torch.float64)
    if start_at_zero:  # the usual initialization: nothing flows through A yet
        nn.init.zeros_(net.b)
    before = net(x)
    rescaling = dagpath.rescale_(net, x)
    assert rescaling.converged
    assert rescaling.objective[1] < rescaling.objective[0] - 1
    assert rescaling.traced.graph.num_groups == 4 + 6 + 2
    assert rescaling.live == sum(p.numel() for p in net.parameters()) - start_at_zero * net.a.numel()
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    assert dagpath.balance(rescaling.traced).log_scales.abs().max() < 1e-4  # the optimum, found again
