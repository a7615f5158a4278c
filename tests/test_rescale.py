"""Rescaling whole models: exact, optimal, in place, all or nothing."""

import copy
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath

from networks import RandomNet, mlp


def snapshot(model: nn.Module) -> list:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]


def unchanged(model: nn.Module, before: list) -> bool:
    return all(map(torch.equal, snapshot(model), before))


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_rescaling_a_random_network_keeps_its_function_and_is_optimal(seed, dtype):
    net = RandomNet(seed, max_convolutions=6).to(dtype)
    x = net.example(4)
    with torch.no_grad():
        before = net(x)
        rescaling = dagpath.rescale_(net, x)
        after = net(x)
    assert rescaling.optimality <= 1e-9
    assert rescaling.converged
    assert rescaling.objective[1] <= rescaling.objective[0] + 1e-9 * abs(rescaling.objective[0])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert float((after - before).abs().max()) <= tolerance * float(before.abs().max())


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1))
def test_newton_is_at_least_as_good_as_coordinate_descent_to_convergence(seed):
    net = RandomNet(seed).double()
    traced = dagpath.trace(net, net.example())
    newton = dagpath.balance(traced)
    coordinate = dagpath.balance(traced, solver="coordinate")
    assert newton.objective[1] <= coordinate.objective[1] + 1e-10 * abs(coordinate.objective[1])


def test_wildly_scaled_and_pruned_networks_are_balanced():
    for seed, pruned, decades in ((0, 0.9, 4.0), (1, 0.9, 4.0), (2, 0.0, 8.0), (3, 0.95, 0.0)):
        torch.manual_seed(seed)
        net = mlp(20, 50, 30, 40, 10).double()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 2:
                    parameter *= torch.rand_like(parameter) > pruned
                parameter *= 10 ** (decades * torch.randn_like(parameter))
        traced = dagpath.trace(net, torch.zeros(1, 20, dtype=torch.float64))
        newton, coordinate = dagpath.balance(traced), dagpath.balance(traced, solver="coordinate")
        assert newton.converged
        assert newton.objective[1] == pytest.approx(coordinate.objective[1], rel=1e-8)


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1))
def test_a_second_rescaling_finds_nothing_to_do(seed):
    net = RandomNet(seed, max_convolutions=6).double()
    first = dagpath.rescale_(net, net.example())
    assume(float(first.log_scales.abs().max()) < first.bound if first.traced.graph.num_groups else True)
    second = dagpath.rescale_(net, net.example())
    assert float(second.log_scales.abs().max()) < 1e-6 if first.traced.graph.num_groups else True


def test_the_optimum_is_the_same_from_any_rescaled_copy():
    net = mlp(5, 7, 6, 3).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    other = copy.deepcopy(net)
    dagpath.random_rescaling(dagpath.trace(other, x), sigma=1.5).apply_()
    for model in (net, other):
        dagpath.rescale_(model, x)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)


def test_the_objective_is_the_criterion_of_the_gram_diagonal():
    net = mlp(4, 6, 5, 2).double()
    traced = dagpath.trace(net, torch.zeros(1, 4, dtype=torch.float64))
    rescaling = dagpath.balance(traced)

    def criterion() -> float:
        gram = torch.cat([values.flatten() for values in dagpath.gram_diagonal(traced).values()])
        return float(gram.numel() * gram.sum().log() - gram.log().sum())

    # F(z) − F(0) = p log tr(G_z) − log det diag(G_z) − the same at 0
    before = criterion()
    rescaling.apply_()
    assert rescaling.objective[1] - rescaling.objective[0] == pytest.approx(criterion() - before, rel=1e-9)


def test_multipliers_are_what_apply_multiplies_with():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)).double()
    net.append(nn.Flatten()).append(nn.Linear(24, 2).double())
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(2, 2, 6, 6, dtype=torch.float64)))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    multipliers = rescaling.multipliers()
    rescaling.apply_()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * multipliers[name], rtol=1e-14, atol=0)


