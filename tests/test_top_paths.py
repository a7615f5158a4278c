"""The heaviest paths, against all paths by brute force."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath

from networks import RandomNet, ScalarGraph
from test_lifting import small_net

seeds = st.integers(0, 2**31 - 1)


def paths_of(net: RandomNet) -> dict[tuple, float]:
    """Every path as its elements, with its largest value over positions, by walking the graph of scalar activations."""
    graph = ScalarGraph(net)
    found: dict[tuple, float] = {}

    def walk(node: int, elements: tuple, value: float) -> None:
        if node not in graph.into:
            if node in graph.inputs or node == -1:
                found[elements] = max(found.get(elements, 0.0), abs(value))
            return
        for source, edge, terms in graph.into[node]:
            element = tuple(terms)[:1]  # of the constant of a batch norm, its bias
            walk(source, element + elements, value * edge)

    for output in graph.outputs:
        walk(output, (), 1.0)
    return found


def element_keys(path: dagpath.ChannelPath) -> tuple:
    return tuple((element.parameter, element.index) for element in path.elements)


def constants_depend_on_the_position(net: RandomNet) -> bool:
    return any(
        isinstance(layer, nn.AdaptiveAvgPool2d) or (isinstance(layer, nn.AvgPool2d) and not layer.count_include_pad)
        for layer in net.layers
    )


@settings(max_examples=40)
@given(seeds, st.sampled_from([1, 5, 30]))
def test_top_paths_are_the_largest_of_all(seed, k):
    net = small_net(seed, 2_000)
    assume(not constants_depend_on_the_position(net))
    truth = paths_of(net)
    traced = dagpath.trace(net, net.example())
    found = dagpath.top_paths(traced, k, progress=False)
    expected = sorted((value for value in truth.values() if value > 0), reverse=True)[:k]
    assert [path.value for path in found] == pytest.approx(expected, rel=1e-10)
    assert len({element_keys(path) for path in found}) == len(found)
    for path in found:
        assert path.value == pytest.approx(truth[element_keys(path)], rel=1e-10)


@settings(max_examples=25)
@given(seeds)
def test_a_rescaling_leaves_the_heaviest_paths_where_they_are(seed):
    net = RandomNet(seed, 5).double()
    traced = dagpath.trace(net, net.example())
    before = dagpath.top_paths(traced, 3, progress=False)
    dagpath.random_rescaling(traced, 1.0, generator=torch.Generator().manual_seed(seed)).apply_()
    after = dagpath.top_paths(traced, 3, progress=False)
    assert [path.value for path in after] == pytest.approx([path.value for path in before], rel=1e-10)


def gate(m, x):
    y = F.relu(m.a(x))
    return m.head(y * torch.sigmoid(m.b(y)))


def low_rank(m, x):
    return m.head(F.relu(F.linear(x, m.a.weight + m.up @ m.down, m.a.bias)))


one_position = {
    "residual": lambda m, x: m.head(F.relu(m.b(F.relu(m.a(x))) + m.a(x))),
    "scaled residual": lambda m, x: m.head(torch.add(m.a(x), m.b(m.a(x)), alpha=0.3)),
    "constant factors": lambda m, x: m.head(F.relu(m.a(x / 3)) * torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 3.0]) * 0.7),
    "constant summand": lambda m, x: m.head(F.relu(m.a(x) + 0.25)),
    "constant tensor": lambda m, x: m.head(F.relu(m.a(x) + torch.arange(6.0))),
    "fixed projection": lambda m, x: m.head(F.linear(m.a(x), torch.eye(6, dtype=x.dtype) * 0.5)),
    "a sum over neurons": lambda m, x: m.head(m.a(x).sum(1, keepdim=True).expand(-1, 6)),
    "a mean over neurons": lambda m, x: m.head(m.a(x).view(-1, 3, 2).mean(2).repeat(1, 2)),
    "a maximum over neurons": lambda m, x: m.head(m.a(x).view(-1, 2, 3).amax(1).repeat(1, 2)),
    "batch norm": lambda m, x: m.head(F.relu(m.norm(m.a(x)))),
    "batch norm without gain": lambda m, x: m.head(F.relu(m.plain(m.a(x)))),
    "layer norm": lambda m, x: m.head(F.relu(m.layer(m.a(x)))),
    "barrier": lambda m, x: m.head(torch.sigmoid(m.b(F.relu(m.a(x))))),
    "gate": gate,
    "a learned bias": lambda m, x: m.head(F.relu(m.a(x) + m.shift) + m.a(x)),
    "a learned gain": lambda m, x: m.head(F.relu(m.gain * m.a(x))),
    "a learned scalar": lambda m, x: m.head(F.relu(m.scalar * m.a(x))),
    "a maximum of two": lambda m, x: m.head(torch.maximum(m.a(x), 0.5 * m.b(m.a(x)))),
    "a shared weight": lambda m, x: m.head(m.b(F.relu(m.b(F.relu(m.a(x)))))),
    "two outputs": lambda m, x: (m.a(x), {"second": m.head(F.relu(m.a(x)))}),
    "a mask": lambda m, x: m.head(F.linear(x, m.a.weight * torch.tensor([1.0, 0.0, 2.0, 1.0]))),
    "a low-rank update": low_rank,
    "weights in parts": lambda m, x: F.linear(F.linear(x, m.packed[:3]), m.packed[3:, :3]),
    "channels in parts": lambda m, x: m.head(torch.cat([part * 2 for part in m.a(x).chunk(2, 1)], 1)),
    "where": lambda m, x: m.head(torch.where(m.a(x) > 0, m.a(x), 0.1 * m.b(m.a(x)))),
}


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.plain, self.layer = nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.LayerNorm(6)
        self.shift, self.gain = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.scalar, self.packed = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(5, 4))
        self.up, self.down = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))
        for norm in (self.norm, self.plain):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        for affine in (self.norm, self.layer):
            nn.init.normal_(affine.weight)
            nn.init.normal_(affine.bias)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("name", one_position)
def test_where_there_is_one_position_all_paths_make_the_path_norm(name):
    traced = dagpath.trace(Net(one_position[name]).double().eval(), torch.randn(1, 4, dtype=torch.float64))
    paths = dagpath.top_paths(traced, 10**6, progress=False)
    for p in (1, 2):
        assert sum(path.value**p for path in paths) == pytest.approx(dagpath.path_norm(traced, p) ** p, rel=1e-9)
    assert sum(path.share for path in paths) == pytest.approx(1.0)


def test_a_mean_over_positions_belongs_to_the_value_and_a_kernel_element_to_the_path():
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 10.0).view(1, 1, 3, 3))
        net[3].weight.fill_(5.0)
        net[3].bias.fill_(1.0)
    first, *_, last = dagpath.top_paths(dagpath.trace(net, torch.zeros(1, 1, 2, 2)), 10, progress=False)
    assert (first.neurons, first.value) == (("input", "0.0", "3.0"), pytest.approx(9 * 5 / 4))
    assert list(map(str, first.elements)) == ["0.weight[0, 0, 2, 2]", "3.weight[0, 0]"]
    assert (last.neurons, last.value, last.end) == (("(1)", "3.0"), 1.0, "output")


def test_kernel_elements_that_read_only_padding_are_on_no_path():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(1, 1, bias=False))
    nn.init.constant_(net[0].weight, 7.0)
    with torch.no_grad():
        net[0].weight[0, 0, 1, 1] = 2.0
        net[2].weight.fill_(3.0)
    (only,) = dagpath.top_paths(dagpath.trace(net, torch.zeros(1, 1, 1, 1)), 5, progress=False)
    assert only.value == pytest.approx(6.0)
    assert only.elements[0].index == (0, 0, 1, 1)


def test_values_beyond_float64_have_logarithms():
    net = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(400)])
    for layer in net:
        nn.init.constant_(layer.weight, 10.0)
    (path,) = dagpath.top_paths(dagpath.trace(net, torch.zeros(1, 1)), 3, progress=False)
    assert path.log_value == pytest.approx(400 * math.log(10))
    assert (path.value, path.share) == (math.inf, pytest.approx(1.0))


@pytest.mark.parametrize("k", [0, -3, 1.5])
def test_k_is_at_least_one(k):
    traced = dagpath.trace(nn.Linear(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=rf"k must be an integer of at least 1, got {k}"):
        dagpath.top_paths(traced, k)


@pytest.mark.parametrize("alpha", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_entries_that_are_added_by_an_index_keep_all_their_paths(alpha, batch):
    class Added(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(5, 5), torch.nn.Linear(6, 2)
            self.register_buffer("index", torch.tensor([0, 2, 0, 2, 2]))  # several are added to one entry

        def forward(self, x):
            added = torch.relu(self.a(x)).index_add(1, self.index, torch.relu(self.c(x)), alpha=alpha)
            return self.head(added)

    torch.manual_seed(0)
    traced = dagpath.trace(Added().double(), torch.randn(batch, 5, dtype=torch.float64))
    paths = dagpath.top_paths(traced, 10**4, progress=False)
    assert len(paths) == dagpath.path_count(traced)
    assert sum(path.value for path in paths) == pytest.approx(dagpath.path_norm(traced, 1), rel=1e-12)
