"""Optimizer state carried through a rescaling, against optimizers that saw the rescaled network's gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath

from networks import RandomNet, mlp

seeds = st.integers(0, 2**31 - 1)
optim = torch.optim
OPTIMIZERS = {
    "SGD": (optim.SGD, {"momentum": 0.9}),
    "SGD plain": (optim.SGD, {}),
    "SGD nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD dampened, maximizing": (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True, "foreach": False}),
    "SGD fused": (optim.SGD, {"momentum": 0.9, "fused": True}),
    "Adam": (optim.Adam, {}),
    "Adam amsgrad": (optim.Adam, {"amsgrad": True, "foreach": True}),
    "Adam fused": (optim.Adam, {"amsgrad": True, "fused": True}),
    "Adam with a tensor as rate": (optim.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
    "AdamW": (optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "Adamax": (optim.Adamax, {"eps": 0.0}),
    "RMSprop": (optim.RMSprop, {"eps": 0.0}),
    "RMSprop centered, momentum": (optim.RMSprop, {"eps": 1e-30, "centered": True, "momentum": 0.9}),
    "Adagrad": (optim.Adagrad, {}),
    "Adagrad fused": (optim.Adagrad, {"fused": True}),
    "Adadelta": (optim.Adadelta, {"eps": 1e-30}),
    "Rprop": (optim.Rprop, {}),
}


def feed(optimizer, parameters, gradients):
    """One step for each list of gradients."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    optimizer.zero_grad()


def states(optimizer, parameters):
    return [dict(optimizer.state[parameter]) for parameter in parameters]


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def frozen_copy(optimizer):
    """All that an optimizer's state holds, as values."""
    return copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_state_is_what_the_gradients_of_the_rescaled_network_would_have_made(kind, power_of_two):
    kind, options = OPTIMIZERS[kind]
    net = RandomNet(5).double()
    traced = dagpath.trace(net, net.example())
    rescaling = dagpath.random_rescaling(traced, 1.0, power_of_two, torch.Generator().manual_seed(0))
    factors = [rescaling.multipliers()[name] for name, _ in net.named_parameters()]
    parameters, others = list(net.parameters()), list(copy.deepcopy(net).parameters())
    past = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(4)]
    optimizer, other = kind(parameters, **options), kind(others, **options)
    feed(optimizer, parameters, past)
    feed(other, others, [[g / factor for g, factor in zip(step, factors, strict=True)] for step in past])
    rescaling.apply_()
    rescaling.apply_to_optimizer_(optimizer)
    tolerance = {"rtol": 0, "atol": 0} if power_of_two else {"rtol": 1e-11, "atol": 1e-14}
    assert_same(states(optimizer, parameters), states(other, others), **tolerance)


@settings(max_examples=15)
@given(seeds, st.sampled_from([name for name in OPTIMIZERS if "decay" not in name]))
def test_the_next_step_of_the_rescaled_network_has_the_state_of_the_other_one_carried_along(seed, kind):
    kind, options = OPTIMIZERS[kind]
    torch.manual_seed(seed)
    plain = RandomNet(seed).double()
    x, y = plain.example(8), torch.randn(8, 2, dtype=torch.float64)
    rescaled = copy.deepcopy(plain)
    traced = dagpath.trace(rescaled, x)
    nets = {plain: kind(plain.parameters(), **options), rescaled: kind(rescaled.parameters(), **options)}

    def gradients(net, sign=1.0):
        net.zero_grad()
        (net(x) - y).square().mean().backward()
        return [parameter.grad for parameter in net.parameters()]

    past = [gradients(plain) for _ in range(2)]
    for net, optimizer in nets.items():
        saved = copy.deepcopy(net.state_dict())
        feed(optimizer, list(net.parameters()), past)
        net.load_state_dict(saved)  # the next gradients are of the same function, whatever the steps were
    rescaling = dagpath.random_rescaling(traced, 2.0, True, torch.Generator().manual_seed(seed))
    rescaling.apply_(optimizers=[nets[rescaled]])
    for net, optimizer in nets.items():
        feed(optimizer, list(net.parameters()), [gradients(net)])
    rescaling.apply_to_optimizer_(nets[plain], plain)
    states_of = [states(optimizer, net.parameters()) for net, optimizer in nets.items()]
    assert_same(*states_of, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["SGD", "Adam amsgrad"])