def test_multipliers_are_the_exponentials_of_incidence():
    net = mlp(3, 4, 2).double()
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3, dtype=torch.float64)))
    exponents = rescaling.traced.graph.incidence() @ rescaling.log_scales
    multipliers = rescaling.multipliers()
    flat = torch.cat([multipliers[name].expand(p.shape).reshape(-1) for name, p in net.named_parameters()])
    torch.testing.assert_close(flat, exponents.exp(), rtol=1e-12, atol=0)


def test_the_inverse_takes_a_rescaling_back():
    net = mlp(3, 8, 8, 2).double()
    before = snapshot(net)
    rescaling = dagpath.rescale_(net, torch.randn(1, 3, dtype=torch.float64))
    assert not unchanged(net, before)
    inverse = rescaling.inverse()
    inverse.apply_()
    torch.testing.assert_close(snapshot(net), before, rtol=1e-14, atol=0)
    assert inverse.objective == rescaling.objective[::-1]


def test_powers_of_two_are_bitwise_exact_and_nearly_as_good():
    net = mlp(10, 40, 30, 20, 3)
    x = torch.randn(8, 10)
    generator = torch.Generator().manual_seed(0)
    dagpath.random_rescaling(dagpath.trace(net, x), sigma=2.0, generator=generator).apply_()
    best = dagpath.balance(dagpath.trace(net, x))
    before = net(x)
    rescaling = dagpath.rescale_(net, x, power_of_two=True)
    assert torch.equal(net(x), before)
    assert rescaling.difference == 0.0
    steps = rescaling.log_scales / math.log(2)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    gained = (best.objective[0] - rescaling.objective[1]) / (best.objective[0] - best.objective[1])
    assert 0.95 < gained <= 1 + 1e-9
    rescaling.inverse().apply_()
    assert torch.equal(net(x), before)


@settings(max_examples=10)
@given(st.integers(0, 2**31 - 1))
def test_powers_of_two_never_raise_the_objective(seed):
    net = RandomNet(seed)
    rescaling = dagpath.balance(dagpath.trace(net, net.example()), power_of_two=True)
    assert rescaling.objective[1] <= rescaling.objective[0]


def test_storage_type_and_requires_grad_stay():
    net = mlp(3, 8, 2)
    net[0].weight.requires_grad_(False)
    net[0].bias.grad = torch.ones(8)
    identity = [(id(p), p.data_ptr(), p.dtype, p.requires_grad) for p in net.parameters()]
    rescaling = dagpath.rescale_(net, torch.randn(2, 3))
    assert [(id(p), p.data_ptr(), p.dtype, p.requires_grad) for p in net.parameters()] == identity
    assert torch.equal(net[0].bias.grad, torch.ones(8))
    assert "frozen parameters, rescaled too" in rescaling.summary()
    assert "1 of 4" in rescaling.summary()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(training):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
            self.aux = nn.Linear(8, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.seen = 0

        def forward(self, x):
            self.calls.add_(1)
            y = self.net[:3](x)
            return self.net[3:](y) + (self.aux(y) if self.training else 0)

    model = Stateful().train(training)
    model.net[1].eval()
    model.net[0].register_forward_hook(lambda *_: None)
    flags = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.random.get_rng_state()
    dagpath.rescale_(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(map(torch.equal, model.buffers(), buffers))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.net[0]._forward_hooks) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error_before_anything_is_touched(value):
    net = mlp(3, 4, 2)
    with torch.no_grad():
        net[2].weight[1, 3] = value
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(dagpath.BalanceError, match=r"'2.weight' has 1 value .* \(1, 3\): (nan|inf)"):
        dagpath.rescale_(net, torch.randn(1, 3))
    assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(net.parameters(), before, strict=True))


