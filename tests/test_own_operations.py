"""Operations of a user's own: registered with one word, or with a rule written for them."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath
from dagpath.ops import FIXED, Operation
from dagpath.rules import base

import own_operation
from networks import Net
from test_operations import check


def custom_op(function):
    """A ``torch.library`` operation whose result has the shape of its first tensor."""
    op = torch.library.custom_op(f"dagpath_tests::{function.__name__}", function, mutates_args=())
    op.register_fake(lambda *args: torch.empty_like(next(arg for arg in args if isinstance(arg, Tensor))))
    return op


@custom_op
def double_positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, 2 * x, x)


@custom_op
def scaled(slope: float, x: Tensor) -> Tensor:
    return F.leaky_relu(x, slope)


torch.library.define("dagpath_tests::reordered", "(Tensor x, *, Tensor order) -> Tensor")
torch.library.register_fake("dagpath_tests::reordered", lambda x, order: torch.empty_like(x))
reordered = torch.ops.dagpath_tests.reordered


@torch.library.impl("dagpath_tests::reordered", "CompositeExplicitAutograd")
def _(x: Tensor, *, order: Tensor) -> Tensor:
    return x.view(len(x), -1)[:, order]


@custom_op
def reordered_as_float(x: Tensor, y: Tensor, order: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise RuntimeError("floating point only")
    return torch.stack([x, y])[torch.arange(2).repeat(x.shape[1] // 2), :, order].t().contiguous()


@custom_op
def mixed_with(first: Tensor, second: Tensor) -> Tensor:
    return first + second


@custom_op
def larger_of(p: Tensor, q: Tensor, unused: bool = True) -> Tensor:
    return torch.maximum(p, q)


@custom_op
def sum_of_three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return x + y + z


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Every test starts with the operations that dagpath brings."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def between(function, **parts) -> Net:
    """Two layers of six units, and a function of them before the last layer."""
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.head(function(m, F.relu(m.a(x)), F.relu(m.b(x)))),
        **{"a": nn.Linear(3, 6), "b": nn.Linear(3, 6), "head": nn.Linear(6, 2), **parts},
    )


def indexed(function, order: list[int]) -> Net:
    net = between(function)
    net.register_buffer("order", torch.tensor(order))
    return net


def test_an_operation_is_fixed_until_it_is_registered():
    net = Net(lambda m, x: m.b(double_positive(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    traced = dagpath.trace(net, torch.zeros(1, 3))
    assert traced.graph.num_groups == 0
    assert "double_positive" in traced.explain()
    dagpath.register_op(torch.ops.dagpath_tests.double_positive, "homogeneous")
    check(net, torch.randn(3, 3), 4)


@pytest.mark.parametrize(
    "op",
    [
        double_positive,
        torch.ops.dagpath_tests.double_positive,
        torch.ops.dagpath_tests.double_positive.default,
        "dagpath_tests::double_positive",
        "dagpath_tests::double_positive.default",
    ],
)
def test_an_operation_is_registered_by_what_names_it(op):
    dagpath.register_op(op, "homogeneous")
    net = between(lambda m, x, y: double_positive(x) + y)
    check(net, torch.randn(3, 3), 6)


def test_the_homogeneous_argument_is_the_first_tensor():
    dagpath.register_op(scaled, "homogeneous")
    check(between(lambda m, x, y: scaled(0.3, x) + y), torch.randn(3, 3), 6)


def test_a_movement_is_given_the_values_of_its_indices():
    dagpath.register_op(reordered, "movement")
    net = indexed(lambda m, x, y: reordered(x, order=m.order), [1, 2, 3, 4, 5, 0])
    check(net, torch.randn(3, 3), 6)
    # the sum of a permutation and itself ties the six units in one cycle
    net = indexed(lambda m, x, y: reordered(x, order=m.order) + x, [1, 2, 3, 4, 5, 0])
    check(net, torch.randn(3, 3), 1)


def test_indices_from_the_input_fix_what_they_move():
    dagpath.register_op(reordered, "movement")
    net = between(lambda m, x, y: reordered(x, order=x[0].argsort()) + F.relu(m.mix(y)), mix=nn.Linear(6, 6))
    check(net, torch.randn(3, 3), 6)


def test_a_movement_that_takes_no_integers_is_run_on_floats():
    dagpath.register_op(reordered_as_float, "movement")
    net = indexed(lambda m, x, y: reordered_as_float(x, y, m.order), [5, 4, 3, 2, 1, 0])
    # entry j is unit 5 - j of x where j is even, of y where it is odd; three units of each are read by nothing
    check(net, torch.randn(3, 3), 12)
    net = indexed(lambda m, x, y: reordered_as_float(x, y, m.order) + x, [0, 1, 2, 3, 4, 5])
    check(net, torch.randn(3, 3), 6 + 3)


def test_a_sum_and_a_choice_may_name_their_tensors_as_they_like():
    dagpath.register_op(mixed_with, "sum")
    dagpath.register_op(larger_of, "choice")
    check(between(lambda m, x, y: mixed_with(x, y)), torch.randn(3, 3), 6)
    check(between(lambda m, x, y: larger_of(x, q=y)), torch.randn(3, 3), 6)
    check(between(lambda m, x, y: mixed_with(x, m.shift), shift=torch.randn(6)), torch.randn(3, 3), 6)
    traced = dagpath.trace(between(lambda m, x, y: larger_of(x, y)), torch.zeros(1, 3))
    ordinary = dagpath.trace(between(lambda m, x, y: torch.maximum(x, y)), torch.zeros(1, 3))
    assert dagpath.path_norm(traced, 2) == pytest.approx(dagpath.path_norm(ordinary, 2), rel=1e-13)


def test_a_sum_of_three_is_no_sum_of_two():
    dagpath.register_op(sum_of_three, "sum")
    net = between(lambda m, x, y: sum_of_three(x, y, x))
    check(net, torch.randn(3, 3), 0)
    assert (
        "registered as an operation of two tensors, and is called with 3"
        in dagpath.trace(net, torch.zeros(1, 3)).explain()
    )


def test_one_overload_may_have_a_rule_of_its_own():
    net = between(lambda m, x, y: torch.maximum(x, y) + torch.max(x, y))
    check(net, torch.randn(3, 3), 6)
    dagpath.register_op("max.other", "fixed")
    assert isinstance(base.operation_of(torch.ops.aten.max.other), base.Unknown)
    assert not isinstance(base.operation_of(torch.ops.aten.max.dim), base.Unknown)
    dagpath.register_op(torch.ops.aten.max, "movement")  # a rule for all overloads replaces that of one
    assert not isinstance(base.operation_of(torch.ops.aten.max.other), base.Unknown)


def test_bad_registrations_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'magic'; known are 'homogeneous'"):
        dagpath.register_op("relu", "magic")
    with pytest.raises(TypeError, match="a rule is a name or an instance"):
        dagpath.register_op("relu", 3)
    with pytest.raises(TypeError, match=r"op is what torch\.library\.custom_op returned, torch\.ops\.namespace"):
        dagpath.register_op(3, "sum")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("relux", "close to it: .*aten::relu"),
        ("aten::maxx", "close to it: .*aten::max"),
        ("aten::max.othr", r"close to it: .*aten::max\.other"),
        ("dagpath_tests::duoble_positive", "close to it: dagpath_tests::double_positive"),
        ("dagpath_test::double_positive", "close to it: dagpath_tests::double_positive"),
        ("nowhere::unheard_of_at_all", "import the module that defines it first"),
    ],
)
def test_a_misspelled_operation_is_refused_with_what_it_may_have_been(name, close):
    with pytest.raises(ValueError, match=f"there is no operation '{name}' in torch.ops; {close}"):
        dagpath.register_op(name, "homogeneous")


def test_a_rule_of_ones_own_is_a_class_with_two_methods():
    class AddReversed(Operation):
        """x + x.flip(-1): the entries that meet are tied."""

        def neurons(self, flow, call):
            x = flow.activation(call["x"])
            flow.tie(x, x.flip(-1), "a sum with its reverse")
            return x

        def paths(self, flow, call):
            x = call["x"]
            return flow.sum(x.shape, [(x, 1.0), (flow.placed(x, lambda entries: entries.flip(-1)), 1.0)])

    @custom_op
    def add_reversed(x: Tensor) -> Tensor:
        return x + x.flip(-1)

    dagpath.register_op(add_reversed, AddReversed())
    net = Net(lambda m, x: m.b(add_reversed(m.a(x))), a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    check(net, torch.randn(3, 3), 3)


def test_a_rule_may_look_at_a_weight_without_recording_derivatives():
    class Gain(Operation):
        def paths(self, flow, call):
            x, gain = call["x"], call["gain"]
            with torch.no_grad():
                assert gain.shape == (2,)
                assert bool((gain.values >= 0).all())
            return flow.product(call.output.shape, x, gain)

        def neurons(self, flow, call):
            flow.pin(call["gain"])
            return flow.constant(call.output)

    @custom_op
    def times_gain(x: Tensor, gain: Tensor) -> Tensor:
        return x * gain

    dagpath.register_op(times_gain, Gain())
    layer, gain = nn.Linear(3, 2), torch.rand(2)
    own, built_in = (
        dagpath.gram(
            dagpath.trace(Net(lambda m, x, f=function: f(m.a(x), m.gain), a=layer, gain=gain), torch.ones(1, 3))
        )
        for function in (times_gain, torch.mul)
    )
    torch.testing.assert_close(own.to_dense(), built_in.to_dense())


@pytest.fixture
def peaks() -> nn.Module:
    """The operation of the documentation's example, between a convolution and a linear layer."""
    dagpath.register_op(own_operation.peak, own_operation.PeakRule())
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), own_operation.Peak(3), nn.LeakyReLU(), nn.Linear(3, 2))


