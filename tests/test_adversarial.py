"""Models made to trip a tracer: whatever happens, a rescaling must not change the function."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath
from dagpath.capture.alike import alike, same
from dagpath.capture.dry_run import dry_runs

from networks import Net, mlp


def two_into_one(function, **parts) -> Net:
    """Two layers in, one out, and a function between them."""
    torch.manual_seed(0)
    return Net(function, **{"a": nn.Linear(5, 6), "b": nn.Linear(5, 6), "head": nn.Linear(6, 2), **parts})


def assert_exact(net: nn.Module, x: Tensor) -> dagpath.TracedModel:
    """A random power-of-two rescaling leaves both modes bitwise as they were, and path quantities can be computed."""
    traced = dagpath.trace(net, x)
    dagpath.gram_diagonal(traced)
    dagpath.path_norm(traced)
    rescaling = dagpath.random_rescaling(traced, 3.0, power_of_two=True, generator=torch.Generator().manual_seed(1))

    def run() -> list:
        found = []
        for training in (False, True):
            net.train(training)
            with torch.no_grad():
                torch.manual_seed(2)
                found.append(net(x))
        return found

    before = run()
    rescaling.apply_()
    for one, other in zip(run(), before, strict=True):
        assert torch.equal(one, other)
    return traced


def slices(m, x):
    o = torch.zeros(len(x), 6)
    o[:, :3] = m.a(x)[:, :3]
    o[:, 3:] = m.b(x)[:, 3:]
    return m.head(o)


def integer_slices(m, x):
    o = torch.zeros(len(x), 6, dtype=torch.int64)
    o[:, :3] = m.a(x)[:, :3] * 10
    return m.head(o.float())


def late_tanh(m, x):
    o = torch.zeros(len(x), 6, device=x.device)
    o[:, :3] = m.a(x)[:, :3]
    return m.head(o.tanh() if m.training else o)


def half_then_slice(m, x):
    y = m.a(x)
    y[:, :3] = 0.5 * y[:, :3]
    return m.head(y)


def last_example_overwritten(m, x):
    y = m.a(x).clone()
    y[-1] = 1.0
    return m.head(F.relu(y))


def last_example_from_another_layer(m, x):
    y = m.a(x).clone()
    y[-1].zero_()
    y[-1] += m.b(x)[-1]
    return m.head(F.relu(y))


def indices(m, x):
    y = m.a(x)
    return m.head(y * y.max(1, keepdim=True).indices)


FUNCTIONS = {
    "hardtanh": lambda m, x: m.head(F.hardtanh(m.a(x))),
    "hardtanh in place": lambda m, x: m.head(F.hardtanh(m.a(x), 0.0, 6.0, inplace=True)),
    "maximum of two": lambda m, x: m.head(torch.max(m.a(x), m.b(x)) + m.a(x)),
    "minimum of two": lambda m, x: m.head(torch.min(m.a(x), m.b(x))),
    "cast and back": lambda m, x: m.head(m.a(x).int().float()),
    "float16 and back": lambda m, x: m.head((1e-3 * m.a(x)).half().float()),
    "weight in float16": lambda m, x: m.head(F.relu(m.b(x)) + F.linear(x, (1e-4 * m.a.weight).half().float())),
    "copy into float16": lambda m, x: m.head(torch.zeros(len(x), 6, dtype=torch.float16).copy_(1e-3 * m.a(x)).float()),
    "type_as": lambda m, x: m.head(m.a(x).type_as(torch.zeros(1, dtype=torch.int64)).type_as(x)),
    "integer sum": lambda m, x: m.head(m.a(x).unsqueeze(1).detach().sum(1, dtype=torch.int64).float()),
    "integer slices": integer_slices,
    "boolean mask": lambda m, x: m.head(m.a(x).bool().float()),
    "slices of zeros": slices,
    "tanh of slices in train mode": late_tanh,
    "slice assigned from itself": half_then_slice,
    "indices of a maximum": indices,
    "bias used twice": lambda m, x: m.head(F.relu(m.a(x) + m.a.bias.flip(0))),
    "slice of a bias": lambda m, x: m.head(m.a(x)) + torch.tanh(m.a.bias[2:]).sum(),
    "entry of a bias": lambda m, x: m.head(m.a(x) * m.a.bias[1]),
    "clamp by a tensor": lambda m, x: m.head(torch.clamp(m.a(x), min=m.b(x))),
    "number of a tensor": lambda m, x: m.head(m.a(x)) + x.max().item(),
    "product with a number of a tensor": lambda m, x: m.head(m.a(x)) * (x.max().item() * 2),
    "padding of a sum": lambda m, x: m.head(F.pad(m.a(x)[:, :3], (0, 3)) + F.pad(m.b(x)[:, :3], (3, 0))),
    "zeros_like": lambda m, x: m.head(torch.cat([m.a(x)[:, :3], torch.zeros_like(m.b(x)[:, :3])], 1)),
    "ones_like": lambda m, x: m.head(m.a(x) + torch.ones_like(m.b(x))),
    "float": lambda m, x: m.head(m.a(x).float()),
    "slices by mode": lambda m, x: F.linear((m.a(x)[:, :3] if m.training else m.a(x)[:, 3:]), m.head.weight[:, :3]),
    "grad by mode": lambda m, x: m.head(m.a(x).tanh() if m.training and torch.is_grad_enabled() else m.a(x)),
    "sum over another axis": lambda m, x: m.head(m.a(x) + m.b(x).sum(1, keepdim=True)),
    "broadcast of a row": lambda m, x: m.head(m.a(x) + m.b(x)[:1]),
    "mean over the batch": lambda m, x: m.head(m.a(x) - m.a(x).mean(0)),
    "first and other examples": lambda m, x: m.head(F.relu(torch.cat([m.a(x)[:1], m.b(x)[1:]]))),
    "three examples and the others": lambda m, x: m.head(F.relu(torch.cat([m.a(x[:3]), m.b(x[3:])]))),
    "split examples": lambda m, x: m.head(torch.cat([m.a(x.split([1, 3])[0]), m.b(x.split([1, 3])[1])])),
    "layer by the number of examples": lambda m, x: m.head(m.a(x) if len(x) == 1 else m.b(x)),
    "last example overwritten": last_example_overwritten,
    "last example from another layer": last_example_from_another_layer,
    "max pool over channels": lambda m, x: m.head(F.max_pool1d(m.a(x).unsqueeze(1), 3, 1, 1).squeeze(1)),
    "unbound constants": lambda m, x: m.head(m.a(x) * torch.tensor([1.0, 0.0, -2.0, 3.0, 0.5, 1.0])),
    "dropout always on": lambda m, x: m.head(F.dropout(m.a(x), 0.5)),
    "random noise": lambda m, x: m.head(m.a(x) + torch.randn(6)),
    "random gate": lambda m, x: m.head(m.a(x) * torch.rand(6)),
    "transposed weight": lambda m, x: m.head(F.relu(F.linear(F.relu(m.a(x)), m.a.weight @ m.a.weight.t()))),
    "autoencoder": lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.t()),
    "sum of a tensor and its own product": lambda m, x: m.head(torch.addmm(F.relu(m.a(x)), F.relu(m.a(x)), m.mix)),
    "tensor and its own product": lambda m, x: (lambda y: m.head(torch.addmm(y, y, m.mix)))(F.relu(m.a(x))),
    "batch and its own product": lambda m, x: (lambda y: m.head(torch.baddbmm(y, y, m.mix[None])[0]))(
        m.a(x)[None, :, :6]
    ),
    "diagonal of examples and units": lambda m, x: m.a(x).diagonal(0, 0, 1),
    "trace of examples and units": lambda m, x: m.a(x)[:, : len(x)].trace(),
    "diagonal by einsum": lambda m, x: torch.einsum("ii->i", m.a(x)[:, : len(x)]),
    "examples after units": lambda m, x: F.relu(m.a(x).reshape(6, len(x)).t()),
    "units by the number of examples": lambda m, x: m.head(m.b(x)) + m.a(x)[:, len(x) - 1 : len(x)].sum(),
    "units by the numbers of examples": lambda m, x: m.a(x)[torch.arange(len(x)), torch.arange(len(x))],
    "one-dimensional weight": lambda m, x: F.linear(F.relu(m.a(x)), m.head.weight[0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_changes_silently(name):
    net = two_into_one(FUNCTIONS[name], mix=nn.Parameter(torch.randn(6, 6)))
    assert_exact(net, torch.randn(4, 5, generator=torch.Generator().manual_seed(3)))


def test_a_write_to_an_out_argument_is_followed():
    def forward(m, x):
        o = torch.empty(len(x), 6)
        torch.add(m.a(x), m.b(x), out=o)
        return m.head(o)

    net = two_into_one(forward).requires_grad_(False)
    x = torch.randn(4, 5)
    before = net(x)
    try:
        traced = dagpath.trace(net, x)
    except dagpath.CaptureError:
        return  # refusing is right too
    dagpath.random_rescaling(traced, 3.0, power_of_two=True).apply_()
    assert torch.equal(net(x), before)


def test_two_parameters_in_one_storage_are_left_alone():
    net = two_into_one(lambda m, x: m.head(F.relu(m.a(x)) + F.relu(m.b(x))))
    net.b.weight.data = net.a.weight.data
    traced = assert_exact(net, torch.randn(4, 5))
    assert traced.graph.num_groups == 0  # a weight that may not change ties its fixed input to its output
    net = two_into_one(lambda m, x: F.linear(F.relu(m.a(x)), m.decoder))
    net.decoder = nn.Parameter(net.a.weight.data.t())
    assert_exact(net, torch.randn(4, 5))
    net = two_into_one(lambda m, x: m.head(F.relu(m.a(x))) + F.linear(x, m.copy).sum())
    net.register_buffer("copy", net.a.weight.data)
    assert_exact(net, torch.randn(4, 5))


def test_an_expanded_parameter_is_left_alone():
    net = two_into_one(lambda m, x: m.head(F.relu(m.a(x) + m.shift)))
    net.shift = nn.Parameter(torch.zeros(1).expand(6))
    assert_exact(net, torch.randn(4, 5))


def test_complex_and_integer_parameters_are_constants():
    net = two_into_one(lambda m, x: m.head(F.relu(F.linear(F.relu(m.a(x)), m.table * 0.01))))
    net.table = nn.Parameter(torch.randint(-100, 100, (6, 6), dtype=torch.int8), requires_grad=False)
    assert_exact(net, torch.randn(4, 5))

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64)

        def forward(self, x):
            return self.b(self.a(x))

    net, x = Complex(), torch.randn(2, 3, dtype=torch.complex64)
    before = net(x)
    assert dagpath.rescale_(net, x).traced.graph.num_groups in (0, 1)
    assert torch.equal(net(x), before)


def test_a_batch_norm_with_computed_coefficients():
    def forward(m, x):
        gain, shift = F.relu(m.a(m.code))[0], F.relu(m.b(m.code))[0]
        return m.head(F.batch_norm(m.a(x), torch.zeros(6), torch.ones(6), gain, shift))

    net = two_into_one(forward)
    net.register_buffer("code", torch.randn(1, 5))
    assert_exact(net, torch.randn(4, 5))


def test_a_bias_after_a_constant_weight_is_not_zero():
    def forward(m, x):
        z = F.linear(F.pad(m.a(x)[:, :3], (0, 3)), torch.eye(6), m.shift)
        return m.head(F.relu(m.b(x)) + z)

    net = two_into_one(forward)
    net.shift = nn.Parameter(torch.randn(6))
    assert_exact(net, torch.randn(4, 5))


def test_a_branch_on_the_batch_size_is_followed():
    net = two_into_one(lambda m, x: m.head(m.a(x) if x.shape[0] == 1 else m.a(x).tanh()))
    assert dagpath.trace(net, torch.randn(4, 5)).graph.num_groups == 0
    with dry_runs(net, training=False) as dry_run:
        records = [dry_run(((torch.randn(batch, 5),), {})) for batch in (1, 4)]
    assert not alike(*records)


@pytest.mark.parametrize(
    ("function", "agree"),
    [
        (lambda m, x: m.head(F.relu(F.batch_norm(m.a(x), None, None, training=True))), True),
        (lambda m, x: m.head(m.drop(F.relu(m.norm(m.a(x))))), True),
        (lambda m, x: m.head(m.a(x) if m.training else m.b(x)), False),
        (lambda m, x: m.head(m.a(x)[:, :6] if m.training else m.a(x)[:, -6:]), False),
        (lambda m, x: m.head(m.a(x) * (2.0 if m.training else 1.0)), False),
        (lambda m, x: m.head(m.a(x) if not m.training or random.random() < 2 else x), False),
        (lambda m, x: m.head(m.a(x) if not m.training or torch.rand(()) < 2 else x), False),
        (lambda m, x: m.head(m.a(x)) + torch.rand(2, device="meta"), True),
        (lambda m, x: m.head(m.a(x) * m.hidden), True),
        (lambda m, x: m.head(m.a(x) * (m.hidden if m.training else m.hidden.clone())), False),
    ],
)
def test_modes_agree_only_where_their_calls_do(function, agree):
    net = two_into_one(function, drop=nn.Dropout(0.5), norm=nn.BatchNorm1d(6))
    net.hidden = torch.ones(6)
    records = []
    for training in (False, True):
        with dry_runs(net, training) as dry_run:
            records.append(dry_run(((torch.randn(2, 5),), {})))
    assert same(*records) is agree


def test_random_decisions_in_python_leave_the_random_state_alone():
    net = two_into_one(lambda m, x: m.head(m.a(x) if not m.training or random.random() < 0.5 else m.b(x)))
    state = random.getstate()
    with pytest.warns(UserWarning, match="cannot be captured in train mode"):
        dagpath.trace(net, torch.randn(2, 5))
    assert random.getstate() == state


def test_a_model_that_builds_itself_is_left_as_it_was():
    class Lazy(nn.Module):
        def forward(self, x):
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(x.shape[1], 3)
            return self.layer(x)

    net = Lazy()
    dagpath.trace(net, torch.randn(2, 5))
    assert list(net.parameters()) == []
    net(torch.randn(2, 5))
    assert type(net.layer.weight) is nn.Parameter


def test_a_model_without_shapes_is_refused():
    net = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(dagpath.CaptureError, match=r"'0\.weight' has no shape yet: run the model once"):
        dagpath.trace(net, torch.randn(4, 5))


def test_a_shape_that_depends_on_values_is_that_of_the_example():
    net = two_into_one(lambda m, x: m.head(m.a(x).repeat_interleave(torch.tensor([2] * 3 + [0] * 3), 1)))
    assert assert_exact(net, torch.randn(4, 5)).graph.num_groups == 6


def test_a_frozen_part_without_gradients_is_followed():
    def forward(m, x):
        with torch.no_grad():
            y = F.relu(m.a(x))
        return m.head(y + F.relu(m.b(x)))

    assert_exact(two_into_one(forward), torch.randn(4, 5))


class MergesInEval(nn.Linear):
    """A low-rank update that eval mode adds to the stored weight, and train mode takes out of it again."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))
        self.merged = False

    def train(self, mode: bool = True):
        if self.merged == mode:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.up @ self.down, self.bias)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_whose_mode_changes_its_weights_is_left_as_it_was(training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), MergesInEval(6, 7), nn.ReLU(), nn.Linear(7, 2)).train(training)
    x = torch.randn(4, 5)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    traced = dagpath.trace(net, x)
    assert traced.graph.num_groups == 6 + 7 + 2
    for parameter, values in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, values)
    assert net[2].merged is not training
    assert_exact(net, x)


