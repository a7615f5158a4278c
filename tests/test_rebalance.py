"""Balancing during training, against recursions written by hand."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath
from dagpath.optim import EquiNormCycle, Rebalance

from networks import RandomNet, mlp

seeds = st.integers(0, 2**31 - 1)


def batches(net, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = getattr(net, "input_shape", (3,)), next(net.parameters()).dtype
    return [
        (torch.randn(8, *shape, generator=generator).to(dtype), torch.randn(8, 2, generator=generator).to(dtype))
        for _ in range(steps)
    ]


def backward(net, batch):
    net.zero_grad()
    loss = (net(batch[0]) - batch[1]).square().mean()
    loss.backward()
    return loss.item()


def train(net, optimizer, data):
    losses = []
    for batch in data:
        losses.append(backward(net, batch))
        optimizer.step()
    return losses


def by_hand(net, data, every, lr, momentum, factors_of):
    """SGD with momentum where θ and its buffer b become μθ and b / μ after every k-th step; the losses."""
    buffers = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    losses = []
    for step, batch in enumerate(data, 1):
        losses.append(backward(net, batch))
        factors = {}
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                buffers[name] = momentum * buffers[name] + parameter.grad
                parameter -= lr * buffers[name]
            if step % every == 0:
                factors = factors_of(net)
            for name, factor in factors.items():
                net.get_parameter(name).mul_(factor)
                buffers[name] = buffers[name] / factor
    return losses, buffers


@settings(max_examples=10)
@given(seeds, st.sampled_from(["pathcond", dagpath.EquiNorm(1)]))
def test_rebalance_around_sgd_with_momentum_is_the_recursion_by_hand(seed, criterion):
    net = RandomNet(seed).double()
    other, data = copy.deepcopy(net), batches(net, 8)
    traced, traced_other = (dagpath.trace(each, data[0][0]) for each in (net, other))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    handle = Rebalance(traced, optimizer, every=3, criterion=criterion)
    losses = train(net, optimizer, data)
    expected, buffers = by_hand(
        other, data, 3, 1e-3, 0.9, lambda _: dagpath.balance(traced_other, criterion).multipliers()
    )
    assert losses == pytest.approx(expected, rel=1e-9)
    assert handle.steps == 8
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], buffers[name], rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_cycle_sets_each_group_in_turn_to_equal_sums_and_divides_momentum(p):
    torch.manual_seed(0)
    net = mlp(3, 6, 5, 4, 2).double()
    other, data = copy.deepcopy(net), batches(net, 5)

    def cycle(net):
        """Layer after layer: a hidden layer does not meet itself."""
        factors = {name: torch.ones_like(parameter) for name, parameter in net.named_parameters()}
        moved = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        for layer in (0, 2, 4):
            into, bias, out_of = f"{layer}.weight", f"{layer}.bias", f"{layer + 2}.weight"
            entering = moved[into].abs().pow(p).sum(1) + moved[bias].abs().pow(p)
            scale = (moved[out_of].abs().pow(p).sum(0) / entering) ** (1 / (2 * p))
            for name, factor in ((into, scale[:, None]), (bias, scale), (out_of, 1 / scale)):
                moved[name] = moved[name] * factor
                factors[name] = factors[name] * factor
        return factors

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with warnings.catch_warnings(record=True) as warned:
        handle = EquiNormCycle(dagpath.trace(net, data[0][0]), optimizer, p=p)
        losses = train(net, optimizer, data)
    assert not warned
    assert handle.rescaling.iterations == 1
    expected, buffers = by_hand(other, data, 1, 0.05, 0.9, cycle)
    assert losses == pytest.approx(expected, rel=1e-10)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], buffers[name], rtol=1e-9, atol=1e-12)


class Residual(nn.Module):
    """Batch norm that trains, an identity skip, and a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block, self.down = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 2)
        self.input_shape = (2, 6, 6)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.block(x))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