def test_the_example_of_the_documentation_is_exact(peaks):
    check(peaks, torch.randn(4, 2, 5), 3 + 3)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_example_of_the_documentation_has_the_path_norm_of_its_paths(peaks, p):
    peaks = peaks.double()
    length = 5
    conv, gain, head = peaks[0], peaks[2].gain.tolist(), peaks[4].weight.tolist()
    values = peaks[4].bias.tolist()
    by_gain: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for out, channel, _position in itertools.product(range(2), range(3), range(length - 1)):
        for first in [*conv.weight[channel].flatten().tolist(), conv.bias.tolist()[channel]]:
            values.append(first * gain[channel] * head[out][channel])
            by_gain[channel].append(first * head[out][channel])
    traced = dagpath.trace(peaks, torch.zeros(1, 2, length, dtype=torch.float64))
    assert dagpath.path_norm(traced, p) == pytest.approx(float((np.abs(values) ** p).sum() ** (1 / p)), rel=1e-12)
    expected = [float(np.square(products).sum()) for products in by_gain.values()]
    assert dagpath.gram_diagonal(traced)["2.gain"].tolist() == pytest.approx(expected, rel=1e-12)


def test_the_example_of_the_documentation_fixes_what_it_cannot_follow(peaks):
    def forward(m, x):
        x = m.first(x)
        return m.last(own_operation.peak(x, m.to_gain(x.mean((0, 2)))))

    net = Net(forward, first=nn.Conv1d(2, 3, 2), to_gain=nn.Linear(3, 3), last=nn.Linear(3, 2))
    check(net, torch.randn(4, 2, 5), 0)
    assert "its gain is no parameter" in dagpath.trace(net, torch.zeros(1, 2, 5)).explain()