refused_by_older_exporters = pytest.mark.xfail(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    raises=dagpath.CaptureError,
    reason="torch.export of PyTorch 2.6 cannot capture it",
)


@refused_by_older_exporters
def test_what_a_forward_collects_is_forgotten():
    def forward(m, x):
        y = m.a(x)
        m.seen.append(y)
        m.last["y"] = y
        return m.head(y)

    net = two_into_one(forward)
    net.seen, net.last = [], {"old": 1}
    try:
        dagpath.trace(net, torch.randn(4, 5))
    finally:  # also where it is refused
        assert (net.seen, net.last) == ([], {"old": 1})


def test_a_buffer_that_is_written_fixes_what_it_reads_however_the_graph_is_made_functional():
    def forward(m, x):
        y = F.relu(m.a(x))
        m.average.add_(y.mean(0).detach())
        z = m.b(x)
        z[:, 3:].mul_(2.0)  # a write through a view
        return m.head(y) + m.tail(F.relu(z))

    net = two_into_one(forward, tail=nn.Linear(6, 2))
    net.register_buffer("average", torch.zeros(6))
    assert dagpath.trace(net, torch.randn(4, 5)).graph.num_groups == 6


def test_an_in_place_operation_without_an_equal_is_followed():
    net = two_into_one(
        lambda m, x: m.head(F.relu(m.a(x)) * m.mask.abs().pow_(2) + F.linear(m.b(x), m.eye.clone().fill_diagonal_(2)))
    )
    net.register_buffer("mask", torch.randn(6))
    net.register_buffer("eye", torch.zeros(6, 6))
    traced = assert_exact(net, torch.randn(4, 5))
    assert traced.graph.num_groups == 1


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 0),  # infinite entries become the largest numbers of the type
        ({"nan": 1.0}, 0),
        ({"posinf": 3.0}, 0),
        ({"posinf": torch.inf, "neginf": -torch.inf}, 6),
        ({"posinf": 0.0, "neginf": 0.0}, 6),
    ],
)
def test_what_stands_in_for_nan_and_infinity_has_no_scale_but_zero_and_infinity(options, groups):
    net, x = two_into_one(lambda m, x: m.head(torch.nan_to_num(m.a(x), **options))), torch.randn(4, 5)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    traced, before = dagpath.trace(net, x), net(x)
    assert traced.graph.num_groups == groups
    dagpath.random_rescaling(traced, power_of_two=True).apply_()
    assert torch.equal(net(x).nan_to_num(), before.nan_to_num())