def test_a_running_variance_that_is_not_finite_is_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[1].running_var[2] = math.nan
    with pytest.raises(dagpath.BalanceError, match=r"buffer '1.running_var'"):
        dagpath.rescale_(net, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 5), r"forward raised .*\(2, 5\)"),
        (torch.ones(2, 3, dtype=torch.long), r"forward raised .*torch.int64"),
        ((torch.randn(2, 3), torch.randn(2, 3)), "forward raised"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_a_capture_error(inputs, message):
    net = mlp(3, 4, 2)
    before = snapshot(net)
    with pytest.raises(dagpath.CaptureError, match=message):
        dagpath.rescale_(net, inputs)
    assert unchanged(net, before)


def test_wrong_argument_types_are_type_errors():
    with pytest.raises(TypeError, match="Module, got function"):
        dagpath.trace(lambda x: x, torch.zeros(1))
    with pytest.raises(TypeError, match=r"Tensor or a tuple of .* got list"):
        dagpath.trace(mlp(3, 4, 2), [torch.zeros(1, 3)])


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        raise RuntimeError("out of cheese")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return -self.layer(x)


@pytest.mark.parametrize(
    ("model", "words"),
    [(Raises(), ["out of cheese", "raise RuntimeError"]), (Branches(), ["cannot be captured", "if x.sum() > 0:"])],
)
def test_a_model_that_cannot_be_captured_is_an_error_that_names_the_line(model, words):
    before = snapshot(model)
    with pytest.raises(dagpath.CaptureError) as caught:
        dagpath.rescale_(model, torch.ones(1, 3))
    for word in [*words, f"{__file__}:"]:
        assert word in str(caught.value)
    assert unchanged(model, before)


class BranchesInTraining(Branches):
    def forward(self, x):
        print("computing", file=sys.stderr)
        return super().forward(x) if self.training else self.layer(x)


def test_only_the_model_itself_prints_where_a_graph_cannot_be_captured(capfd):
    with pytest.raises(dagpath.CaptureError):
        dagpath.trace(Branches(), torch.ones(2, 3))
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match=r"cannot be captured in train mode .*if x\.sum\(\) > 0:"):
        dagpath.trace(BranchesInTraining(), torch.ones(2, 3))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert set(printed.err.splitlines()) == {"computing"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "beauty"}, "unknown criterion 'beauty'"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"bound": -1.0}, "bound must be positive"),
        ({"criterion": dagpath.PathConditioning({})}, "no entry for '0.weight'"),
    ],
)
def test_bad_options_are_refused(options, message):
    net = mlp(3, 4, 2)
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        dagpath.rescale_(net, torch.zeros(1, 3), **options)
    assert unchanged(net, before)


def test_an_option_that_does_not_exist_is_refused_before_anything_is_traced():
    expected = (
        r"rescale_\(\) got an unexpected option 'tolerance'; .*verify, kwargs, more_examples, solver, tol, .*device"
    )
    with pytest.raises(TypeError, match=expected):
        dagpath.rescale_(Raises(), torch.zeros(1, 3), tolerance=1)


def test_a_wrong_rule_is_caught_and_everything_restored(monkeypatch):
    from dagpath.rules import base, elementwise

    monkeypatch.setitem(base._REGISTRY, "tanh", elementwise.Homogeneous())
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = snapshot(net)
    with pytest.raises(dagpath.VerificationError) as caught:
        dagpath.rescale_(net, torch.randn(4, 3))
    assert caught.value.difference > caught.value.tolerance
    assert unchanged(net, before)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_of_which_rounding_is_all_that_is_left_are_no_error(seed):
    torch.manual_seed(seed)
    net, x = mlp(32, 512, 1000), torch.randn(1, 32)
    with torch.no_grad():
        net[2].bias.sub_(net(x)[0] * (1 + 1e-4 * torch.rand(1000)))
    assert dagpath.rescale_(net, x).difference > 1e-3


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError, dagpath.CaptureError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_an_interruption_while_verifying_restores_everything(error, raised):
    net = mlp(3, 4, 4, 2)
    before = snapshot(net)
    first = net[0].weight.detach().clone()

    def hook(module, args, output):
        if not torch.compiler.is_compiling() and not output.is_meta and not torch.equal(net[0].weight, first):
            raise error

    net[2].register_forward_hook(hook)
    with pytest.raises(raised):
        dagpath.rescale_(net, torch.randn(2, 3))
    assert unchanged(net, before)


