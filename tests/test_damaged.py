"""Damaged and foreign files and states are refused with what is wrong in them, and leave everything as it was."""

import copy
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dagpath
from dagpath.optim import GSGD, EquiNormCycle, PathSGD, Rebalance

from networks import mlp

# -- files of a rescaling ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A trace, the factors of one rescaling, what is saved beside them, and where."""
    torch.manual_seed(0)
    traced = dagpath.trace(mlp(4, 6, 3), torch.zeros(1, 4))
    path = tmp_path / "factors.safetensors"
    rescaling = dagpath.balance(traced)
    rescaling.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return traced, {"log_scales": rescaling.log_scales, "held": rescaling.held}, metadata, path


def changed(**entries):
    return lambda found: json.dumps({**found, **entries})


def without(name):
    return lambda found: json.dumps({key: value for key, value in found.items() if key != name})


METADATA = {
    "nothing": (lambda found: "", "its metadata is no JSON"),
    "truncated": (lambda found: json.dumps(found)[:40], "its metadata is no JSON"),
    "nested without end": (lambda found: "[" * 100_000, "its metadata is no JSON"),
    "a list": (lambda found: "[1, 2]", "its metadata is list, not an object"),
    "null": (lambda found: "null", "its metadata is NoneType, not an object"),
    "one more entry": (changed(log_scales=1), "its metadata has 'log_scales', which no rescaling has"),
    "another trace": (changed(traced="x"), "its metadata has 'traced', which no rescaling has"),
    "a word for a truth": (changed(power_of_two="yes"), "'power_of_two' in its metadata is 'yes'"),
    "a number for a truth": (changed(converged=1), "'converged' in its metadata is '1'"),
    "one objective": (changed(objective=[1.0]), r"'objective' in its metadata is '\[1.0\]'"),
    "no objective": (changed(objective=None), "'objective' in its metadata is 'None'"),
    "words as objective": (changed(objective=["a", "b"]), "'objective' in its metadata"),
    "negative iterations": (changed(iterations=-1), "'iterations' in its metadata is '-1'"),
    "half an iteration": (changed(iterations=0.5), "'iterations' in its metadata is '0.5'"),
    "a live word": (changed(live="all"), "'live' in its metadata is 'all'"),
    "a nested bound": (changed(bound=[[]]), r"'bound' in its metadata is '\[\[\]\]'"),
    "a measure of numbers": (changed(measure=3), "'measure' in its metadata is '3'"),
    **{f"no {name}": (without(name), f"its metadata has no '{name}'") for name in ("converged", "bound", "objective")},
}


@pytest.mark.parametrize("damage", METADATA)
def test_a_rescaling_with_damaged_metadata_is_refused_by_name(damage, saved):
    traced, tensors, metadata, path = saved
    change, message = METADATA[damage]
    text = change(json.loads(metadata["dagpath.apply.rescaling"]))
    save_file(tensors, path, {**metadata, "dagpath.apply.rescaling": text})
    with pytest.raises(ValueError, match=f"{path.name} is damaged: {message}"):
        dagpath.Rescaling.load(path, traced)


TENSORS = {
    "no factors": (lambda t: {"held": t["held"]}, "has no tensor 'log_scales'"),
    "nothing held": (lambda t: {"log_scales": t["log_scales"]}, "has no tensor 'held'"),
    "too few": (lambda t: {**t, "log_scales": t["log_scales"][:2].clone()}, r"'log_scales' is .* of shape \(2,\)"),
    "too many": (lambda t: {**t, "log_scales": torch.zeros(10**6).double()}, r"of shape \(1000000,\), not .*\(6,\)"),
    "single": (lambda t: {**t, "log_scales": t["log_scales"].float()}, r"'log_scales' is torch.float32"),
    "integers": (lambda t: {**t, "log_scales": t["log_scales"].long()}, r"'log_scales' is torch.int64"),
    "NaN": (lambda t: {**t, "log_scales": t["log_scales"] * math.nan}, "'log_scales' at index 0 is nan, not"),
    "infinite": (lambda t: {**t, "log_scales": t["log_scales"] / 0.0}, "'log_scales' at index 0 is -?inf, not"),
    "huge": (lambda t: {**t, "log_scales": t["log_scales"] * 0 + 1e4}, "'log_scales' at index 0 is 10000.0, not"),
    "held numbers": (lambda t: {**t, "held": t["held"].long()}, "'held' is torch.int64"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_a_rescaling_with_damaged_factors_is_refused_by_name(damage, saved):
    traced, tensors, metadata, path = saved
    change, message = TENSORS[damage]
    save_file(change(tensors), path, metadata)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*{message}"):
        dagpath.Rescaling.load(path, traced)


def test_factors_that_should_be_powers_of_two_are(saved):
    traced, tensors, metadata, path = saved
    found = json.loads(metadata["dagpath.apply.rescaling"])
    save_file(tensors, path, {**metadata, "dagpath.apply.rescaling": json.dumps({**found, "power_of_two": True})})
    with pytest.raises(
        ValueError, match=r"is damaged: 'log_scales' at index 0 is .*, not the logarithm of a power of two"
    ):
        dagpath.Rescaling.load(path, traced)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds no rescaling"),
        ({"dagpath.graph": "x"}, "holds no rescaling"),
        ({"dagpath.apply.rescaling": "{}"}, "is for a model with another neuron graph"),
        ({"dagpath.apply.rescaling": "{}", "dagpath.graph": "x"}, "is for a model with another neuron graph"),
    ],
)
def test_a_file_of_something_else_is_no_rescaling(metadata, message, saved):
    traced, tensors, _, path = saved
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"{path.name} {message}"):
        dagpath.Rescaling.load(path, traced)


