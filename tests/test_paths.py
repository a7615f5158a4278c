"""Explicit paths against brute force, autograd and the model itself."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dagpath

from networks import BruteForce, Net, RandomNet
from test_unroll import assert_realizes

seeds = st.integers(0, 2**31 - 1)


def small_net(seed: int, most_paths: int = 20_000) -> RandomNet:
    net = RandomNet(seed).double()
    assume(BruteForce.count(net) <= most_paths)
    return net


@settings(max_examples=80)
@given(seeds)
def test_the_sum_over_paths_is_the_output_of_the_model(seed):
    net = small_net(seed)
    assert_realizes(net, 3 * net.example(4))


@settings(max_examples=40)
@given(seeds)
def test_values_are_those_of_brute_force(seed):
    net = small_net(seed)
    values = dagpath.PathLifting(dagpath.trace(net, net.example())).values.sort().values
    expected = torch.tensor(sorted(BruteForce(net).values), dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-15)


@settings(max_examples=40)
@given(seeds)
def test_the_jacobian_gives_the_gram_diagonal_and_the_kernel(seed):
    net = small_net(seed, most_paths=2_000)
    traced = dagpath.trace(net, net.example())
    lifting = dagpath.PathLifting(traced)
    jacobian = lifting.jacobian().to_dense()
    gram = torch.cat([values.flatten() for values in dagpath.gram_diagonal(traced).values()])
    torch.testing.assert_close((jacobian**2).sum(0), gram, rtol=1e-12, atol=1e-14 * float(gram.max()))
    kernel = jacobian @ jacobian.t()
    torch.testing.assert_close(lifting.kernel(), kernel, rtol=1e-12, atol=1e-14 * float(kernel.abs().max()))
    torch.testing.assert_close(lifting.kernel(dense=False).to_dense(), lifting.kernel())


@settings(max_examples=15)
@given(seeds)
def test_the_jacobian_is_the_derivative_of_the_values(seed):
    """Against central differences of the values of the same paths."""
    net = small_net(seed, most_paths=500)
    traced = dagpath.trace(net, net.example())
    lifting = dagpath.PathLifting(traced)
    jacobian = lifting.jacobian().to_dense()
    torch.manual_seed(seed)
    directions = [torch.randn_like(parameter) for parameter in net.parameters()]

    def values(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(net.parameters(), directions, strict=True):
                parameter += step * direction
            found = dagpath.PathLifting(traced).values
            for parameter, direction in zip(net.parameters(), directions, strict=True):
                parameter -= step * direction
        return found

    expected = (values(1e-5) - values(-1e-5)) / 2e-5
    found = jacobian @ torch.cat([direction.flatten() for direction in directions])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=20)
@given(seeds)
def test_the_gradient_of_the_model_goes_through_the_jacobian(seed):
    """∂R/∂θ = ∂Φᵀ (a · x), by autograd on the model; the slope of a PReLU is no edge."""
    net = small_net(seed)
    x = net.example()
    lifting = dagpath.PathLifting(dagpath.trace(net, x))
    net.zero_grad()
    net(x).sum().backward()
    found = lifting.jacobian().to_dense().t() @ (lifting.activations(x) * lifting.inputs(x))[0]
    start = 0
    slopes = {id(m.weight) for m in net.modules() if isinstance(m, nn.PReLU)}
    for parameter in net.parameters():
        part = found[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
        if id(parameter) not in slopes:
            torch.testing.assert_close(part, parameter.grad, rtol=1e-9, atol=1e-10)


@settings(max_examples=20)
@given(seeds)
def test_values_do_not_change_under_a_rescaling(seed):
    net = small_net(seed)
    traced = dagpath.trace(net, net.example())
    before = dagpath.PathLifting(traced).values
    dagpath.random_rescaling(traced, generator=torch.Generator().manual_seed(0)).apply_()
    torch.testing.assert_close(dagpath.PathLifting(traced).values, before, rtol=1e-10, atol=1e-14)


def test_a_path_that_meets_a_weight_twice_has_both_derivatives():
    net = Net(lambda m, x: m.a(torch.relu(m.a(x))), a=nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(net.a.weight, 3.0)
    lifting = assert_realizes(net, torch.randn(3, 1).double())
    assert lifting.values.tolist() == [9.0]
    assert lifting.jacobian().to_dense().tolist() == [[6.0]]


def test_activations_are_zero_or_one_and_select_one_input_of_a_maximum():
    net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.MaxPool1d(3))
    nn.init.ones_(net[0].weight)
    lifting = dagpath.PathLifting(dagpath.trace(net.double(), torch.zeros(1, 1, 3).double()))
    x = torch.tensor([[[1.0, 3.0, 2.0]], [[5.0, 5.0, 4.0]]]).double()
    assert lifting.activations(x).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert lifting.inputs(x).tolist() == [[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]]


def test_a_negative_leaky_relu_contributes_its_slope():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.LeakyReLU(0.25)).double()
    nn.init.ones_(net[0].weight)
    lifting = dagpath.PathLifting(dagpath.trace(net, torch.zeros(1, 1).double()))
    assert lifting.activations(torch.tensor([[2.0], [-2.0]]).double()).tolist() == [[1.0], [0.25]]


def test_paths_are_named_by_modules_channels_and_parameters():
    net = nn.Sequential()
    net.add_module("stem", nn.Conv1d(1, 2, 1, bias=False))
    net.add_module("norm", nn.BatchNorm1d(2))
    net.add_module("head", nn.Conv1d(2, 1, 2, bias=False))
    net.norm.running_mean.fill_(0.5)
    lifting = dagpath.PathLifting(dagpath.trace(net.eval(), torch.zeros(1, 1, 2)))
    path = next(path for path in lifting.paths if len(path.nodes) == 4 and "stem.weight[1, 0, 0]" in path.weights)
    assert str(path) == "input[0, 0] → stem conv1d[1, 0] → norm batch_norm[1, 0] → head conv1d[0, 0]"
    assert path.weights == ("stem.weight[1, 0, 0]", "norm.weight[1]", "head.weight[0, 1, 0]")
    short = next(path for path in lifting.paths if len(path.nodes) == 3)
    assert short.nodes[0] == "1"
    assert short.weights[0] == "norm.weight[0], norm.bias[0]"
    assert [path.value for path in lifting.paths] == lifting.values.tolist()


class Many(nn.Module):
    """Two inputs, one of them by name; a dictionary of outputs, one of them not of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, side: Tensor, extra: Tensor | None = None) -> dict:
        y = torch.relu(self.a(x)) + side
        y = y if extra is None else y + extra
        return {"y": y, "pair": (self.b(y), y[:, 0]), "none": None, "zeros": torch.zeros(x.shape[0], 2)}