def test_state_in_any_type_is_carried_bitwise_by_powers_of_two(kind, dtype):
    kind, options = OPTIMIZERS[kind]
    torch.manual_seed(0)
    net = mlp(3, 40, 30, 2).to(dtype)
    parameters = list(net.parameters())
    optimizer = kind(parameters, **options)
    feed(optimizer, parameters, [[torch.randn_like(p) for p in parameters]])
    before = copy.deepcopy(states(optimizer, parameters))
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3, dtype=dtype)), 1.0, power_of_two=True)
    rescaling.apply_to_optimizer_(optimizer)
    powers = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "step": 0}
    for old, new, factor in zip(before, states(optimizer, parameters), rescaling.multipliers().values(), strict=True):
        for key, value in new.items():
            assert value.dtype == old[key].dtype
            assert torch.equal(value, (old[key].double() / factor ** powers[key]).to(value.dtype)) or key == "step"
            assert key != "step" or value == old[key]


def test_averages_of_parameters_move_like_parameters():
    net = mlp(3, 4, 2).double()
    optimizer = torch.optim.ASGD(net.parameters(), t0=0)
    feed(optimizer, list(net.parameters()), [[torch.randn_like(p) for p in net.parameters()] for _ in range(3)])
    before = copy.deepcopy(states(optimizer, net.parameters()))
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3).double()), power_of_two=True)
    rescaling.apply_(optimizers=[optimizer])
    after = states(optimizer, net.parameters())
    for old, new, factor in zip(before, after, rescaling.multipliers().values(), strict=True):
        assert torch.equal(new.pop("ax"), old.pop("ax") * factor)
        assert old == new


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_several_optimizers_may_share_a_model():
    net = mlp(3, 4, 5, 2).double()
    weights = [p for p in net.parameters() if p.ndim == 2]
    biases = [p for p in net.parameters() if p.ndim == 1]
    both = torch.optim.Muon(weights), torch.optim.Adam(biases)
    for parameters, optimizer in zip((weights, biases), both, strict=True):
        feed(optimizer, parameters, [[torch.randn_like(p) for p in parameters]])
    before = {**both[0].state, **both[1].state}
    before = {id(p): {key: value.clone() for key, value in state.items()} for p, state in before.items()}
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3).double()), power_of_two=True)
    rescaling.apply_(optimizers=both)
    for (name, parameter), optimizer in zip(net.named_parameters(), both * 3, strict=True):
        buffer = "momentum_buffer" if parameter.ndim == 2 else "exp_avg"
        old = before[id(parameter)][buffer]
        assert torch.equal(optimizer.state[parameter][buffer], old / rescaling.multipliers()[name])


def test_gradients_are_carried_along_and_what_is_not_the_models_is_left_alone():
    net, elsewhere = mlp(3, 4, 2).double(), nn.Linear(2, 2).double()
    net[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*net.parameters(), *elsewhere.parameters()], lr=0.1, momentum=0.9)
    (elsewhere(net(torch.randn(5, 3).double()))).square().sum().backward()
    optimizer.step()
    outside = {p: (p.grad.clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in elsewhere.parameters()}
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3).double()), power_of_two=True)
    rescaling.apply_(optimizers=[optimizer, optimizer])  # once is enough
    for name, gradient in gradients.items():
        assert torch.equal(net.get_parameter(name).grad, gradient / rescaling.multipliers()[name])
    assert net[0].bias.grad is None
    for parameter, (gradient, momentum) in outside.items():
        assert torch.equal(parameter.grad, gradient)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)


def test_empty_state_is_fine_before_the_first_step():
    net = mlp(3, 4, 2)
    optimizer = torch.optim.Adam(net.parameters())
    dagpath.balance(dagpath.trace(net, torch.zeros(1, 3))).apply_(optimizers=[optimizer])
    assert not optimizer.state


class Lookahead(torch.optim.SGD):
    """A subclass with a buffer more."""