def test_bytes_that_are_no_file_of_tensors_are_refused(saved):
    traced, _, _, path = saved
    whole = path.read_bytes()
    huge = (2**62).to_bytes(8, "little") + whole[8:]
    for damaged in (b"", whole[:4], whole[:100], whole[:-3], huge, b"\0" * 64, b"{}" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name} is no safetensors file"):
            dagpath.Rescaling.load(path, traced)


def test_what_is_no_file_is_refused_at_once(saved, tmp_path):
    traced = saved[0]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none", "there is no file"),
        (tmp_path / "pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path / "a", "cannot be read: .*symbolic links"),
    ):
        with pytest.raises(OSError, match=message):
            dagpath.Rescaling.load(path, traced)


# -- states of optimizers ----------------------------------------------------------------------------------------------


def trained(kind, net):
    """An optimizer that has taken steps, its state, and its model."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    traced = dagpath.trace(net, x)
    optimizer = GSGD(traced, lr=1e-3, momentum=0.9, refresh=2) if kind == "GSGD" else PathSGD(traced, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return optimizer, x


def content(value):
    """All that a state holds, in a form that compares."""
    if isinstance(value, dict):
        return {key: content(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [content(entry) for entry in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def assert_refused(optimizer, state, net, x, message=None):
    """The state is refused, and the optimizer goes on as a copy that never saw it."""
    before, weights = content(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert content(optimizer.state_dict()) == before
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    net(x).square().mean().backward()
    optimizer.step()


OTHERS = {
    "wider": lambda: mlp(4, 8, 7, 3),
    "as many groups, otherwise placed": lambda: mlp(4, 6, 7, 3),
    "deeper": lambda: mlp(4, 7, 6, 5, 3),
    "without biases": lambda: nn.Sequential(
        nn.Linear(4, 7, bias=False), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)
    ),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["GSGD", "PathSGD"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_architecture_is_refused_at_once(name, kind, momentum):
    torch.manual_seed(0)
    net = mlp(4, 7, 6, 3)
    optimizer, x = trained(kind, net)
    other, _ = trained(kind, OTHERS[name]())
    state = other.state_dict()
    if not momentum and kind == "GSGD":
        state["state"], state["skeleton"]["momentum"] = {}, None
    assert_refused(optimizer, state, net, x)


def at(state, *keys, value):
    """The state with another value somewhere."""
    state = copy.deepcopy(state)
    place = state
    for key in keys[:-1]:
        place = place[key]
    if value is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return state


STATES = {
    "no state": lambda s: at(s, "state", value=KeyError),
    "no groups": lambda s: at(s, "param_groups", value=KeyError),
    "a list": lambda s: [1, 2],
    "nothing": lambda s: None,
    "empty": lambda s: {},
    "groups of words": lambda s: at(s, "param_groups", value=["a"]),
    "groups in a dictionary": lambda s: at(s, "param_groups", value={}),
    "two groups": lambda s: at(s, "param_groups", value=s["param_groups"] * 2),
    "no parameters": lambda s: at(s, "param_groups", 0, "params", value=KeyError),
    "fewer parameters": lambda s: at(s, "param_groups", 0, "params", value=[0]),
    "lists of parameters": lambda s: at(s, "param_groups", 0, "params", value=[[0]] * 6),
    "no rate": lambda s: at(s, "param_groups", 0, "lr", value=KeyError),
    "a rate that is none": lambda s: at(s, "param_groups", 0, "lr", value=math.nan),
    "a word as rate": lambda s: at(s, "param_groups", 0, "lr", value="fast"),
    "a rate of many": lambda s: at(s, "param_groups", 0, "lr", value=torch.ones(3)),
    "not on paths": lambda s: at(s, "param_groups", 0, "paths", value=False),
    "state of no parameter": lambda s: at(s, "state", 99, value={}),
    "state that is a word": lambda s: at(s, "state", 0, value="x"),
    "another buffer": lambda s: at(s, "state", 0, "exp_avg", value=torch.zeros(7, 4)),
}
GSGD_STATES = {
    "no skeleton": lambda s: at(s, "skeleton", value=KeyError),
    "a word as skeleton": lambda s: at(s, "skeleton", value="x"),
    **{
        f"no {part}": lambda s, part=part: at(s, "skeleton", part, value=KeyError)
        for part in ("entering", "leaving", "momentum", "steps", "chosen_at", "any_zero")
    },
    "a list of elements": lambda s: at(s, "skeleton", "entering", value=[1, 2]),
    "floats as elements": lambda s: at(s, "skeleton", "entering", value=s["skeleton"]["entering"].double()),
    "elements beyond": lambda s: at(s, "skeleton", "entering", value=s["skeleton"]["entering"] + 10**6),
    "elements below": lambda s: at(s, "skeleton", "leaving", value=s["skeleton"]["leaving"] - 10),
    "exchanged": lambda s: at(s, "skeleton", "entering", value=s["skeleton"]["leaving"]),
    "one for all": lambda s: at(s, "skeleton", "entering", value=torch.zeros(14, dtype=torch.int64)),
    "none": lambda s: at(s, "skeleton", "entering", value=torch.full((14,), -1)),
    "a broken chain": lambda s: at(
        s, "skeleton", "entering", value=s["skeleton"]["entering"].index_fill(0, torch.arange(1, 8), -1)
    ),
    "momentum of others": lambda s: at(s, "skeleton", "momentum", value=torch.zeros(3).double()),
    "momentum in words": lambda s: at(s, "skeleton", "momentum", value="x"),
    "negative steps": lambda s: at(s, "skeleton", "steps", value=-1),
    "words as steps": lambda s: at(s, "skeleton", "steps", value="3"),
    "chosen in the future": lambda s: at(s, "skeleton", "chosen_at", value=10**6),
    "a number as truth": lambda s: at(s, "skeleton", "any_zero", value=2),
    "momentum of another shape": lambda s: at(s, "state", 0, "momentum_buffer", value=torch.zeros(4, 7)),
    "momentum of integers": lambda s: at(s, "state", 0, "momentum_buffer", value=torch.zeros(7, 4).long()),
}
PATH_STATES = {
    "no exponent": lambda s: at(s, "state", 0, "exponent", value=KeyError),
    "a word as exponent": lambda s: at(s, "state", 0, "exponent", value="x"),
    "another shape": lambda s: at(s, "state", 0, "inverse_gram", value=torch.zeros(4, 7)),
    "words as steps": lambda s: at(s, "param_groups", 0, "steps", value="x"),
    "negative steps": lambda s: at(s, "param_groups", 0, "steps", value=-3),
}


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("GSGD", name) for name in STATES | GSGD_STATES] + [("PathSGD", name) for name in STATES | PATH_STATES],
)
def test_a_damaged_state_of_an_optimizer_is_refused_and_changes_nothing(kind, damage):
    torch.manual_seed(0)
    net = mlp(4, 7, 6, 3)
    optimizer, x = trained(kind, net)
    change = (STATES | (GSGD_STATES if kind == "GSGD" else PATH_STATES))[damage]
    assert_refused(optimizer, change(optimizer.state_dict()), net, x)


def test_chains_in_a_circle_are_refused_and_not_followed():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head((x + self.b(self.a(x).relu())).relu())

    torch.manual_seed(0)
    net = Residual()
    optimizer, x = trained("GSGD", net)
    state = optimizer.state_dict()
    order, entering = optimizer._order, state["skeleton"]["entering"].clone()
    back = torch.nonzero((order.dst > 0) & (order.src > 0) & (order.dst != order.src))[:, 0]
    into = {(int(order.dst[element]), int(order.src[element])): int(element) for element in back}
    one, two = next(pair for pair in into if pair[::-1] in into)
    entering[one], entering[two] = into[one, two], into[two, one]
    assert_refused(optimizer, at(state, "skeleton", "entering", value=entering), net, x, "chains that go in a circle")


@pytest.mark.parametrize("make", [lambda t, o: Rebalance(t, o, every=2), EquiNormCycle])
def test_a_damaged_count_of_steps_is_refused(make):
    net = mlp(4, 6, 3)
    handle = make(dagpath.trace(net, torch.zeros(1, 4)), torch.optim.SGD(net.parameters(), lr=0.1))
    for state in (
        {},
        {"steps": "x"},
        {"steps": -1},
        {"steps": 1.5},
        {"steps": None},
        {"steps": True},
        [1],
        None,
        {1: 2, "steps": 3},
    ):
        with pytest.raises(ValueError, match="steps"):
            handle.load_state_dict(state)
        assert handle.steps == 0
    handle.load_state_dict({"steps": 7})
    assert handle.steps == 7
