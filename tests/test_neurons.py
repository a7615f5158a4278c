"""Which neurons are free: hand-counted networks, ties, and what fixes the rest."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import dagpath

from networks import Net, RandomNet


def groups(model: nn.Module, *shape: int) -> int:
    return dagpath.trace(model.eval(), torch.randn(*shape)).graph.num_groups


def rescaled_is_bitwise_equal(model: nn.Module, x: Tensor, training: bool = False) -> bool:
    model.train(training)
    with torch.no_grad():
        before = model(x)
        rescaling = dagpath.random_rescaling(dagpath.trace(model, x), sigma=3.0, power_of_two=True)
        after = rescaling.apply_()(x)
    return torch.equal(before, after)


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.booleans())
def test_a_power_of_two_rescaling_of_a_random_network_is_bitwise_exact(seed, training):
    net = RandomNet(seed, max_convolutions=6)
    assert rescaled_is_bitwise_equal(net, net.example(4), training)


def test_hidden_units_of_an_mlp_are_free_and_its_outputs_fixed():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = dagpath.trace(net, torch.zeros(1, 3)).graph
    assert (graph.num_neurons, graph.num_groups, graph.num_parameters) == (11, 9, 20 + 24 + 10)
    assert graph.group_of.tolist() == [*range(1, 10), 0, 0]


def test_edges_are_the_elements_that_lead_from_neuron_to_neuron():
    net = Net(
        lambda m, x: m.head(F.prelu(m.stem(x), m.slope) + m.table[:1]), stem=nn.Linear(3, 4), head=nn.Linear(4, 2)
    )
    net.slope, net.table = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(6, 4))
    graph = dagpath.trace(net, torch.zeros(1, 3)).graph
    assert graph.num_edges == (12 + 4) + 4 + (8 + 2)  # no slopes, and one row of the table
    assert graph.num_parameters == graph.num_edges + 4 + 20


def test_incidence_has_the_signs_of_both_ends():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    incidence = dagpath.trace(net, torch.zeros(1, 1)).graph.incidence()
    assert incidence.layout == torch.sparse_csr
    expected = [[1, 0], [0, 1], [1, 0], [0, 1], [-1, 0], [0, -1], [0, 0]]
    assert incidence.to_dense().tolist() == expected


@pytest.mark.parametrize("bias", [True, False])
def test_an_identity_residual_ties_its_stem_to_its_block(bias):
    def forward(m, x):
        x = F.relu(m.stem(x))
        return m.head(F.relu(x + m.second(F.relu(m.first(x)))))

    net = Net(
        forward,
        stem=nn.Linear(3, 6, bias),
        first=nn.Linear(6, 5, bias),
        second=nn.Linear(5, 6, bias),
        head=nn.Linear(6, 2),
    )
    assert groups(net, 1, 3) == 6 + 5
    assert rescaled_is_bitwise_equal(net, torch.randn(4, 3))


def test_a_projection_residual_separates_the_groups():
    def forward(m, x):
        x = F.relu(m.stem(x))
        return m.head(F.relu(m.short(x) + m.second(F.relu(m.first(x)))))

    layers = {"stem": (3, 6), "first": (6, 5), "second": (5, 7), "short": (6, 7), "head": (7, 2)}
    net = Net(forward, **{name: nn.Linear(*sizes) for name, sizes in layers.items()})
    assert groups(net, 1, 3) == 6 + 5 + 7
    assert rescaled_is_bitwise_equal(net, torch.randn(4, 3))


def test_concatenation_ties_nothing():
    def forward(m, x):
        a = F.relu(m.a(x))
        return m.head(torch.cat([a, F.relu(m.b(a))], 1))

    net = Net(forward, a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(3, 4, 1), head=nn.Conv2d(7, 2, 1))
    assert groups(net, 1, 2, 5, 5) == 7


def test_flatten_repeats_a_channel_over_its_positions():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    assert groups(net, 1, 1, 6, 6) == 3
    assert rescaled_is_bitwise_equal(net, torch.randn(2, 1, 6, 6))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), stride=2, dilation=2, padding="valid"), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 2), (2, 4, 5, 5, 5)),
    ],
)
def test_every_convolution_frees_its_channels(layer, shape):
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    net = nn.Sequential(kind(4, 4, 1), nn.ReLU(), layer, nn.ReLU(), kind(layer.out_channels, 1, 1))
    assert groups(net, *shape) == 4 + layer.out_channels
    assert rescaled_is_bitwise_equal(net, torch.randn(shape))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.1, inplace=True),
        nn.PReLU(),
        nn.PReLU(6),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.Dropout(0.5, inplace=True),
        nn.Dropout2d(0.5),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 1, 1),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveMaxPool2d(2),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.Upsample(scale_factor=2),
        nn.PixelShuffle(1),
    ],
)
def test_homogeneous_layers_keep_every_channel_free(layer):
    net = nn.Sequential(nn.Conv2d(2, 6, 1), layer, nn.Conv2d(6, 2, 1))
    assert groups(net, 1, 2, 6, 6) == 6
    assert rescaled_is_bitwise_equal(net, torch.randn(3, 2, 6, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean((-2, -1), keepdim=True).flatten(1),
        lambda x: x.sum(3).sum(2),
        lambda x: x.amax((2, 3)),
        lambda x: x.max(3).values.max(2).values,
        lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
        lambda x: x.flatten(2).transpose(1, 2).mean(1),
        lambda x: torch.stack(x.unbind(2)).mean((0, 3)),
        lambda x: torch.cat(x.chunk(2, 1), 1).mean((2, 3)),
        lambda x: x.view(2, 2, 3, 6, 6).transpose(1, 2).reshape(2, 6, 6, 6).mean((2, 3)),
        lambda x: (x * 2 / 3 - 0.5 * x).mean((2, 3)),
        lambda x: F.relu(x).clamp(min=0).neg().abs().mean((2, 3)),
        lambda x: x[:, :, 1:, ::2].roll(1, 2).flip(3).repeat(1, 1, 2, 2).mean((2, 3)),
    ],
)
def test_data_movement_and_reductions_keep_every_channel_free(function):
    net = Net(lambda m, x: m.head(function(m.conv(x))), conv=nn.Conv2d(2, 6, 1), head=nn.Linear(6, 2))
    x = torch.randn(2, 2, 6, 6)
    assert dagpath.trace(net, x).graph.num_groups == 6
    with torch.no_grad():
        before = net.double()(x.double())
        dagpath.random_rescaling(dagpath.trace(net, x.double())).apply_()
        torch.testing.assert_close(net(x.double()), before, rtol=1e-12, atol=1e-12)


def test_in_place_operations_on_views_are_followed():
    def forward(m, x):
        y = m.a(x)
        y[:, :3].add_(m.b(x))
        F.relu(y, inplace=True)
        return m.head(y)

    net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(4, 3), head=nn.Linear(6, 2))
    assert groups(net, 1, 4) == 6
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_a_value_changed_in_place_is_the_changed_one_for_later_readers():
    def forward(m, x):
        y = m.a(x)
        y.sigmoid_()
        return m.head(y)

    net = Net(forward, a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    assert groups(net, 1, 4) == 0


def test_batch_norm_fixes_its_input_and_frees_its_output():
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 1, 1))
    graph = dagpath.trace(net, torch.zeros(2, 2, 8, 8)).graph
    assert graph.group_of.tolist() == [0] * 5 + [1, 2, 3, 4, 5] + [0]
    assert groups(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)), 2, 3) == 0


@pytest.mark.parametrize("function", [torch.sigmoid, F.gelu, F.relu6, F.softplus, torch.tanh, lambda x: x + 1.0])
def test_what_is_not_homogeneous_fixes_only_what_it_touches(function):
    def forward(m, x):
        return m.head(F.relu(m.b(function(m.a(x)))))

    net = Net(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 7), head=nn.Linear(7, 2))
    assert groups(net, 1, 4) == 7
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_a_gate_is_fixed_and_what_it_multiplies_stays_free():
    def forward(m, x):
        y = F.relu(m.a(x))
        return m.head(y * torch.sigmoid(m.up(F.relu(m.down(y)))))

    net = Net(forward, a=nn.Linear(4, 6), down=nn.Linear(6, 2), up=nn.Linear(2, 6), head=nn.Linear(6, 2))
    assert groups(net, 1, 4) == 6 + 2
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_a_weight_in_two_places_has_the_same_ends_in_both():
    net = Net(lambda m, x: m.head(F.relu(m.a(F.relu(m.a(x))))), a=nn.Linear(4, 4), head=nn.Linear(4, 2))
    assert groups(net, 1, 4) == 0  # its first source is the input, which is fixed
    net = Net(
        lambda m, x: m.head(F.relu(m.a(F.relu(m.a(F.relu(m.stem(x))))))),
        stem=nn.Linear(3, 4),
        a=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    assert groups(net, 1, 3) == 4
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 3))


def test_a_parameter_that_also_enters_an_unknown_operation_is_not_rescaled():
    def forward(m, x):
        return m.head(F.relu(m.a(x))) + torch.tanh(m.a.weight).sum()

    net = Net(forward, a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    assert groups(net, 1, 4) == 0
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_a_computed_weight_ties_what_it_joins():
    def forward(m, x):
        y = F.relu(m.stem(x))
        return m.head(F.relu(F.linear(y, F.normalize(m.a.weight, dim=1), m.a.bias)))

    net = Net(forward, stem=nn.Linear(3, 4), a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    assert groups(net, 1, 3) == 1
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 3))


def test_parameters_moved_before_use_keep_their_ends():
    def forward(m, x):
        first, second = m.packed.chunk(2)
        y = F.relu(F.linear(x, first))
        return F.linear(F.relu(F.linear(y, second.t().contiguous())), m.head)

    net = Net(forward)
    net.packed, net.head = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(2, 4))
    assert groups(net, 1, 4) == 8
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_masked_weights_are_rescaled_at_the_stored_tensor():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.random_unstructured(net[0], "weight", amount=0.5)
    assert groups(net, 1, 4) == 6
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_a_layer_scale_and_a_learned_bias_are_edges():
    def forward(m, x):
        return m.head(F.relu(m.gain * m.a(x) + m.shift))

    net = Net(forward, a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    net.gain, net.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6))
    assert groups(net, 1, 4) == 12
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_a_scalar_gain_is_left_alone_and_ties_nothing():
    net = Net(lambda m, x: m.head(m.gain * F.relu(m.a(x))), a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    net.gain = nn.Parameter(torch.tensor(0.3))
    assert groups(net, 1, 4) == 6
    assert rescaled_is_bitwise_equal(net, torch.randn(5, 4))


def test_auxiliary_heads_of_train_mode_follow():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x):
            y = F.relu(self.a(x))
            return torch.cat([self.head(y), self.aux(y)], 1) if self.training else self.head(y)

    for training in (False, True):
        assert rescaled_is_bitwise_equal(Aux(), torch.randn(5, 4), training)


def test_an_unknown_operation_is_named_with_its_module_and_line():
    net = Net(lambda m, x: m.b(m.a(x).cumprod(1)), a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    traced = dagpath.trace(net, torch.zeros(1, 4))
    assert "Operations without a rule" in traced.explain()
    assert [entry["operation"] for entry in traced.explain(format="dict")["without_rule"]] == ["cumprod"]
    assert traced.graph.num_groups == 0


def test_a_fixed_neuron_is_traced_to_its_module_and_line():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    net = nn.Sequential(nn.Linear(4, 3), Inner(), nn.Linear(3, 2))
    graph = dagpath.trace(net, torch.zeros(1, 4)).graph
    site = graph.causes[graph.cause_of[0]].site
    assert (site.operation, site.module) == ("tanh", "1")
    assert site.source.startswith(f"{__file__}:")
    assert site.source.endswith("(return torch.tanh(x))")


def test_explain_says_what_is_free_and_what_normalization_fixed():
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 1, 1))
    text = dagpath.trace(net, torch.zeros(2, 2, 8, 8)).explain()
    assert "Sequential: 11 neurons, 5 free in 5 groups, 6 fixed" in text
    assert "feeds a normalization" in text
    assert "an output of the model" in text