def test_what_is_not_used_constrains_nothing():
    def forward(m, x):
        y = F.relu(m.a(x))
        m.b(y.softmax(1)).sum()
        return m.head(y)

    traced = assert_exact(two_into_one(forward, b=nn.Linear(6, 6)), torch.randn(4, 5))
    assert traced.graph.num_groups == 6
    assert not traced.graph.causes[0].reason.startswith("enters")


@pytest.mark.parametrize(
    ("function", "groups"),
    [
        (lambda m, x: m.head(F.relu(m.a(x)) @ torch.eye(6).to_sparse()), 1),
        (lambda m, x: m.head(m.a(x).to_sparse().to_dense()), 0),
        pytest.param(lambda m, x: m.head(torch.vmap(lambda z: F.relu(m.a(z)))(x)), 0, marks=refused_by_older_exporters),
        pytest.param(lambda m, x: torch.vmap(lambda z: m.head(m.a(z).relu_()))(x), 6, marks=refused_by_older_exporters),
    ],
)
def test_sparse_tensors_and_vmap_are_captured(function, groups):
    assert assert_exact(two_into_one(function), torch.randn(4, 5)).graph.num_groups == groups


def test_a_constant_made_in_the_shape_of_an_activation_is_a_constant():
    def forward(m, x):
        return m.head(F.relu(m.a(x))) + m.head(m.b(torch.ones_like(x)))

    traced = dagpath.trace(two_into_one(forward).double(), torch.randn(4, 5, dtype=torch.float64))
    norm = dagpath.path_norm(traced)
    dagpath.random_rescaling(traced, 3.0).apply_()
    assert dagpath.path_norm(traced) == pytest.approx(norm, rel=1e-9)


