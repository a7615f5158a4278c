"""Path-SGD: its step by explicit paths, invariance, and use as an optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_basis import loss_of, residual_net
from test_gsgd import EXAMPLE, NETWORKS, assert_rescaled_twins_stay_equal
from torch import nn

import dagpath
from dagpath.optim import PathSGD

from networks import BruteForce, Net, RandomNet, mlp


def test_steps_divide_the_gradient_by_the_squared_paths_through_each_element():
    for seed in range(12):
        net = RandomNet(seed).double()
        if BruteForce.count(net) > 2_000:
            continue
        x = net.example(3)
        diagonal = {name: torch.from_numpy(gram) for name, gram in BruteForce(net).gram.items()}
        net(x).square().sum().backward()
        expected = {name: p.detach() - 0.01 * p.grad / diagonal[name] for name, p in net.named_parameters()}
        PathSGD(dagpath.trace(net, x), lr=0.01).step()
        for name, parameter in net.named_parameters():
            met = diagonal[name] > 0
            torch.testing.assert_close(parameter[met], expected[name][met])


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_differ_by_a_rescaling_have_the_same_outputs_after_training(name, every):
    assert_rescaled_twins_stay_equal(name, lambda traced: PathSGD(traced, lr=1e-2, every=every))


def test_the_gram_diagonal_is_computed_every_so_many_steps_only(monkeypatch):
    net = residual_net(0)
    optimizer = PathSGD(dagpath.trace(net, EXAMPLE), lr=1e-4, every=3)
    ages = []
    measure = PathSGD._measure
    monkeypatch.setattr(PathSGD, "_measure", lambda self: (ages.append(len(seen)), measure(self)))
    seen: list[int] = []
    for _ in range(7):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        seen.append(0)
    assert ages == [0, 3, 6]


def test_a_layer_of_zeros_comes_to_life_and_frozen_parameters_stay():
    torch.manual_seed(0)
    net = mlp(5, 8, 3).double()
    with torch.no_grad():
        net[2].weight.zero_()
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy(net)
    x, target = torch.randn(32, 5, dtype=torch.float64), torch.randint(3, (32,))
    optimizer = PathSGD(dagpath.trace(net, x), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert torch.equal(net[0].bias, before[0].bias)
    assert not torch.equal(net[0].weight, before[0].weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_diagonal_is_that_of_its_closed_form_where_all_paths_are_zero(layer, bias):
    net = mlp(3, 4, 4, 2).double().requires_grad_(False)
    net[layer].weight.zero_()
    for module in net[::2]:
        module.bias.mul_(float(bias and module is not net[layer]))
    arriving, leaving = [torch.ones(3, dtype=torch.float64)], [torch.ones(2, dtype=torch.float64)]
    for module in net[::2]:
        arriving.append(module.weight.square() @ arriving[-1] + module.bias.square())
    for module in reversed(net[::2]):
        leaving.insert(0, leaving[0] @ module.weight.square())
    found = dagpath.gram_diagonal(dagpath.trace(net, torch.zeros(1, 3).double()))
    for index, before, after in zip((0, 2, 4), arriving, leaving[1:], strict=False):
        torch.testing.assert_close(found[f"{index}.weight"], torch.outer(after, before))
        torch.testing.assert_close(found[f"{index}.bias"], after)


def test_a_head_of_zeros_comes_to_life():
    net = mlp(5, 8, 3)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.zero_()
    x, target = torch.randn(32, 5), torch.randint(3, (32,))
    optimizer = PathSGD(dagpath.trace(net, x), lr=0.05)
    before = copy.deepcopy(net)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))


def test_a_saved_state_resumes_bitwise():
    net, other = residual_net(1), residual_net(2)
    optimizers = [PathSGD(dagpath.trace(model, EXAMPLE), lr=1e-3, every=4) for model in (net, other)]

    def train(model: nn.Module, optimizer: PathSGD, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    train(net, optimizers[0], 6)
    other.load_state_dict(net.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((net, other), optimizers, strict=True):
        train(model, optimizer, 6)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def with_auxiliary_head(m, x):
    hidden = F.relu(m.hidden(x))
    return m.head(hidden) + m.auxiliary(hidden) if m.training else m.head(hidden)


def test_what_is_used_in_training_only_takes_steps_of_sgd():
    torch.manual_seed(0)
    net = Net(with_auxiliary_head, hidden=nn.Linear(4, 6), head=nn.Linear(6, 2), auxiliary=nn.Linear(6, 2)).double()
    before = copy.deepcopy(net)
    x = torch.randn(16, 4, dtype=torch.float64)
    optimizer = PathSGD(dagpath.trace(net, x), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()
    expected = before.auxiliary.weight - 0.1 * net.auxiliary.weight.grad
    torch.testing.assert_close(net.auxiliary.weight, expected)


def test_parameters_may_be_frozen_and_thawed_between_two_measurements():
    torch.manual_seed(0)
    net = mlp(5, 8, 3)
    net[2].bias.requires_grad_(False)
    x = torch.randn(16, 5)
    optimizer = PathSGD(dagpath.trace(net, x), lr=0.01, every=10)
    before = copy.deepcopy(net)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    net[0].weight.requires_grad_(False)
    step()
    assert torch.equal(net[0].weight, before[0].weight)
    net.requires_grad_(True)
    step()
    assert not torch.equal(net[0].weight, before[0].weight)
    assert torch.equal(net[2].bias, before[2].bias)  # the optimizer does not have it
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("dtype", "depth", "rtol"), [(torch.float32, 60, 1e-4), (torch.float16, 6, 4e-3)])
def test_small_paths_do_not_leave_the_range_of_the_parameters(dtype, depth, rtol):
    torch.manual_seed(0)
    net = mlp(5, *[8] * depth, 3).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    before, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    smallest = float(dagpath.gram_diagonal(dagpath.trace(exact, torch.zeros(1, 5).double()))["0.weight"].max())
    assert smallest < 1 / torch.finfo(dtype).max
    for model in (net, exact):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0**-6)
        PathSGD(dagpath.trace(model, torch.zeros(1, 5).to(model[0].weight)), lr=smallest).step()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=rtol, atol=rtol * float(q.detach().abs().max()))
    assert not torch.equal(net[0].weight, before[0].weight)


def test_a_copy_is_refused_and_so_is_the_state_of_something_else():
    net = mlp(2, 3, 1)
    optimizer = PathSGD(dagpath.trace(net, torch.zeros(1, 2)), lr=0.1)
    with pytest.raises(TypeError, match="cannot be copied or pickled: make another from a trace of the model's copy"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="this is no state of a PathSGD"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())


def test_bad_options_are_refused():
    traced = dagpath.trace(mlp(2, 3, 1), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="lr must be finite and not negative, got -1"):
        PathSGD(traced, lr=-1)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        PathSGD(traced, lr=1.0, every=0)
    with pytest.raises(TypeError, match=r"every must be a number of steps, got 1\.5"):
        PathSGD(traced, lr=1.0, every=1.5)
    with pytest.raises(TypeError, match="expected a TracedModel"):
        PathSGD(traced.model, lr=1.0)