@pytest.mark.parametrize("extra", [False, True])
def test_several_inputs_and_outputs_keep_their_structure(extra):
    torch.manual_seed(0)
    model, args = Many().double(), (torch.randn(4, 2).double(), torch.randn(4, 3).double())
    kwargs = {"extra": torch.randn(4, 3).double()} if extra else {}
    lifting = dagpath.PathLifting(dagpath.trace(model, args, kwargs))
    found, expected = lifting.realize(args, kwargs), model(*args, **kwargs)
    assert list(found) == list(expected)
    assert found["none"] is None
    torch.testing.assert_close(found["y"], expected["y"].detach(), rtol=1e-12, atol=1e-12)
    for one, other in zip(found["pair"], expected["pair"], strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)
    assert found["zeros"].tolist() == [[0.0, 0.0]] * 4


@pytest.mark.parametrize("reduced", [lambda y: y.sum(), lambda y: y.sum(0), lambda y: y.mT])
def test_a_model_that_mixes_its_batch_is_realized_as_it_was_captured(reduced):
    model = Net(lambda m, x: reduced(torch.relu(m.a(x))), a=nn.Linear(3, 2)).double()
    x = torch.randn(5, 3).double()
    lifting = dagpath.PathLifting(dagpath.trace(model, x))
    captured = next(node for node in lifting.graph.sources if len(node.numbers) > 1)
    size = len(captured.numbers) // 3
    torch.testing.assert_close(lifting.realize(x[:size]), model(x[:size]).detach())
    with pytest.raises(ValueError, match=rf"input 'args_0' has shape \[7, 3\], expected \[{size}, 3\]"):
        lifting.realize(torch.zeros(7, 3).double())


def test_a_float32_model_is_realized_in_float64():
    torch.manual_seed(0)
    net = RandomNet(3)
    x = net.example(3)
    found = dagpath.PathLifting(dagpath.trace(net, x)).realize(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), net(x).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, net.double()(x.double()).detach(), rtol=1e-10, atol=1e-12)