def test_what_cannot_be_computed_is_refused_by_its_name():
    x = torch.randn(2, 4)
    sparse = Net(lambda m, x: m.head(F.relu((m.w.t() @ x.t()).t())), head=nn.Linear(6, 2))
    sparse.w = nn.Parameter(torch.randn(4, 6).to_sparse())
    with pytest.raises(ValueError, match=r"the parameter 'w' is sparse \(torch.sparse_coo\)"):
        dagpath.balance(dagpath.trace(sparse, x))

    def turns(m, x):
        h = torch.view_as_complex(F.relu(m.a(x)).view(-1, 3, 2))
        return m.head(torch.view_as_real(h * 1j).reshape(-1, 6))

    with pytest.raises(dagpath.UnsupportedOpError, match=r"mul .* cannot be unrolled: it reads a complex number"):
        dagpath.trace(Net(turns, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), x).unroll()
    net = mlp(4, 6, 2)
    with pytest.raises(TypeError, match="more_examples must be a list of example inputs, got Tensor"):
        dagpath.trace(net, x, more_examples=x)
    with pytest.raises(TypeError, match="kwargs must be a dictionary of arguments by their names, got list"):
        dagpath.trace(net, x, kwargs=[1])


def test_odd_types_and_layouts_are_read():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(1, 2, 4, 4)
    expected = [path.value for path in dagpath.top_paths(dagpath.trace(net, x), 3)]
    found = dagpath.top_paths(dagpath.trace(net.to(memory_format=torch.channels_last), x), 3)
    assert [path.value for path in found] == pytest.approx(expected)
    small = Net(lambda m, x: m.head(F.relu(m.a(x))) * m.w.float(), a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    small.register_buffer("w", torch.ones(2).to(torch.float8_e4m3fn))
    before = small(x[0, 0])
    dagpath.rescale_(small, x[0, 0])
    torch.testing.assert_close(small(x[0, 0]), before)


def test_a_compiled_part_is_run_as_it_is_written(capfd):
    net = mlp(4, 6, 2)
    net[0].compile(backend="eager")
    assert dagpath.trace(net, torch.randn(2, 4)).graph.num_groups == 6
    assert "Error" not in capfd.readouterr().err