def test_an_interruption_while_applying_restores_everything(monkeypatch):
    from dagpath.apply import multiply as module

    net = mlp(3, 4, 4, 2)
    found = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3)))
    before = snapshot(net)
    multiply, done = module.multiply_one_, []

    def fail_at_third(*arguments):
        multiply(*arguments)
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "multiply_one_", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        found.apply_()
    assert unchanged(net, before)


def test_an_overflow_of_a_half_type_is_refused():
    net = mlp(2, 2, 2).half()
    with torch.no_grad():
        net[0].weight.fill_(60000.0)
    found = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 2).half()))
    found.log_scales.fill_(3.0)
    before = snapshot(net)
    with pytest.raises(dagpath.BalanceError, match=r"0.weight.*float16; rescale by less .* smaller sigma"):
        found.apply_()
    assert unchanged(net, before)


def test_another_model_is_refused_and_a_copy_accepted():
    net = mlp(3, 4, 2)
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 3)))
    twin = copy.deepcopy(net)
    rescaling.apply_(twin)
    rescaling.apply_()
    assert all(map(torch.equal, snapshot(net), snapshot(twin)))
    with pytest.raises(ValueError, match="not the traced one"):
        rescaling.apply_(mlp(3, 5, 2))


def test_a_model_without_free_neurons_is_left_alone():
    for net in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))):
        before = snapshot(net)
        rescaling = dagpath.rescale_(net, torch.randn(2, 3))
        assert rescaling.converged
        assert rescaling.optimality == 0.0
        assert rescaling.log_scales.shape == (0,)
        assert unchanged(net, before)
        assert rescaling.summary()


def test_a_model_without_parameters_is_a_no_op():
    rescaling = dagpath.rescale_(nn.ReLU(), torch.randn(2, 3))
    assert rescaling.converged
    assert rescaling.objective == (0.0, 0.0)
    assert rescaling.traced.graph.incidence().shape == (0, 0)
    assert rescaling.traced.explain()


def test_a_zero_initialized_last_layer_still_balances():
    net = mlp(3, 6, 5, 2).double()
    nn.init.zeros_(net[4].weight)
    nn.init.zeros_(net[4].bias)
    rescaling = dagpath.rescale_(net, torch.randn(2, 3, dtype=torch.float64))
    assert rescaling.converged
    # the first hidden layer only has paths through the zero layer: none of its elements is live
    assert rescaling.log_scales[:6].tolist() == [0.0] * 6


def test_zero_initialized_residual_gammas_balance():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
            self.bn_a, self.bn_b, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
            nn.init.zeros_(self.bn_b.weight)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(F.relu(x + self.bn_b(self.b(F.relu(self.bn_a(self.a(x)))))))

    net = Block()
    rescaling = dagpath.rescale_(net, torch.randn(2, 2, 3, 3))
    assert rescaling.converged
    assert rescaling.difference < 1e-5


def test_all_weights_zero_is_a_defined_answer():
    net = mlp(3, 4, 4, 2)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    rescaling = dagpath.rescale_(net, torch.randn(2, 3))
    assert rescaling.converged
    assert torch.isfinite(rescaling.log_scales).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rescaled_in_their_own_type(dtype):
    net = mlp(8, 32, 16, 4).to(dtype)
    rescaling = dagpath.rescale_(net, torch.randn(4, 8).to(dtype))
    assert rescaling.converged
    assert all(parameter.dtype == dtype for parameter in net.parameters())
    assert dagpath.rescale_(net, torch.randn(4, 8).to(dtype), power_of_two=True).difference == 0.0


def test_groups_at_the_bound_are_reported():
    net = mlp(2, 3, 2).double()
    with torch.no_grad():
        net[2].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match="groups are held by the bound"):
        rescaling = dagpath.rescale_(net, torch.randn(2, 2, dtype=torch.float64), bound=0.1)
    assert float(rescaling.log_scales.abs().max()) == 0.1
    assert "groups at the bound" in rescaling.summary()


