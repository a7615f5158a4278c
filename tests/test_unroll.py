"""The unrolled graph against brute force over explicit paths, and against the lifting pass on tensors."""

import math

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dagpath
from dagpath.ops import Operation
from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import Mass

from networks import BruteForce, Net, RandomNet

seeds = st.integers(0, 2**31 - 1)
relu = torch.relu


def assert_agrees(model: nn.Module, x) -> dagpath.UnrolledGraph:
    """Norms, diag(G) and all masses are those of the lifting pass; the sparse tensors are well formed."""
    traced = dagpath.trace(model.double().eval(), x)
    graph = traced.unroll()
    for p in (1, 2, 3):
        assert graph.path_norm(p) == pytest.approx(dagpath.path_norm(traced, p), rel=1e-12)
    expected = dagpath.gram_diagonal(traced)
    largest = max(float(values.max()) for values in expected.values() if values.numel())
    for name, values in graph.gram_diagonal().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=1e-14 * largest)
    forward = graph.forward_mass(2)
    for node, masses in masses_of(traced, 2).items():
        nodes = graph.nodes_of(node)
        if len(nodes) == masses.values.numel():
            found = torch.ldexp(masses.values, torch.tensor(masses.log2_scale)).flatten()
            torch.testing.assert_close(forward[nodes], found, rtol=1e-12, atol=0)
    for level in graph.levels:
        parts = level.weights.crow_indices(), level.weights.col_indices(), level.weights.values()
        torch.sparse_csr_tensor(*parts, level.weights.shape, check_invariants=True)
    return graph


def masses_of(traced: dagpath.TracedModel, p: float) -> dict:
    """The mass of every activation in the lifting pass."""
    flow = traced.masses(PowerFlow, power=p)
    flow.garbage_collect_values = False
    flow.total()
    return {node: value for node, value in flow.env.items() if isinstance(value, Mass) and value.data}


def assert_realizes(model: nn.Module, x) -> dagpath.PathLifting:
    """The sum over all paths is the model's output, and diag(JᵀJ) is that of the Gram matrix."""
    args = x if isinstance(x, tuple) else (x,)
    traced = dagpath.trace(model.double().eval(), x)
    lifting = dagpath.PathLifting(traced)
    with torch.no_grad():
        torch.testing.assert_close(lifting.realize(x), model(*args), rtol=1e-10, atol=1e-12)
    return lifting


@settings(max_examples=60)
@given(seeds)
def test_counts_of_random_networks_are_exact(seed):
    net = RandomNet(seed).double()
    assert dagpath.trace(net, net.example()).unroll().path_count() == BruteForce.count(net)


@settings(max_examples=60)
@given(seeds)
def test_quantities_of_random_networks_are_those_of_the_lifting_pass(seed):
    net = RandomNet(seed, max_convolutions=5)
    assert_agrees(net, net.double().example())


@settings(max_examples=30)
@given(seeds)
def test_mass_is_conserved_from_level_to_level(seed):
    """Every path that reaches an end starts somewhere, and crosses its own nodes once."""
    net = RandomNet(seed).double()
    graph = dagpath.trace(net, net.example()).unroll()
    forward, backward = graph.forward_mass(1), graph.backward_mass(1)
    total = float(forward[graph.ends].sum())
    assert float(backward[graph.starts].sum()) == pytest.approx(total, rel=1e-12)


def shuffled_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def layers(*modules: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(2))
    model.double().eval()(x.double())
    return shuffled_statistics(model), x.double()


image, signal, volume = torch.randn(1, 2, 4, 5), torch.randn(1, 2, 6), torch.randn(1, 1, 3, 3, 3)