def test_the_example_of_the_documentation_runs(peaks, capsys):
    own_operation.main()
    assert "outputs are bitwise equal: True" in capsys.readouterr().out


class Shift(Operation):
    """An offset per unit: ``told`` says whether its rule uses the parameter, ``answer`` what it says of paths."""

    def __init__(self, told=True, answer=None):
        self.told, self.answer = told, answer

    def neurons(self, flow, call):
        if self.told:
            flow.use(call["shift"], call["x"][0], torch.tensor(FIXED))
        return call["x"]

    def paths(self, flow, call):
        if self.answer is not None:
            return self.answer(flow, call)
        return flow.sum(call.output.shape, [(call["x"], 1.0), (call["shift"], 1.0)])


def shifted_by(rule):
    @custom_op
    def shift_by(x: Tensor, shift: Tensor) -> Tensor:
        return x + shift

    dagpath.register_op(shift_by, rule)
    layers = {"a": nn.Linear(3, 4), "shift": torch.rand(4), "b": nn.Linear(4, 2)}
    return Net(lambda m, x: m.b(torch.relu(shift_by(m.a(x), m.shift))), **layers).double()


def test_a_rule_that_says_nothing_of_a_parameter_fixes_what_it_touches():
    assert dagpath.trace(shifted_by(Shift()), torch.zeros(1, 3).double()).graph.num_groups == 4
    net, x = shifted_by(Shift(told=False)), torch.randn(5, 3).double()
    traced = dagpath.trace(net, x)
    assert traced.graph.num_groups == 0
    assert "says nothing of 'shift'" in traced.explain()
    before = net(x)
    dagpath.random_rescaling(traced).apply_()
    assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda flow, call: call["x"].values, "returned a tensor"),
        (lambda flow, call: flow.placed(call["x"], torch.sum), r"gave operands of shapes \[\(\)\]"),
    ],
)
def test_operands_that_are_none_are_refused_with_the_rule_that_gave_them(answer, words):
    traced = dagpath.trace(shifted_by(Shift(answer=answer)), torch.zeros(1, 3).double())
    with pytest.raises(dagpath.UnsupportedOpError, match=f"of Shift, the rule of .*shift_by, {words}"):
        dagpath.path_norm(traced)


def test_paths_through_a_rule_of_ones_own_are_counted_exactly_where_its_sums_leave_float64():
    positions, depth = 1 << 20, 40
    net = nn.Sequential(*(nn.Conv1d(2, 2, 1) for _ in range(depth)), own_operation.Peak(2), nn.Linear(2, 1))
    to_each_position = 2 ** (depth + 1) - 1
    traced = dagpath.trace(net, torch.zeros(1, 2, positions))
    assert dagpath.path_count(traced) == 2 * positions * to_each_position + 1