@pytest.mark.parametrize("cycle", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_the_function_is_kept_in_train_and_eval_mode_at_every_rebalance(kind, cycle):
    torch.manual_seed(0)
    net = Residual().double()
    data = batches(net, 6)
    optimizer = kind(net.parameters(), lr=1e-2)
    traced, seen = dagpath.trace(net, data[0][0]), []

    def outputs():
        saved, training = copy.deepcopy(net.state_dict()), net.training
        results = [net.train(mode)(data[0][0]).detach() for mode in (True, False)]
        net.load_state_dict(saved)
        net.train(training)
        return results

    optimizer.register_step_post_hook(lambda *_: seen.append(outputs()))
    handle = EquiNormCycle(traced, optimizer) if cycle else Rebalance(traced, optimizer, every=1)
    optimizer.register_step_post_hook(lambda *_: seen.append(outputs()))
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, data)
    assert len(seen) == 12
    for old, new in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-12)
    assert float(handle.rescaling.log_scales.abs().max()) > 1e-6
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_powers_of_two_keep_the_outputs_bitwise():
    torch.manual_seed(0)
    net = mlp(3, 20, 10, 2)
    with torch.no_grad():
        net[0].weight.mul_(30)
    data = batches(net, 4)
    optimizer, seen = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9), []
    optimizer.register_step_post_hook(lambda *_: seen.append(net(data[0][0])))
    handle = Rebalance(dagpath.trace(net, data[0][0]), optimizer, 2, power_of_two=True)
    optimizer.register_step_post_hook(lambda *_: seen.append(net(data[0][0])))
    train(net, optimizer, data[:2])
    assert int((handle.rescaling.log_scales != 0).sum())
    for old, new in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_resumes_bitwise_from_the_states(kind):
    torch.manual_seed(0)
    net = mlp(3, 8, 6, 2)
    data = batches(net, 10)

    def start(net):
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(net.parameters(), lr=0.01, **options)
        return optimizer, Rebalance(dagpath.trace(net, data[0][0]), optimizer, every=4)

    optimizer, handle = start(net)
    train(net, optimizer, data[:6])
    again = mlp(3, 8, 6, 2)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), handle.state_dict()))
    optimizer_again, handle_again = start(again)
    for part, state in zip((again, optimizer_again, handle_again), saved, strict=True):
        part.load_state_dict(state)
    losses = [train(each, o, data[6:]) for each, o in ((net, optimizer), (again, optimizer_again))]
    assert losses[0] == losses[1]
    assert handle.steps == handle_again.steps == 10
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"key 'steps' alone, got \['param_groups', 'state'\]"):
        handle.load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR of PyTorch 2.6 warns of itself
def test_schedulers_closures_clipping_and_parameter_groups_work_as_ever():
    torch.manual_seed(0)
    net, outside = mlp(3, 8, 6, 2).double(), nn.Linear(2, 2).double()
    data = batches(net, 6)
    optimizer = torch.optim.SGD([{"params": net.parameters(), "lr": 0.02}], lr=0.01, momentum=0.9)
    handle = Rebalance(dagpath.trace(net, data[0][0]), optimizer, every=2)
    optimizer.add_param_group({"params": outside.parameters()})
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        [2],
    )
    rates, losses = [], []
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (outside(net(x)) - y).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert handle.steps == 6
    assert len(set(rates)) > 3
    assert all(math.isfinite(loss) for loss in losses)
    handle.remove()
    optimizer.step()
    assert handle.steps == 6