LAYERS = {
    "same padding": ([nn.Conv2d(2, 2, (2, 3), padding="same"), nn.ReLU()], image),
    "valid padding": ([nn.Conv2d(2, 2, 2, padding="valid"), nn.ReLU()], image),
    "reflected": ([nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU()], image),
    "circular": ([nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.ReLU()], image),
    "replicated": ([nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"), nn.ReLU()], image),
    "groups and dilation": ([nn.Conv2d(2, 4, 2, groups=2, dilation=2, stride=(1, 2)), nn.ReLU()], image),
    "conv1d": ([nn.Conv1d(2, 3, 3, stride=2, padding=2), nn.ReLU()], signal),
    "conv3d": ([nn.Conv3d(1, 2, 2, padding=(0, 1, 0)), nn.ReLU(), nn.MaxPool3d(2)], volume),
    "transposed": ([nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), nn.ReLU()], image),
    "transposed, groups": ([nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2, bias=False), nn.ReLU()], image),
    "transposed1d": ([nn.ConvTranspose1d(2, 1, 3, stride=3), nn.ReLU()], signal),
    "batch norm without parameters": ([nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False), nn.ReLU()], image),
    "batch norm of inputs": ([nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()], image),
    "batch norm of vectors": ([nn.Flatten(), nn.Linear(40, 3), nn.BatchNorm1d(3), nn.ReLU()], image),
    "nearest": ([nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3)], image),
    "bilinear": ([nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Upsample((5, 6), mode="bilinear")], image),
    "bicubic": ([nn.Conv2d(2, 1, 2), nn.ReLU(), nn.Upsample((4, 6), mode="bicubic", align_corners=True)], image),
    "linear": ([nn.Conv1d(2, 2, 2), nn.ReLU(), nn.Upsample(7, mode="linear")], signal),
    "maximum": ([nn.Conv2d(2, 2, 1), nn.MaxPool2d((2, 3), stride=(1, 2), padding=1, ceil_mode=True)], image),
    "dilated maximum": ([nn.Conv2d(2, 2, 1), nn.MaxPool2d(2, dilation=2, stride=1)], image),
    "mean": ([nn.Conv2d(2, 2, 1), nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), nn.ReLU()], image),
    "padless mean": ([nn.Conv2d(2, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.ReLU()], image),
    "divided mean": ([nn.Conv2d(2, 2, 1), nn.AvgPool2d(2, divisor_override=3), nn.ReLU()], image),
    "adaptive mean": ([nn.Conv2d(2, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 2))], image),
    "adaptive maximum": ([nn.Conv2d(2, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d((3, 2))], image),
    "adaptive 1d": ([nn.Conv1d(2, 2, 1), nn.AdaptiveMaxPool1d(4), nn.AdaptiveAvgPool1d(3)], signal),
    "pixel shuffle": ([nn.Conv2d(2, 4, 1), nn.PixelShuffle(2), nn.ReLU()], image),
    "channel shuffle": ([nn.Conv2d(2, 4, 1), nn.ChannelShuffle(2), nn.LeakyReLU(0.3)], image),
    "dropout": ([nn.Conv2d(2, 2, 1), nn.Dropout(), nn.PReLU(2)], image),
    "zero padding": ([nn.Conv2d(2, 2, 1), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 2, 2), nn.ReLU()], image),
    "constant padding": ([nn.Conv2d(2, 2, 1), nn.ConstantPad2d(1, -2.0), nn.Conv2d(2, 1, 2), nn.ReLU()], image),
    "unfold and fold": ([nn.Conv2d(2, 2, 1), nn.Unfold(2), nn.ReLU(), nn.Fold((4, 5), 2)], image),
    "bounds at zero": ([nn.Conv2d(2, 2, 1), nn.Hardtanh(0.0, math.inf)], image),
    "rectified twice": ([nn.Linear(5, 3), nn.RReLU(), nn.Threshold(0, 0)], image),
    "weight norm": ([nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)), nn.ReLU()], image),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_the_lifting_pass_and_realize_the_model(name):
    modules, x = LAYERS[name]
    model, x = layers(*modules, x=x)
    assert_agrees(model, x)
    assert_realizes(model, torch.cat([x, x.flip(-1), -x]))