def test_stopping_early_warns_with_the_numbers():
    traced = dagpath.trace(mlp(3, 9, 8, 2), torch.zeros(1, 3))
    with pytest.warns(UserWarning, match=r"stopped after 1 iteration at an optimality of .* tolerance of 1.0e-09"):
        rescaling = dagpath.balance(traced, max_iter=1)
    assert not rescaling.converged
    assert "NOT CONVERGED" in rescaling.summary()


def test_train_mode_that_cannot_be_captured_is_a_warning():
    class NeedsTargets(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(3, 4, 2)

        def forward(self, x, target=None):
            if self.training and target is None:
                raise ValueError("no target")
            return self.net(x)

    with pytest.warns(UserWarning, match="cannot be captured in train mode .*no target"):
        traced = dagpath.trace(NeedsTargets(), torch.zeros(2, 3))
    assert traced.graph.num_groups == 4
    assert "no target" in traced.explain()


def test_wrapped_models_are_unwrapped():
    net = mlp(3, 4, 2)
    rescaling = dagpath.rescale_(nn.DataParallel(net), torch.randn(2, 3))
    assert rescaling.traced.model is net
    assert dagpath.trace(torch.compile(net), torch.randn(2, 3)).model is net


def test_a_random_rescaling_is_reproducible_and_checked():
    traced = dagpath.trace(mlp(3, 4, 2), torch.zeros(1, 3))
    draws = [dagpath.random_rescaling(traced, 0.5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(draws[0].log_scales, draws[1].log_scales)
    assert dagpath.random_rescaling(traced, 0.0).log_scales.abs().max() == 0
    with pytest.raises(ValueError, match="sigma must be"):
        dagpath.random_rescaling(traced, -1.0)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_context_of_the_caller_does_not_matter(context):
    net, x = mlp(3, 8, 8, 2), torch.randn(2, 3)
    twin = copy.deepcopy(net)
    expected = dagpath.rescale_(twin, x)
    with context():
        found = dagpath.rescale_(net, x)
    assert found.objective == expected.objective
    assert all(map(torch.equal, snapshot(net), snapshot(twin)))


def test_a_number_read_from_the_input_is_a_gate():
    class Item(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(F.relu(self.a(x))) * x.max().item()

    rescaling = dagpath.rescale_(Item(), torch.rand(2, 3))
    assert rescaling.traced.graph.num_groups == 4
    assert rescaling.converged


def test_powers_of_two_that_a_half_type_cannot_hold_are_refused():
    net = mlp(2, 2, 2).half()
    with torch.no_grad():
        net[0].weight.fill_(3 * 2.0**-24)
    traced = dagpath.trace(net, torch.zeros(1, 2).half())
    before = snapshot(net)
    scales = torch.full((2,), -math.log(2), dtype=torch.float64)
    with pytest.raises(dagpath.BalanceError, match=r"float16 is exact; rescale by less \(a smaller bound"):
        dagpath.Rescaling(traced, scales, power_of_two=True).apply_()
    assert unchanged(net, before)


@pytest.mark.parametrize(
    "function",
    [dagpath.path_norm, dagpath.gram_diagonal, dagpath.balance, dagpath.random_rescaling],
)
def test_an_untraced_model_is_a_type_error_that_says_what_to_do(function):
    with pytest.raises(TypeError, match=r"expected a TracedModel, got Sequential: make one with dagpath.trace"):
        function(mlp(3, 4, 2))


def test_a_torchscript_module_is_refused_with_the_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch warn of TorchScript itself
        scripted = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(dagpath.CaptureError, match="TorchScript"):
        dagpath.trace(scripted, torch.zeros(1, 3))


def test_a_negative_running_variance_is_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[1].running_var.fill_(-1.0)
    with pytest.raises(dagpath.BalanceError, match="negative running variance"):
        dagpath.rescale_(net, torch.randn(2, 3))


def test_summaries_say_why_nothing_was_done():
    linear = dagpath.rescale_(nn.Linear(3, 2), torch.randn(2, 3))
    assert "No neuron is free" in linear.summary()
    net = mlp(3, 4, 4, 2)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(net[0].weight)
    assert "live parameters" in dagpath.rescale_(net, torch.randn(2, 3)).summary()