def test_paths_stay_those_of_the_weights_they_were_made_from():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    x = torch.randn(3, 2).double()
    before = net(x).detach()
    lifting = dagpath.PathLifting(dagpath.trace(net, x))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(lifting.realize(x), before, rtol=1e-12, atol=1e-12)


def test_a_network_without_paths_has_none():
    net = Net(lambda m, x: torch.zeros(x.shape[0], 2) * m.a.weight.sum(), a=nn.Linear(1, 1))
    lifting = dagpath.PathLifting(dagpath.trace(net, torch.zeros(1, 1)))
    assert len(lifting) == 0
    assert lifting.paths == []
    assert lifting.jacobian().shape == (0, 2)
    assert lifting.realize(torch.zeros(3, 1)).tolist() == [[0.0, 0.0]] * 3


# -- bad input -----------------------------------------------------------------------------------------------------


def test_too_many_paths_are_refused_with_their_number():
    traced = dagpath.trace(nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(20))), torch.zeros(1, 10))
    with pytest.raises(ValueError, match=rf"{10**21} paths, more than limit=100000"):
        dagpath.PathLifting(traced)
    with pytest.raises(ValueError, match=r"30 paths, more than limit=29"):
        dagpath.PathLifting(dagpath.trace(nn.Linear(9, 3), torch.zeros(1, 9)), limit=29)
    assert len(dagpath.PathLifting(dagpath.trace(nn.Linear(9, 3), torch.zeros(1, 9)), limit=30)) == 30


def test_paths_need_a_traced_model():
    with pytest.raises(TypeError, match=r"expected a TracedModel, got Linear"):
        dagpath.PathLifting(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"input 'x' has shape \[3\], expected \[batch, 2\]"),
        ((torch.zeros(2, 2), torch.zeros(2, 4)), r"input 'side' has shape \[2, 4\], expected \[batch, 3\]"),
        (
            (torch.zeros(2, 2), torch.zeros(3, 3)),
            r"input 'side' has shape \[3, 3\], expected \[batch, 3\] with batch 2",
        ),
        ((torch.zeros(2, 2), 1.0), r"input 'side' must be a Tensor of shape \[batch, 3\], got 1.0"),
        ((torch.zeros(2, 2),), r"traced with 2 inputs \(x, side\), got 1"),
    ],
)
def test_inputs_of_another_shape_are_named(x, message):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x: Tensor, side: Tensor) -> Tensor:
            return self.a(x) + side

    lifting = dagpath.PathLifting(dagpath.trace(Two(), (torch.zeros(2, 2), torch.zeros(2, 3))))
    x = x if isinstance(x, tuple) else (x, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=message):
        lifting.realize(x)


def test_an_input_that_is_no_tensor():
    lifting = dagpath.PathLifting(dagpath.trace(nn.Linear(1, 1), torch.zeros(1, 1)))
    with pytest.raises(TypeError, match=r"x must be a Tensor or a tuple .*, got list"):
        lifting.activations([[0.0]])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), r"input 'input_1' has dtype torch.int64, .* traced with torch.float32"),
        (torch.zeros(1, 2, dtype=torch.complex64), r"input 'input_1' has dtype torch.complex64"),
        (torch.zeros(0, 2), r"input 'input_1' has shape \[0, 2\]: there must be at least one example"),
    ],
)
def test_inputs_of_another_type_and_of_no_example_are_named(x, message):
    lifting = dagpath.PathLifting(dagpath.trace(nn.Sequential(nn.Linear(2, 1)), torch.zeros(1, 2)))
    for use in (lifting.realize, lifting.activations, lifting.inputs):
        with pytest.raises(ValueError, match=message):
            use(x)


def test_a_complex_parameter_has_no_path_values():
    traced = dagpath.trace(nn.Linear(2, 2, dtype=torch.complex64), torch.zeros(1, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'weight' is torch\.complex64"):
        dagpath.PathLifting(traced)


def test_a_network_without_parameters_has_an_empty_basis():
    lifting = dagpath.PathLifting(dagpath.trace(nn.ReLU(), torch.zeros(1, 3)))
    assert len(lifting) == 3
    assert repr(lifting.basis()) == "BasisPaths(0 paths of 0 parameters)"
    assert lifting.basis().to_scipy().shape == (0, 0)