def net(function) -> Net:
    torch.manual_seed(0)
    parts = {name: nn.Linear(4, 4) for name in "abc"}
    parts |= {"one": nn.Linear(4, 1), "head": nn.Linear(4, 2), "table": nn.Embedding(3, 4), "norm": nn.LayerNorm(4)}
    model = Net(function, **parts)
    model.gain, model.low, model.rank = (nn.Parameter(torch.randn(s)) for s in ((4,), (4, 2), (2, 4)))
    model.register_buffer("mask", torch.tensor([[1.0, 0.0, 2.0, -1.0]] * 4))
    return model


FUNCTIONS = {
    "skip": lambda m, x: relu(m.a(x)) + x,
    "twice the same": lambda m, x: m.b(relu(m.a(x)) + relu(m.a(x))),
    "doubled": lambda m, x: (lambda y: y + y)(relu(m.a(x))),
    "difference": lambda m, x: torch.sub(relu(m.a(x)), relu(m.b(x)), alpha=2),
    "reversed difference": lambda m, x: torch.rsub(relu(m.a(x)), relu(m.b(x))),
    "plus a number": lambda m, x: relu(m.a(x)) + 0.5,
    "scaled": lambda m, x: -3 * relu(m.a(x)) / 2,
    "negated": lambda m, x: relu(-m.a(x)),
    "absolute": lambda m, x: m.a(x).abs(),
    "at most zero": lambda m, x: m.a(x).clamp(max=0),
    "gain": lambda m, x: relu(m.a(x)) * m.gain + m.gain,
    "gain below": lambda m, x: m.a(m.gain * x),
    "divided by a parameter": lambda m, x: relu(m.a(x)) / m.gain,
    "concatenation": lambda m, x: m.b(torch.cat([relu(m.a(x))[:, :2], x[:, 2:]], 1)),
    "concatenated parameter": lambda m, x: m.b(torch.cat([relu(m.a(x)), m.gain.expand_as(x)], 1)[:, 2:6]),
    "shared": lambda m, x: m.a(relu(m.b(relu(m.a(x))))),
    "transposed weight": lambda m, x: F.linear(relu(m.a(x)), m.b.weight.t()),
    "masked weight": lambda m, x: F.linear(relu(m.a(x)), m.b.weight * m.mask, m.b.bias),
    "stacked weights": lambda m, x: F.linear(relu(m.a(x)), torch.cat([m.b.weight[:2], m.c.weight[:2]])),
    "sum of weights": lambda m, x: F.linear(relu(m.a(x)), m.b.weight + 2 * m.c.weight),
    "low rank": lambda m, x: F.linear(relu(m.a(x)), m.b.weight - 0.5 * m.low @ m.rank),
    "low rank at zero": lambda m, x: F.linear(relu(m.a(x)), m.b.weight + (0 * m.low.detach() + m.low) @ m.rank),
    "product of weights": lambda m, x: F.linear(relu(m.a(x)), m.b.weight * m.c.weight),
    "matmul": lambda m, x: relu(m.a(x)) @ m.b.weight,
    "matmul from the left": lambda m, x: (m.b.weight @ relu(m.a(x)).mT).mT,
    "addmm": lambda m, x: torch.addmm(m.gain, relu(m.a(x)), m.b.weight),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", relu(m.a(x)), m.b.weight),
    "einsum with more sums": lambda m, x: torch.einsum("bi,ij->bi", relu(m.a(x)), m.b.weight),
    "constant matrix": lambda m, x: relu(m.a(x)) @ m.mask,
    "mean": lambda m, x: relu(m.a(x)).mean(1, keepdim=True) + relu(m.b(x)),
    "sum": lambda m, x: relu(m.a(x)).view(-1, 2, 2).sum((1, 2))[:, None].expand(-1, 4),
    "largest": lambda m, x: m.a(x).view(-1, 2, 2).amax(1).repeat(1, 2),
    "smallest": lambda m, x: m.a(x).view(-1, 2, 2).min(2, keepdim=True)[0].expand(-1, 2, 2).flatten(1),
    "where over rows": lambda m, x: torch.where(m.mask[0] > 0, relu(m.a(x)), m.gain),
    "selected by a constant": lambda m, x: torch.where(m.mask > 0, m.a(x)[:, None], 0.1 * m.b(x)[:, None]).sum(1),
    "indices of a maximum": lambda m, x: (lambda y: m.b(x) * y[1] + y[1])(m.a(x).max(1, keepdim=True)),
    "maximum": lambda m, x: torch.maximum(m.a(x), m.b(x)),
    "minimum": lambda m, x: torch.minimum(m.a(x), torch.zeros(())),
    "where": lambda m, x: torch.where(m.a(x) > 0, m.b(x), 0.0),
    "relu by hand": lambda m, x: (lambda y: y * (y > 0))(m.a(x)),
    "masked": lambda m, x: m.a(x).masked_fill(m.a(x) < 0, 0.0),
    "maximum by hand": lambda m, x: (lambda y, z: torch.where(y > z, y, z))(m.a(x), m.b(x)),
    "cumulative": lambda m, x: relu(m.a(x)).cumsum(1),
    "rolled": lambda m, x: m.b(relu(m.a(x)).roll(1, 1)),
    "indexed": lambda m, x: m.b(relu(m.a(x))[:, [0, 0, 2, 1]]),
    "chunks": lambda m, x: (lambda y: torch.cat([y[1], y[0] + y[1]], 1))(relu(m.a(x)).chunk(2, 1)),
    "triangle": lambda m, x: (relu(m.a(x))[:, :, None] @ m.gain[None]).tril().sum(1),
    "gated by the input": lambda m, x: relu(m.a(x)) * x,
    "gated by a mean of inputs": lambda m, x: relu(m.a(x)) * x.mean(1, keepdim=True),
    "product of inputs": lambda m, x: m.a(x * x),
    "divided by the input": lambda m, x: relu(m.a(x)) / (1 + x.abs()),
    "normalized input": lambda m, x: relu(m.a(F.layer_norm(x, (4,)))),
    "attention over inputs": lambda m, x: (
        lambda y, v: F.scaled_dot_product_attention(y, 2 * y, v)[:, :, 0]
    )(x[:, :, None].expand(-1, 4, 2), relu(m.a(x))[:, :, None].expand(-1, 4, 2)),
    "embedding": lambda m, x: relu(m.a(m.table((x[:, 0] > 0).long()))),
    "parameter alone": lambda m, x: m.gain.expand(x.shape[0], 4) + 0 * x,
    "input alone": lambda m, x: x,
}  # fmt: skip