def test_an_accumulating_gradient_goes_on_as_if_it_had_been_of_the_rescaled_model():
    torch.manual_seed(0)
    net = mlp(3, 8, 6, 2).double()
    data = batches(net, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    Rebalance(dagpath.trace(net, data[0][0]), optimizer, every=1, power_of_two=True)
    with torch.no_grad():
        net[2].weight.mul_(8)
    backward(net, data[0])
    optimizer.step()  # the parameters stay, but for the rescaling
    (net(data[1][0]) - data[1][1]).square().mean().backward()
    accumulated = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sum((net(x) - y).square().mean() for x, y in data).backward()
    for found, parameter in zip(accumulated, net.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_are_rescaled_too_and_trainable_ones_must_be_held():
    torch.manual_seed(0)
    net = mlp(3, 8, 6, 2).double()
    data = batches(net, 2)
    traced = dagpath.trace(net, data[0][0])
    optimizer = torch.optim.SGD([*net[0].parameters(), *net[4].parameters()], lr=0.01)
    with pytest.raises(ValueError, match=r"parameter '2.weight' is trainable, but the optimizer does not hold it"):
        Rebalance(traced, optimizer, 1)
    net[2].requires_grad_(False)
    frozen = net[2].weight.clone()
    handle = Rebalance(traced, optimizer, 1)
    train(net, optimizer, data)
    assert not torch.equal(net[2].weight, frozen)
    assert not net[2].weight.requires_grad
    net[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'2.weight' is trainable"):
        optimizer.step()
    assert handle.steps == 3
    handle.remove()


def test_several_optimizers_of_a_model_are_carried_along_together():
    torch.manual_seed(0)
    net = mlp(3, 8, 6, 2).double()
    data = batches(net, 1)
    traced = dagpath.trace(net, data[0][0])
    other = torch.optim.Adam(net[2].parameters())
    optimizer = torch.optim.SGD([*net[0].parameters(), *net[4].parameters()], lr=0.01)
    handle = Rebalance(traced, [other, optimizer], 1)
    backward(net, data[0])
    other.step()
    assert handle.steps == 0
    optimizer.step()
    assert handle.steps == 1
    moment = other.state[net[2].weight]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * net[2].weight.grad, rtol=1e-12, atol=1e-14)  # both were carried along


def test_a_compiled_model_under_autocast_sees_the_rescaled_parameters():
    torch.manual_seed(0)
    net = mlp(3, 16, 12, 2)
    compiled = torch.compile(net, backend="aot_eager")
    data = batches(net, 6)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    handle = Rebalance(dagpath.trace(compiled, data[0][0]), optimizer, every=2)
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (compiled(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(compiled(x), net(x))
    assert handle.steps == 6
    assert net[0].weight.dtype == torch.float32
    assert float(handle.rescaling.log_scales.abs().max()) > 1e-6


def test_a_compiled_step_is_a_step():
    torch.manual_seed(0)
    net = mlp(3, 8, 2)
    data = batches(net, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    handle = Rebalance(dagpath.trace(net, data[0][0]), optimizer, every=3)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for batch in data:
        backward(net, batch)
        step()
    assert handle.steps == 3
    assert handle.rescaling.converged


def test_a_step_that_calls_the_step_of_its_parent_is_one_step():
    class Child(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    net = mlp(3, 8, 2)
    torch.optim.SGD(net.parameters())  # from its first instance on, the steps of a class call hooks
    optimizer = Child(net.parameters())
    handle = Rebalance(dagpath.trace(net, torch.zeros(1, 3)), optimizer, every=2)
    train(net, optimizer, batches(net, 3))
    assert handle.steps == 3


def test_a_solver_that_stops_short_warns_once():
    torch.manual_seed(0)
    net = mlp(3, 8, 6, 2)
    data = batches(net, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    handle = Rebalance(dagpath.trace(net, data[0][0]), optimizer, 1, tol=1e-300)
    with pytest.warns(UserWarning, match="above the tolerance of 1.0e-300") as warned:
        train(net, optimizer, data)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert not handle.rescaling.converged
    handle.remove()
    Rebalance(dagpath.trace(net, data[0][0]), optimizer, 1, max_iter=0)
    train(net, optimizer, data)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ({"traced": "net"}, {}, TypeError, "expected a TracedModel, got str"),
        ({"optimizer": [3]}, {}, TypeError, "expected a torch.optim.Optimizer, got int"),
        ({"optimizer": 3}, {}, TypeError, "expected a torch.optim.Optimizer, got int"),
        ({"optimizer": []}, {}, ValueError, "no optimizer was given"),
        ({"every": 0}, {}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, {}, TypeError, "every must be a number of steps, got 2.0"),
        ({}, {"criterion": "balance"}, ValueError, "unknown criterion 'balance'"),
        ({}, {"solver": "sgd"}, ValueError, "unknown solver 'sgd'"),
        ({}, {"tol": -1.0}, ValueError, "tol must be positive, got -1.0"),
        ({}, {"power_of_tow": True}, TypeError, "unexpected keyword argument 'power_of_tow'"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(arguments, options, error, message):
    net = mlp(3, 4, 2)
    good = {
        "traced": dagpath.trace(net, torch.zeros(1, 3)),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "every": 3,
    }
    with pytest.raises(error, match=message):
        Rebalance(**{**good, **arguments}, **options)


def test_an_optimizer_whose_state_is_not_known_is_refused_before_the_first_step():
    net = mlp(3, 4, 2)
    with pytest.raises(ValueError, match="the state of LBFGS cannot be carried along"):
        EquiNormCycle(dagpath.trace(net, torch.zeros(1, 3)), torch.optim.LBFGS(net.parameters()))


def test_a_parameter_that_is_not_finite_stops_the_step_with_its_name():
    net = mlp(3, 4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Rebalance(dagpath.trace(net, torch.zeros(1, 3)), optimizer, 1)
    net[0].weight.grad = torch.full((4, 3), torch.nan)
    with pytest.raises(dagpath.BalanceError, match=r"'0.weight' has 12 values that are not finite"):
        optimizer.step()
