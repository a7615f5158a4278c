"""Every operation: what stays free, that rescalings are exact, and that path masses are those of the dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dagpath

from networks import Net


def check(net: nn.Module, x, groups: int, kwargs=None) -> None:
    """The number of free groups; bitwise equality in both modes; invariance of path-norms; diag(G) of the rescaled."""
    inputs, kwargs = (x,) if isinstance(x, Tensor) else x, kwargs or {}
    traced = dagpath.trace(net.eval(), inputs, kwargs)
    assert traced.graph.num_groups == groups, traced.explain()
    saved = [parameter.detach().clone() for parameter in net.parameters()]
    norms = [dagpath.path_norm(traced, p, log=True) for p in (1, 2)]
    gram = dagpath.gram_diagonal(traced)
    rescaling = dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True)
    multipliers = rescaling.multipliers()
    for training in (False, True):
        net.train(training)
        with torch.no_grad():
            torch.manual_seed(0)
            before = net(*inputs, **kwargs)
            rescaling.apply_()
            torch.manual_seed(0)
            after = net(*inputs, **kwargs)
            if not training:
                net.eval()
                assert [dagpath.path_norm(traced, p, log=True) for p in (1, 2)] == pytest.approx(norms, rel=1e-9)
                for name, values in dagpath.gram_diagonal(traced).items():
                    torch.testing.assert_close(values, gram[name] / multipliers[name] ** 2, rtol=1e-9, atol=0)
            for parameter, values in zip(net.parameters(), saved, strict=True):
                parameter.copy_(values)
        assert torch.equal(before, after)


def transposed(dimensions: int, groups: int) -> nn.Module:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimensions]
    return kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_transposed_convolutions(dimensions, groups):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    net = nn.Sequential(kind(2, 4, 1), nn.ReLU(), transposed(dimensions, groups), nn.ReLU(), kind(6, 1, 1))
    check(net, torch.randn(2, 2, *[3] * dimensions), 10)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda m, x: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=True),
        lambda m, x: F.interpolate(x, size=(3, 7), mode="bilinear", antialias=True),
        lambda m, x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
        lambda m, x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda m, x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        lambda m, x: F.interpolate(x[:, :, 0], scale_factor=2, mode="linear").unsqueeze(2),
        lambda m, x: F.interpolate(x.unsqueeze(2), scale_factor=2, mode="trilinear")[:, :, 0],
        lambda m, x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
        lambda m, x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1),
        lambda m, x: x.cumsum(2),
        lambda m, x: x.roll((1, 2), (2, 3)).repeat(1, 1, 2, 1).expand(-1, -1, -1, -1),
        lambda m, x: torch.stack(x.unbind(3), 3).flip(3),
        lambda m, x: x[:, [2, 0, 1, 3, 5, 4]][..., torch.tensor([0, 2, 2])],
        lambda m, x: x.index_select(2, torch.tensor([3, 1])),
        lambda m, x: F.pad(x, (1, 2, 0, 1)),
        lambda m, x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
        lambda m, x: torch.maximum(x, torch.zeros_like(x)),
        lambda m, x: torch.max(x, torch.zeros(())),
        lambda m, x: torch.where(torch.eye(6, dtype=torch.bool), x, 0.1 * x),
        lambda m, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 0.0),
        lambda m, x: x * torch.sigmoid(torch.ones(6, 1, 1)) / 3,
        lambda m, x: x.to(torch.float64).to(torch.float32),
        lambda m, x: torch.einsum("bchw,hv->bcvw", x, torch.ones(6, 2)),
        lambda m, x: torch.tril(x),
        lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat_interleave(4, 1), 2), 2)[:, ::4],
    ],
)
def test_operations_that_leave_every_channel_free(function):
    net = Net(lambda m, x: m.head(function(m, m.stem(x))), stem=nn.Conv2d(2, 6, 1), head=nn.Conv2d(6, 2, 1))
    traced = dagpath.trace(net, torch.randn(2, 2, 6, 6))
    assert traced.graph.num_groups == 6, traced.explain()
    x = torch.randn(2, 2, 6, 6)
    with torch.no_grad():
        before = net(x)
        norm = dagpath.path_norm(traced, 1)
        dagpath.random_rescaling(traced, sigma=2.0, power_of_two=True).apply_()
        assert torch.equal(net(x), before)
    assert dagpath.path_norm(traced, 1) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize(
    ("function", "groups"),
    [
        (lambda m, x: F.relu(x @ m.a + m.b) @ m.c, 5),
        (lambda m, x: F.relu(torch.mm(x, m.a)) @ m.c, 5),
        (lambda m, x: torch.addmm(m.d, F.relu(torch.addmm(m.b, x, m.a)), m.c), 5),
        (lambda m, x: torch.einsum("bi,ij->bj", F.relu(torch.einsum("ni,io->no", x, m.a)), m.c), 5),
        (lambda m, x: torch.einsum("...i,ij->...j", F.relu(torch.einsum("b...,io->b...o", x, m.a[:1])), m.c), 5),
        (lambda m, x: (m.c.t() @ F.relu(m.a.t() @ x.t())).t(), 5),
        (lambda m, x: F.linear(F.relu(F.linear(x, m.a.t(), m.b)), m.c.t()), 5),
        (lambda m, x: F.relu(torch.matmul(x.unsqueeze(1), m.a)).squeeze(1) @ m.c, 5),
        (lambda m, x: F.relu(torch.bmm(x.expand(3, -1, -1), m.a.expand(3, -1, -1))).sum(0) @ m.c, 5),
        (lambda m, x: F.relu(x * m.e) @ m.a, 4),
    ],
)
def test_products_with_parameters_are_layers(function, groups):
    sizes = {"a": (4, 5), "b": (5,), "c": (5, 2), "d": (2,), "e": (4,)}
    check(Net(function, **{name: torch.randn(size) for name, size in sizes.items()}), torch.randn(3, 4), groups)


def test_a_tensor_that_is_operand_and_bias_is_both():
    def product(m, y):
        return torch.addmm(y, y, m.mix)

    nets = []
    for function in (product, lambda m, y: y + y @ m.mix, lambda m, y: torch.addmm(y.clone(), y.clone(), m.mix)):
        torch.manual_seed(0)
        net = Net(lambda m, x, f=function: m.head(f(m, F.relu(m.a(x)))), a=nn.Linear(3, 4), mix=1e3 * torch.randn(4, 4))
        net.head = nn.Linear(4, 2)
        check(net, torch.randn(3, 3), 4)
        nets.append(net)
    first, *others = ([dagpath.path_norm(dagpath.trace(net, torch.zeros(1, 3)), p) for p in (1, 2, 40)] for net in nets)
    assert others == [pytest.approx(first, rel=1e-9)] * 2


def test_batched_parameters_have_neurons_of_their_own():
    net = Net(
        lambda m, x: torch.bmm(F.relu(torch.bmm(x.expand(3, -1, -1), m.a)), m.b),
        a=torch.randn(3, 4, 5),
        b=torch.randn(3, 5, 2),
    )
    check(net, torch.randn(2, 4), 15)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (2, 6)),
        (nn.LayerNorm((3, 6)), (2, 3, 6)),
        (nn.RMSNorm(6), (2, 6)),
        (nn.GroupNorm(2, 6), (2, 6, 4)),
        (nn.InstanceNorm1d(6, affine=True), (2, 6, 4)),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (2, 6, 4, 4)),
        (nn.BatchNorm1d(6), (4, 6)),
        (nn.BatchNorm3d(6), (2, 6, 2, 2, 2)),
    ],
)
def test_the_affine_output_of_a_normalization_is_free(norm, shape):
    last = isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    head = nn.Linear(6, 2) if last else {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    head = head if last else (head(6, 2) if len(shape) == 2 else head(6, 2, 1))
    net = nn.Sequential(norm, nn.ReLU(), head)
    check(net, torch.randn(shape), 6)


def test_attention_frees_its_values():
    def forward(m, x):
        q, k, v = m.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(1, 2).reshape(2, 5, 8))

    net = Net(forward, qkv=nn.Linear(6, 24), out=nn.Linear(8, 3))
    check(net, torch.randn(2, 5, 6), 8)
    net = Net(
        lambda m, x: m.out(torch.softmax(m.q(x) @ m.k(x).transpose(1, 2), -1) @ m.v(x)),
        **{name: nn.Linear(6, 8) for name in "qkv"},
        out=nn.Linear(8, 3),
    )
    check(net, torch.randn(2, 5, 6), 8)


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_encoder_layer_with_relu(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="relu", batch_first=True, dropout=0.1).train(training)
    x = torch.randn(2, 5, 8)
    traced = dagpath.trace(layer, x)
    # 8 values and 16 hidden units of the feed-forward; the first norm's output feeds a sum that is normalized again
    assert traced.graph.num_groups == 8 + 16
    with torch.no_grad():
        torch.manual_seed(0)
        before = layer(x)
        dagpath.random_rescaling(traced, power_of_two=True).apply_()
        torch.manual_seed(0)
        after = layer(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_mlp_mixer_block():
    def forward(m, x):
        y = m.norm_a(x).transpose(1, 2)
        x = x + m.token_b(F.relu(m.token_a(y))).transpose(1, 2)
        return x + m.channel_b(F.relu(m.channel_a(m.norm_b(x))))

    net = Net(
        forward,
        norm_a=nn.LayerNorm(6),
        token_a=nn.Linear(5, 7),
        token_b=nn.Linear(7, 5),
        norm_b=nn.LayerNorm(6),
        channel_a=nn.Linear(6, 9),
        channel_b=nn.Linear(9, 6),
    )
    # norm_a: token mixing shares its weights over channels, so its 6 outputs share one scale; norm_b: 6; hidden: 7 + 9
    check(net, torch.randn(2, 5, 6), 1 + 7 + 6 + 9)


def test_a_squeeze_excite_block():
    def forward(m, x):
        y = F.relu(m.conv(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3), keepdim=True)))))
        return m.head(y * gate)

    net = Net(forward, conv=nn.Conv2d(2, 6, 1), down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1), head=nn.Conv2d(6, 2, 1))
    check(net, torch.randn(2, 2, 4, 4), 6 + 3)


def test_an_inverted_residual_block():
    def forward(m, x):
        x = m.stem(x)
        y = F.relu(m.bn_a(m.expand(x)))
        y = F.relu(m.bn_b(m.depthwise(y)))
        return m.head(x + m.bn_c(m.project(y)))

    net = Net(
        forward,
        stem=nn.Conv2d(2, 4, 1),
        expand=nn.Conv2d(4, 12, 1, bias=False),
        bn_a=nn.BatchNorm2d(12),
        depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        bn_b=nn.BatchNorm2d(12),
        project=nn.Conv2d(12, 4, 1, bias=False),
        bn_c=nn.BatchNorm2d(4),
        head=nn.Conv2d(4, 2, 1),
    )
    check(net, torch.randn(2, 2, 4, 4), 12 + 12 + 4)


def test_a_u_net_with_concatenation():
    def forward(m, x):
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2)))
        up = F.interpolate(m.c(b), scale_factor=2, mode="bilinear")
        return m.head(F.relu(m.d(torch.cat([a, up], 1))))

    net = Net(
        forward,
        a=nn.Conv2d(2, 4, 3, padding=1),
        b=nn.Conv2d(4, 8, 3, padding=1),
        c=nn.Conv2d(8, 5, 1),
        d=nn.Conv2d(9, 6, 3, padding=1),
        head=nn.Conv2d(6, 1, 1),
    )
    check(net, torch.randn(2, 2, 8, 8), 4 + 8 + 5 + 6)


def test_a_channel_shuffle_keeps_channels_apart():
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ChannelShuffle(3), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 1, 1))
    check(net, torch.randn(2, 2, 4, 4), 12)


def test_weight_norm_is_rescaled_at_its_magnitudes():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU())
    net.append(nn.Linear(5, 2))
    # the magnitude of a row multiplies the whole row: its sources share a scale, its own stays free
    traced = dagpath.trace(net, torch.randn(2, 3))
    assert traced.graph.num_groups == 1 + 5
    check(net, torch.randn(2, 3), 6)


@pytest.mark.filterwarnings("ignore:.*cannot be captured in train mode")  # by torch.export of PyTorch 2.6
def test_spectral_norm_ties_its_inputs_to_its_outputs():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(4, 5)), nn.ReLU())
    net.append(nn.Linear(5, 2))
    x = torch.randn(2, 3)
    traced = dagpath.trace(net.eval(), x)
    assert traced.graph.num_groups == 1
    with torch.no_grad():
        before = net(x)
        dagpath.random_rescaling(traced, power_of_two=True).apply_()
        torch.testing.assert_close(net(x), before)


def test_a_standardized_weight_is_a_constant_that_ties_what_it_joins():
    def forward(m, x):
        weight = F.batch_norm(m.conv.weight.reshape(1, 6, -1), None, None, training=True).reshape_as(m.conv.weight)
        return m.head(F.relu(F.conv2d(F.relu(m.stem(x)), weight, m.conv.bias)))

    net = Net(forward, stem=nn.Conv2d(2, 4, 1), conv=nn.Conv2d(4, 6, 3), head=nn.Conv2d(6, 2, 1))
    traced = dagpath.trace(net, torch.randn(2, 2, 5, 5))
    assert (traced.graph.num_neurons, traced.graph.num_groups) == (4 + 2, 1)  # constant weights make no neurons
    check(net, torch.randn(2, 2, 5, 5), 1)


def test_an_lstm_is_fixed_whole_and_its_neighbours_stay_free():
    net = Net(
        lambda m, x: m.c(F.relu(m.b(m.lstm(m.a(x))[0]))),
        a=nn.Linear(3, 4),
        lstm=nn.LSTM(4, 5, batch_first=True),
        b=nn.Linear(5, 6),
        c=nn.Linear(6, 2),
    )
    traced = dagpath.trace(net, torch.randn(2, 7, 3))
    assert traced.graph.num_groups == 6
    assert "lstm.weight_ih_l0" in traced.graph.not_edges


def test_an_embedding_feeds_free_neurons():
    net = Net(lambda m, i: m.head(F.relu(m.table(i))), table=nn.Embedding(10, 6), head=nn.Linear(6, 2))
    check(net, torch.randint(0, 10, (2, 5)), 6)


def test_tied_embeddings_and_head():
    net = Net(lambda m, i: m.head(F.relu(m.mix(m.table(i)))), table=nn.Embedding(10, 6), mix=nn.Linear(6, 6))
    net.head = nn.Linear(6, 10, bias=False)
    net.head.weight = net.table.weight
    check(net, torch.randint(0, 10, (2, 5)), 0)


@pytest.mark.parametrize(
    ("function", "inputs", "kwargs"),
    [
        (lambda m, x, y: {"out": m.b(F.relu(m.a(x))), "other": [m.b(y)]}, (torch.randn(2, 3), torch.randn(2, 4)), {}),
        (lambda m, x, scale=1.0: (m.b(F.relu(m.a(x))) * scale,), (torch.randn(2, 3),), {"scale": 2.0}),
        (lambda m, x, *, y: m.b(F.relu(m.a(x))) + y, (torch.randn(2, 3),), {"y": torch.randn(2, 2)}),
    ],
)
def test_inputs_and_outputs_of_any_structure(function, inputs, kwargs):
    net = Net(function, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert dagpath.trace(net, inputs, kwargs).graph.num_groups in (0, 4)
    assert dagpath.rescale_(net, inputs, kwargs=kwargs).converged


def test_a_model_on_the_meta_device_traces():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        traced = dagpath.trace(net, torch.zeros(1, 3))
    assert traced.graph.num_groups == 4
    with pytest.raises(ValueError, match="meta device"):
        dagpath.balance(traced)


def affine_map(stage: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Matrix and offset of an affine module on one example of a shape."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    offset = stage(zero).detach().reshape(-1)
    matrix = torch.autograd.functional.jacobian(stage, zero).reshape(len(offset), -1)
    return matrix, offset


@pytest.mark.parametrize(
    ("stages", "shape"),
    [
        ([nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 3, stride=2)], (2, 5)),
        ([nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 2, 2)], (2, 3, 4)),
        ([nn.Conv3d(1, 2, 2), nn.ConvTranspose3d(2, 1, 2)], (1, 3, 3, 3)),
        ([nn.Conv2d(1, 2, 2), nn.Upsample(size=(5, 7), mode="bilinear"), nn.Conv2d(2, 1, 2)], (1, 4, 4)),
        ([nn.Conv2d(1, 2, 2), nn.Upsample(scale_factor=2, mode="bicubic"), nn.Conv2d(2, 1, 2)], (1, 4, 4)),
        ([nn.Conv3d(1, 2, 2), nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(2, 1, 2)], (1, 3, 3, 3)),
        ([nn.Conv2d(1, 2, 1), nn.Unfold(2, padding=1, stride=2), nn.Flatten(), nn.Linear(72, 2)], (1, 4, 4)),
        ([nn.Conv2d(1, 2, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)], (1, 6, 5)),
        ([nn.Conv2d(1, 2, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True)], (1, 6, 5)),
        ([nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, divisor_override=3)], (1, 6, 5)),
        ([nn.Conv1d(1, 2, 1), nn.AvgPool1d(3, 2, 1)], (1, 7)),
        ([nn.Conv1d(1, 2, 1), nn.AdaptiveAvgPool1d(3)], (1, 7)),
        ([nn.Conv3d(1, 2, 1), nn.AdaptiveAvgPool3d((2, 1, 3))], (1, 5, 3, 4)),
        ([nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)], (3,)),
    ],
)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_path_norms_are_products_of_the_dense_matrices(stages, shape, p):
    net = nn.Sequential(*stages).double().eval()
    mass, size = torch.ones(torch.Size(shape).numel(), dtype=torch.float64), torch.Size(shape)
    for stage in stages:
        matrix, offset = affine_map(stage, size)
        mass = matrix.abs() ** p @ mass + offset.abs() ** p
        size = stage(torch.zeros(1, *size, dtype=torch.float64)).shape[1:]
    traced = dagpath.trace(net, torch.zeros(1, *shape, dtype=torch.float64))
    assert dagpath.path_norm(traced, p) == pytest.approx(float(mass.sum()) ** (1 / p), rel=1e-10)


def test_graph_modules_and_exported_programs_are_models():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    check(torch.fx.symbolic_trace(net), x, 4)
    program = torch.export.export(net, (x,))
    before = net(x)
    rescaling = dagpath.rescale_(program, x)
    assert rescaling.traced.graph.num_groups == 4
    torch.testing.assert_close(program.module()(x), before)


def test_a_distributed_model_is_unwrapped(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
        wrapped = nn.parallel.DistributedDataParallel(net)
        rescaling = dagpath.rescale_(wrapped, x)
        assert rescaling.traced.model is net
        assert rescaling.traced.graph.num_groups == 4
    finally:
        distributed.destroy_process_group()