CUTTING = {
    "sigmoid": lambda m, x: m.b(torch.sigmoid(m.a(x))),
    "gate": lambda m, x: relu(m.a(x)) * torch.sigmoid(m.one(x)),
    "product": lambda m, x: relu(m.a(x)) * relu(m.b(x)),
    "wide product": lambda m, x: relu(m.one(x)) * relu(m.a(x)),
    "square": lambda m, x: (lambda y: y * y)(relu(m.a(x))),
    "quotient": lambda m, x: relu(m.a(x)) / (1 + relu(m.b(x))),
    "layer norm": lambda m, x: relu(m.norm(m.a(x))) + x,
    "bounded": lambda m, x: m.b(m.a(x).clamp(0, 6)),
    "softmax": lambda m, x: F.softmax(m.a(x), 1) + relu(m.b(x)),
    "matrix product": lambda m, x: (relu(m.a(x))[:, :, None] @ relu(m.b(x))[:, None, :]).mean(1),
    "attention": lambda m, x: F.scaled_dot_product_attention(
        *(relu(layer(x))[:, :, None] for layer in (m.a, m.b, m.c))
    )[:, :, 0],
    "rounded": lambda m, x: m.b(torch.round(m.a(x))),
    "unknown": lambda m, x: m.b(torch.sinc(m.a(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_agree_with_the_lifting_pass_and_realize_the_model(name):
    model = net(lambda m, x: m.head(FUNCTIONS[name](m, x)))
    torch.manual_seed(1)
    assert_agrees(model, torch.randn(1, 4).double())
    assert_realizes(model, torch.randn(5, 4).double())


@pytest.mark.parametrize("name", CUTTING)
def test_what_cuts_paths_keeps_the_norms_and_has_no_realization(name):
    model = net(lambda m, x: m.head(CUTTING[name](m, x)))
    torch.manual_seed(1)
    x = torch.randn(3, 4).double()
    assert_agrees(model, x)
    lifting = dagpath.PathLifting(dagpath.trace(model, x))
    with pytest.raises(dagpath.UnsupportedOpError, match=r"networks.py:\d+"):
        lifting.realize(x)


def chain(*values: float) -> nn.Module:
    """Linear layers of one unit with these weights."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in values)).double()
    for layer, value in zip(model, values, strict=True):
        nn.init.constant_(layer.weight, value)
    return model


def test_levels_are_the_rows_of_the_adjacency_and_lead_upwards():
    model = RandomNet(11).double()
    graph = dagpath.trace(model, model.example()).unroll()
    adjacency = graph.adjacency().to_dense()
    torch.testing.assert_close(torch.cat([level.weights.to_dense() for level in graph.levels]), adjacency)
    np.testing.assert_array_equal(graph.to_scipy().toarray(), adjacency.numpy())
    assert torch.equal(adjacency, adjacency.tril(-1))
    level_of = {node: index for index, level in enumerate(graph.levels) for node in level.nodes}
    edges = graph.to_networkx()
    longest = dict.fromkeys(edges, 0)
    for node in networkx.topological_sort(edges):
        longest[node] = max((longest[source] + 1 for source in edges.predecessors(node)), default=0)
    assert longest == level_of


def test_the_networkx_graph_has_readable_attributes():
    graph = dagpath.trace(nn.Sequential(nn.Linear(1, 2), nn.ReLU()), torch.zeros(1, 1)).unroll().to_networkx()
    assert [graph.nodes[node]["name"] for node in sorted(graph)] == [
        *("1", "input[0]", "0 linear[0]", "0 linear[1]", "1 relu[0]", "1 relu[1]")
    ]
    assert graph.nodes[2]["module"] == "0"
    assert graph.nodes[2]["operation"] == "linear"
    assert graph.nodes[3]["index"] == (0, 1)
    assert graph.nodes[4]["level"] == 2
    assert sorted(graph.edges) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 5)]


def test_the_derivative_of_edges_is_that_of_their_weights():
    """Against finite differences of the adjacency's values: every weight is affine in each parameter."""
    model = RandomNet(5).double()
    traced = dagpath.trace(model, model.example())
    before = traced.unroll()
    derivative = before.derivative().to_dense()
    elements = [(parameter.data.view(-1), i) for parameter in model.parameters() for i in range(parameter.numel())]
    for column, (flat, place) in enumerate(elements):
        old = flat[place].clone()
        flat[place] += 0.5
        change = (traced.unroll().weights - before.weights) / 0.5
        flat[place] = old
        torch.testing.assert_close(change, derivative[:, column], rtol=1e-9, atol=1e-12)


def test_masses_of_a_chain_in_closed_form():
    graph = dagpath.trace(chain(2.0, -3.0, 5.0), torch.zeros(1, 1).double()).unroll()
    nodes = [graph.name(node) for node in range(graph.num_nodes)].index
    places = [nodes(name) for name in ("input[0]", "0 linear[0]", "1 linear[0]", "2 linear[0]")]
    assert graph.forward_mass(1)[places].tolist() == [1.0, 2.0, 6.0, 30.0]
    assert graph.backward_mass(2)[places].tolist() == [900.0, 225.0, 25.0, 1.0]
    assert graph.gram_diagonal()["1.weight"].tolist() == [[100.0]]


def test_counts_beyond_any_float_are_exact():
    depth = 400
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(depth)))
    assert dagpath.trace(model, torch.zeros(1, 8)).unroll().path_count() == 8 ** (depth + 1)


def test_a_pruned_weight_counts_and_a_constant_zero_does_not():
    model = net(lambda m, x: F.linear(x, m.a.weight * m.mask))
    nn.init.zeros_(model.a.weight)
    graph = dagpath.trace(model, torch.zeros(1, 4)).unroll()
    assert graph.path_count() == int((model.mask != 0).sum())


def test_unrolling_sees_the_weights_of_its_time():
    model = chain(2.0, 3.0)
    traced = dagpath.trace(model, torch.zeros(1, 1).double())
    old = traced.unroll()
    nn.init.constant_(model[0].weight, 10.0)
    assert (old.path_norm(1), traced.unroll().path_norm(1)) == (6.0, 30.0)


def test_a_rule_without_paths_names_the_operation_and_its_place():
    class Rule(Operation):
        def neurons(self, flow, call):
            return call.args[0]

    @torch.library.custom_op("dagpath_unroll::same", mutates_args=())
    def same(x: Tensor) -> Tensor:
        return x.clone()

    same.register_fake(torch.empty_like)
    dagpath.register_op("dagpath_unroll::same", Rule())
    model = net(lambda m, x: m.b(same(m.a(x))))
    with pytest.raises(dagpath.UnsupportedOpError, match=r"same.*networks.py.*Rule.*'paths'"):
        dagpath.trace(model, torch.zeros(1, 4)).unroll()


def test_registered_operations_are_unrolled_by_their_rule():
    @torch.library.custom_op("dagpath_unroll::swap", mutates_args=())
    def swap(x: Tensor) -> Tensor:
        return x.flip(-1)

    @torch.library.custom_op("dagpath_unroll::bent", mutates_args=())
    def bent(x: Tensor) -> Tensor:
        return torch.where(x > 0, 2 * x, 0.5 * x)

    for operation in (swap, bent):
        operation.register_fake(torch.empty_like)
    dagpath.register_op("dagpath_unroll::swap", "movement")
    dagpath.register_op("dagpath_unroll::bent", "homogeneous")
    model = net(lambda m, x: m.head(swap(bent(m.a(x)))))
    assert_agrees(model, torch.randn(1, 4).double())
    assert_realizes(model, torch.randn(4, 4).double())


@pytest.mark.parametrize("p", [0.5, 0, math.inf, math.nan, "2"])
def test_masses_need_p_of_at_least_one(p):
    graph = dagpath.trace(chain(1.0), torch.zeros(1, 1).double()).unroll()
    for quantity in (graph.path_norm, graph.forward_mass, graph.backward_mass):
        with pytest.raises(ValueError, match=r"p must be a finite"):
            quantity(p)


def test_a_number_of_a_tensor_is_a_gate():
    model = net(lambda m, x: relu(m.a(x)) * x.amax().item())
    x = torch.randn(1, 4).double()
    assert_agrees(model, x)
    assert_realizes(model, x)


def test_a_model_without_values():
    with torch.device("meta"):
        model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'weight' is on the meta device"):
        dagpath.trace(model, torch.zeros(1, 1, device="meta")).unroll()


@pytest.mark.parametrize("node", [-1, 3])
def test_a_node_that_is_not_there(node):
    graph = dagpath.trace(chain(1.0), torch.zeros(1, 1).double()).unroll()
    for quantity in (graph.name, graph.site, graph.index):
        with pytest.raises(ValueError, match=rf"from 0 to 2, got {node}"):
            quantity(node)