class Sketching(torch.optim.Optimizer):
    """An optimizer that nothing is known of."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})


def sgd_with(buffer, value, kind=torch.optim.SGD):
    def make(net):
        optimizer = kind(net.parameters())
        optimizer.state[net[0].weight]["momentum_buffer"] = torch.ones_like(net[0].weight)
        optimizer.state[net[2].weight][buffer] = value
        return optimizer

    return make


def sketching(net):
    optimizer = Sketching(net.parameters())
    optimizer.state[net[0].weight] = {"momentum_buffer": torch.ones(4, 3), "sketch": torch.ones(2)}
    return optimizer


def with_global_state(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state["curvature"] = torch.ones(3)
    return optimizer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (sketching, ValueError, r"state of Sketching, which keeps 'momentum_buffer', 'sketch', moves.*register_state"),
        (
            lambda net: torch.optim.LBFGS(net.parameters()),
            ValueError,
            "state of LBFGS cannot be carried along.*inner products",
        ),
        (
            lambda net: torch.optim.Adafactor(net.parameters()),
            ValueError,
            "state of Adafactor cannot be carried along.*rows and columns",
        ),
        (sgd_with("slow", torch.ones(2, 4), Lookahead), ValueError, "'slow' of '2.weight' in Lookahead: .*register_st"),
        (sgd_with("history", [torch.ones(2, 4)]), ValueError, "'history' of '2.weight' in SGD"),
        (sgd_with("momentum_buffer", torch.ones(4)), ValueError, r"has shape \(4,\), the parameter \(2, 4\)"),
        (
            sgd_with("momentum_buffer", [1]),
            ValueError,
            "'momentum_buffer' of '2.weight' in SGD is no tensor but .* list",
        ),
        (sgd_with("momentum_buffer", torch.ones(2, 4).byte()), ValueError, "is torch.strided of torch.uint8"),
        (sgd_with("momentum_buffer", torch.ones(2, 4).to_sparse()), ValueError, "is torch.sparse_coo of torch.float32"),
        (with_global_state, ValueError, "SGD keeps state under 'curvature', which is no parameter"),
        (lambda net: net.parameters(), TypeError, "expected a torch.optim.Optimizer, got generator"),
    ],
)
def test_state_that_is_not_known_is_refused_and_nothing_changes(make, error, message):
    net = mlp(3, 4, 2)
    optimizer = make(net)
    rescaling = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3)), sigma=1.0)
    parameters = copy.deepcopy(net.state_dict())
    state = frozen_copy(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None
    for apply in (rescaling.apply_to_optimizer_, lambda o: rescaling.apply_(optimizers=[o])):
        with pytest.raises(error, match=message):
            apply(optimizer)
        torch.testing.assert_close(net.state_dict(), parameters, rtol=0, atol=0)
        if state is not None:
            assert str(frozen_copy(optimizer)) == str(state)


def test_a_registered_optimizer_and_its_subclasses_are_known():
    class Averaging(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    class Child(Averaging):
        pass

    net = mlp(3, 4, 2).double()
    traced = dagpath.trace(net, torch.zeros(1, 3).double())
    rescaling = dagpath.random_rescaling(traced, power_of_two=True)
    dagpath.optim.register_state(Averaging, {"cube": -3, "mean": 1, "root": 0.5, "signs": 0})
    optimizer = Child(net.parameters())
    weight, factor = net[2].weight, rescaling.multipliers()["2.weight"]
    before = {"cube": torch.rand_like(weight), "mean": torch.rand_like(weight), "root": torch.rand_like(weight)}
    signs = [1, 2, 3]
    optimizer.state[weight] = {key: value.clone() for key, value in before.items()} | {"signs": signs, "count": 3}
    rescaling.apply_to_optimizer_(optimizer)
    state = optimizer.state[weight]
    assert torch.equal(state["cube"], before["cube"] / factor**3)
    assert torch.equal(state["mean"], before["mean"] * factor)
    torch.testing.assert_close(state["root"], before["root"] * factor.sqrt(), rtol=1e-14, atol=0)
    assert (state["signs"], state["count"]) == ([1, 2, 3], 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear, {}), TypeError, "expected a subclass of torch.optim.Optimizer, got <class .*Linear"),
        (
            (torch.optim.SGD(nn.Linear(1, 1).parameters()), {}),
            TypeError,
            "expected a subclass of torch.optim.Optimizer",
        ),
        ((Sketching, {"a": "-1"}), TypeError, "the power of 'a' must be a number, got str"),
        ((Sketching, {"a": float("inf")}), ValueError, "the power of 'a' must be finite, got inf"),
    ],
)
def test_bad_registrations_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        dagpath.optim.register_state(*arguments)


def test_state_that_leaves_its_range_leaves_parameters_and_state_as_they_were():
    net = mlp(3, 4, 2)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters)
    feed(optimizer, parameters, [[torch.full_like(p, 1e17) for p in parameters]])
    state, values = frozen_copy(optimizer), copy.deepcopy(net.state_dict())
    rescaling = dagpath.Rescaling(dagpath.trace(net, torch.zeros(1, 3)), torch.full((4,), -20.0, dtype=torch.float64))
    with pytest.raises(
        dagpath.BalanceError, match=r"'exp_avg_sq' of '0.weight' in Adam.* leave the range of torch.float32"
    ):
        rescaling.apply_(optimizers=[optimizer])
    assert str(frozen_copy(optimizer)) == str(state)
    torch.testing.assert_close(net.state_dict(), values, rtol=0, atol=0)
