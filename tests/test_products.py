"""Products, quotients, choices and comparisons: which of their operands stay free, and that path quantities agree."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath

from invariance import assert_invariant
from networks import Net

relu = torch.relu


def net(function) -> Net:
    torch.manual_seed(0)
    parts = {name: nn.Linear(4, 4) for name in "abc"}
    extra = {"pair": nn.Linear(4, 8), "one": nn.Linear(4, 1), "head": nn.Linear(4, 2), "norm": nn.LayerNorm(4)}
    return Net(function, **parts, **extra)


@pytest.mark.parametrize(
    ("function", "groups"),
    [
        (lambda m, x: relu(m.a(x)) * relu(m.b(x)), 4),  # of two equals, one is a gate
        (lambda m, x: relu(m.one(x)) * relu(m.a(x)), 4),  # the one with fewer groups is the gate
        (lambda m, x: relu(m.a(x)) * relu(m.one(x)), 4),
        (lambda m, x: (relu(m.a(x)) + x) * relu(m.b(x)), 4),  # a factor that a skip fixes is the gate
        (lambda m, x: relu(m.b(x)) * (relu(m.a(x)) + x), 4),
        (lambda m, x: relu(m.a(x)) * relu(m.b(x)) * relu(m.c(x)), 4),
        (lambda m, x: (relu(m.a(x)) * relu(m.b(x))) * (relu(m.c(x)) + x), 4),
        (lambda m, x: (lambda y: y * y)(relu(m.a(x))), 0),  # a square has no gate
        (lambda m, x: (lambda y: y * relu(m.b(y)))(relu(m.a(x))), 4),  # a is fixed as a gate, b free
        (lambda m, x: relu(m.a(x)) / (1 + x.abs().sum(-1, keepdim=True)), 4),
        (lambda m, x: relu(m.a(x)) / (1 + relu(m.b(x))), 4),
        (lambda m, x: relu(m.a(x)) / torch.sigmoid(m.b(x)), 4),
        (lambda m, x: relu(m.a(x)) / (0.1 + relu(m.a(x))), 0),
        (lambda m, x: F.glu(m.pair(relu(m.a(x)))), 4 + 4),  # the half that is not a gate
        (lambda m, x: torch.addcmul(relu(m.a(x)), torch.sigmoid(m.b(x)), relu(m.c(x))), 4),
        (lambda m, x: relu(m.a(x)).addcmul_(torch.sigmoid(m.b(x)), relu(m.c(x))), 4),
        (lambda m, x: torch.lerp(relu(m.a(x)), relu(m.b(x)), 0.3), 4),
        (lambda m, x: torch.rsub(relu(m.a(x)), relu(m.b(x))), 4),
        (lambda m, x: torch.fliplr(relu(m.a(x))), 4),
        (lambda m, x: (relu(m.a(x))[:, :, None] @ relu(m.b(x))[:, None, :]).mean(1), 4),
        (lambda m, x: torch.einsum("bi,bj->bj", relu(m.a(x)), relu(m.b(x))), 4),
        (lambda m, x: (torch.ones(1, 4, 4).to(x) @ relu(m.a(x))[:, :, None])[:, :, 0], 1),  # a batch of 1 is broadcast
        (lambda m, x: (relu(m.a(x))[:, None, :] @ m.b.weight.t()[None])[:, 0], 4 + 4),
        (lambda m, x: (lambda y: y @ y.mT)(relu(m.a(x))[:, :, None])[:, 0], 0),
    ],
)
def test_products_keep_one_factor_free(function, groups):
    traced = assert_invariant(net(lambda m, x: m.head(function(m, x))), torch.randn(3, 4))
    assert traced.graph.num_groups == groups


@pytest.mark.parametrize(
    ("function", "groups"),
    [
        (lambda m, x: (lambda y: y * (y > 0))(m.a(x)), 4),  # a ReLU by hand
        (lambda m, x: (lambda y: torch.where(y >= 0, y, 0.1 * y))(m.a(x)), 4),
        (lambda m, x: (lambda y, z: torch.where(y > z, y, z))(m.a(x), m.b(x)), 4),  # a maximum by hand
        (lambda m, x: (lambda y: y * torch.sign(y))(m.a(x)), 4),
        (lambda m, x: m.b(torch.sign(m.a(x))).relu(), 4 + 4),
        (lambda m, x: (lambda y: y * (y > 0.5))(m.a(x)), 0),
        (lambda m, x: (lambda y: y * (y > x))(m.a(x)), 0),
        (lambda m, x: F.threshold(m.a(x), 0, 0), 4),
        (lambda m, x: m.a(x).clamp(min=0, max=float("inf")), 4),
        (lambda m, x: m.a(x).clamp(min=0, max=6), 0),
        (lambda m, x: torch.nan_to_num(relu(m.a(x)), 0.0, torch.inf, -torch.inf), 4),
    ],
)
def test_comparisons_with_zero_are_right_under_any_scale(function, groups):
    traced = assert_invariant(net(lambda m, x: m.head(function(m, x))), torch.randn(3, 4))
    assert traced.graph.num_groups == groups


def random_program(seed: int) -> Net:
    """A network of linear layers whose outputs meet in random sums, products, quotients, gates and choices."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(8))
    joins = [
        lambda a, b: a + b,
        lambda a, b: a * b,
        lambda a, b: a * torch.sigmoid(b),
        lambda a, b: a / (1 + b.abs()),
        lambda a, b: torch.where(b > 0, a, 0.5 * a),
        lambda a, b: torch.where(a > b, a, b),
        lambda a, b: torch.maximum(a, b),
        lambda a, b: torch.lerp(a, b, 0.25),
        lambda a, b: F.glu(torch.cat([a, b], -1)),
        lambda a, b: (a[:, :, None] @ b[:, None, :]).sum(1),
        lambda a, b: (a[:, :, None] * b[:, None, :]).amax(2),
        lambda a, b: torch.addcmul(a, a, torch.sigmoid(b)),
    ]
    steps = []
    for index in range(8):
        kind = rng.choice(["layer", "layer", "join", "join", "norm"])
        steps.append((kind, index, rng.randrange(-3, 0), rng.randrange(-3, 0), rng.choice(joins)))

    def forward(m: Net, x: Tensor) -> Tensor:
        values = [relu(m.first(x)), relu(m.second(x)), x]
        for kind, index, one, other, join in steps:
            if kind == "layer":
                values.append(relu(m.layers[index](values[one])))
            elif kind == "norm":
                values.append(m.norms[index](values[one]))
            else:
                values.append(join(values[one], values[other]))
        return m.head(torch.cat(values[-2:], -1))

    ends = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "head": nn.Linear(8, 2)}
    return Net(forward, layers=layers, norms=norms, **ends)


@pytest.mark.parametrize("seed", range(25))
def test_random_programs_of_products_and_gates_keep_function_and_path_norms(seed):
    torch.manual_seed(100 + seed)
    assert_invariant(random_program(seed), torch.randn(3, 4))


MASKED_WEIGHTS = {
    "product": lambda w, mask: w * (~mask).to(w.dtype),
    "masked_fill": lambda w, mask: w.masked_fill(mask, 0.0),
    "where": lambda w, mask: torch.where(mask, 0.0, w),
}


@pytest.mark.parametrize("kind", MASKED_WEIGHTS)
@pytest.mark.parametrize("read", ["by a layer", "by a sum", "behind a layer"])
def test_a_weight_that_the_input_masks_has_the_same_paths_in_the_unrolled_graph(kind, read):
    def function(m, x):
        h = relu(m.a(x)) if read == "behind a layer" else x
        w = MASKED_WEIGHTS[kind](m.w, h <= 0)
        return m.h(relu(w.sum(1)[None] if read == "by a sum" else F.linear(h, w)))

    torch.manual_seed(0)
    net = Net(function, w=torch.randn(3, 2), a=nn.Linear(2, 2), h=nn.Linear(3, 1)).double()
    traced = dagpath.trace(net, torch.randn(1, 2, dtype=torch.float64))
    if (kind, read) == ("product", "behind a layer"):  # an edge whose weight is a product with a gate
        with pytest.raises(dagpath.UnsupportedOpError, match="a weight times a gate"):
            traced.unroll()
        return
    graph = traced.unroll()
    assert dagpath.path_count(traced) == graph.path_count()
    assert dagpath.path_norm(traced) == pytest.approx(graph.path_norm(1), rel=1e-12)
    for name, values in dagpath.gram_diagonal(traced).items():
        torch.testing.assert_close(values, graph.gram_diagonal()[name], rtol=1e-12, atol=0)
