"""G-SGD: steps in path space against explicit basis paths, invariance, and use as an optimizer."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_basis import flows, loss_of, multiply_, residual, residual_net, values_of
from torch import Tensor, nn

import dagpath
from dagpath.optim import GSGD, PathSGD, Rebalance
from dagpath.paths.basis import BasisPaths, basis_paths

from networks import Net, mlp

EXAMPLE = torch.zeros(1, 2, 5, 5, dtype=torch.float64)


def train_residual(net: nn.Module, steps: int, **options) -> GSGD:
    optimizer = GSGD(dagpath.trace(net, EXAMPLE), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return optimizer


def assert_equal_parameters(a: nn.Module, b: nn.Module, rtol: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")


class PathSpace:
    """The same recursion on the values of explicit basis paths."""

    def __init__(self, net: nn.Module, lr: float, momentum: float) -> None:
        self.net, self.lr, self.momentum = net, lr, momentum
        self.basis = self.find()
        self.buffer = torch.zeros(self.basis.num_paths, dtype=torch.float64)

    def find(self) -> BasisPaths:
        return basis_paths(dagpath.trace(self.net, EXAMPLE))

    def step(self) -> None:
        values = values_of(self.basis, self.net)
        self.buffer = self.momentum * self.buffer + self.basis.path_flows(flows(self.net)) / values
        multiply_(self.net, self.basis.multipliers(1 - self.lr * self.buffer / values))

    def refresh(self) -> None:
        """Another basis: the flows of elements, and from them the gradient with respect to the new paths' values."""
        elements = torch.from_numpy(self.basis.to_scipy().toarray()).double()
        element_flows = elements @ (self.buffer * values_of(self.basis, self.net))
        self.basis = self.find()
        self.buffer = self.basis.path_flows(element_flows) / values_of(self.basis, self.net)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_gradient_descent_on_the_values_of_basis_paths(momentum):
    net = residual_net(3)
    expected = PathSpace(copy.deepcopy(net), 1e-4, momentum)
    for _ in range(8):
        expected.step()
    train_residual(net, 8, lr=1e-4, momentum=momentum, max_ratio=1e6, refresh=None)
    assert_equal_parameters(net, expected.net, 1e-9)


def test_momentum_is_carried_over_to_a_new_skeleton():
    net = residual_net(4)
    expected = PathSpace(copy.deepcopy(net), 3e-2, 0.9)
    bases = [expected.basis]
    for step in range(12):
        if step and step % 4 == 0:
            expected.refresh()
            bases.append(expected.basis)
        expected.step()
    assert any(not torch.equal(basis.class_of, bases[0].class_of) for basis in bases[1:])
    train_residual(net, 12, lr=3e-2, momentum=0.9, max_ratio=1e6, refresh=4)
    assert_equal_parameters(net, expected.net, 1e-7)


class DenseBlock(nn.Module):
    """Convolutions that read all before them, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(2 + 3 * i, 3, 3, padding=1) for i in range(3)])
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "mlp": (lambda: mlp(50, 7, 13, 5, 3), lambda x: x.flatten(1)),
    "residual": (lambda: residual_net(5), lambda x: x),
    "dense": (DenseBlock, lambda x: x),
}


def assert_rescaled_twins_stay_equal(name: str, make: Callable[[dagpath.TracedModel], torch.optim.Optimizer]) -> None:
    """Two copies of a network that differ by a rescaling have the same outputs after 20 steps, which moved them."""
    build, view = NETWORKS[name]
    torch.manual_seed(0)
    net = build().double().eval()
    batches = [torch.randn(8, 2, 5, 5, dtype=torch.float64) for _ in range(20)]
    targets = [torch.randint(3, (8,)) for _ in range(20)]
    twin = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(1)
    dagpath.random_rescaling(dagpath.trace(twin, view(batches[0])), 1.0, generator=generator).apply_()
    start = net(view(batches[0])).detach()
    for model in (net, twin):
        optimizer = make(dagpath.trace(model, view(batches[0])))
        for x, target in zip(batches, targets, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(view(x)), target).backward()
            optimizer.step()
    outputs = [model(view(batches[0])).detach() for model in (net, twin)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6 * float(outputs[0].abs().max()))
    assert not torch.allclose(outputs[0], start, rtol=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_differ_by_a_rescaling_have_the_same_outputs_after_training(name, momentum):
    assert_rescaled_twins_stay_equal(name, lambda traced: GSGD(traced, lr=1e-3, momentum=momentum, refresh=6))


@pytest.mark.parametrize("build", [GSGD, PathSGD])
def test_balancing_in_between_does_not_change_where_steps_lead(build):
    net = residual_net(13)
    other = copy.deepcopy(net)
    options = {"momentum": 0.9} if build is GSGD else {"every": 4}
    for model in (net, other):
        traced = dagpath.trace(model, EXAMPLE)
        optimizer = build(traced, lr=1e-3, **options)
        if model is other:
            Rebalance(traced, optimizer, every=3)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    torch.testing.assert_close(loss_of(other), loss_of(net), rtol=1e-9, atol=0)
    assert not torch.allclose(net.a.weight, other.a.weight, rtol=1e-2)


def test_elements_cross_zero_and_the_loss_falls():
    net = residual_net(6)
    with torch.no_grad():
        net.a.weight[0, 0, 0, 0] = 0.0
    signs = [parameter.detach().sign() for parameter in net.parameters()]
    first = float(loss_of(net).detach())
    train_residual(net, 60, lr=2e-3)
    assert float(loss_of(net).detach()) < 0.7 * first
    assert any(bool((p.sign() != sign).any()) for p, sign in zip(net.parameters(), signs, strict=True))
    assert net.a.weight[0, 0, 0, 0] != 0


def test_a_skeleton_path_changes_by_no_more_than_the_largest_ratio():
    net = residual_net(7)
    traced = dagpath.trace(net, EXAMPLE)
    basis = basis_paths(traced)
    of_skeleton = torch.unique(basis.group_class[basis.group_class >= 0])
    before = values_of(basis, net)
    train_residual(net, 1, lr=100.0, max_ratio=1.5)
    ratios = (values_of(basis, net) / before)[of_skeleton]
    assert all(bool(((ratios - bound).abs() < 1e-9).any()) for bound in (1 / 1.5, 1.5))
    assert ((ratios > 1 / 1.5 - 1e-9) & (ratios < 1.5 + 1e-9)).all()
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_a_layer_of_zeros_comes_to_life():
    torch.manual_seed(0)
    net = mlp(5, 8, 6, 3).double()
    with torch.no_grad():
        net[4].weight.zero_()
    x, target = torch.randn(32, 5, dtype=torch.float64), torch.randint(3, (32,))
    optimizer = GSGD(dagpath.trace(net, x), lr=0.01, max_ratio=2.0)
    before = copy.deepcopy(net)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    assert (net[4].weight != 0).any(1).all()


def test_the_skeleton_of_ones_is_one_and_its_basis_paths_are_the_elements():
    torch.manual_seed(0)
    net = mlp(5, 8, 6, 3).double()
    optimizer = GSGD(dagpath.trace(net, torch.zeros(1, 5).double()), lr=0.0, skeleton="ones")
    assert (optimizer._skeleton.read(list(net.parameters())) == 1).all()
    before = [p.detach().clone() for p in net.parameters()]
    x, target = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    F.cross_entropy(net(x), target).backward()
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    weight, bias = net[4].weight, net[4].bias
    skeleton = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.bool)
    skeleton[optimizer._skeleton.members] = True
    plain = ~skeleton[-21:-3].view(3, 6)
    torch.testing.assert_close(weight[plain], (before[4] - 1e-3 * weight.grad)[plain])  # fixed ends: as in SGD
    torch.testing.assert_close(bias, before[5] - 1e-3 * bias.grad)


def test_the_skeleton_may_be_set_to_any_positive_number():
    torch.manual_seed(0)
    net = mlp(5, 8, 6, 3).double()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = GSGD(dagpath.trace(net, torch.zeros(1, 5).double()), lr=1e-3, skeleton=0.5)
    assert (optimizer._skeleton.read(list(net.parameters())) == 0.5).all()
    changed = sum(int((p != old).sum()) for p, old in zip(net.parameters(), before, strict=True))
    assert changed == len(optimizer._skeleton.members)


def gated(m, x):
    return m.head(F.prelu(m.hidden(x), m.slope))


def test_parameters_that_are_no_edges_take_steps_of_sgd():
    torch.manual_seed(0)
    net = Net(gated, hidden=nn.Linear(4, 6), head=nn.Linear(6, 2), slope=torch.full((1,), 0.3)).double()
    x, target = torch.randn(16, 4, dtype=torch.float64), torch.randint(2, (16,))
    optimizer = GSGD(dagpath.trace(net, x), lr=0.01, momentum=0.5)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    ordinary = torch.optim.SGD([{"params": [net.slope.detach().clone().requires_grad_()]}], lr=0.01, momentum=0.5)
    slope = ordinary.param_groups[0]["params"][0]
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(net(x), target) + extra.square().sum()).backward()
        slope.grad = net.slope.grad.clone()
        optimizer.step()
        ordinary.step()
    torch.testing.assert_close(net.slope, slope, rtol=0, atol=0)
    assert (extra < 1).all()


def test_frozen_parameters_stay_and_their_neurons_keep_their_scale():
    net = residual_net(8)
    net.a.weight.requires_grad_(False)
    net.stem[1].bias.requires_grad_(False)
    frozen = [p.detach().clone() for p in (net.a.weight, net.stem[1].bias)]
    first = float(loss_of(net).detach())
    train_residual(net, 10, lr=1e-3, momentum=0.9, refresh=3)
    assert torch.equal(net.a.weight, frozen[0])
    assert torch.equal(net.stem[1].bias, frozen[1])
    assert float(loss_of(net).detach()) < first


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_may_train(training):
    net, twin = residual_net(9), residual_net(9)
    dagpath.random_rescaling(dagpath.trace(twin, EXAMPLE), 1.0, generator=torch.Generator().manual_seed(1)).apply_()
    for model in (net, twin):
        model.train(training)
        train_residual(model, 10, lr=1e-3, momentum=0.9)
    torch.testing.assert_close(loss_of(net), loss_of(twin), rtol=1e-9, atol=0)


def test_a_saved_state_resumes_bitwise(tmp_path):
    net = residual_net(10)
    optimizer = train_residual(net, 5, lr=1e-3, momentum=0.9, refresh=3)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = residual_net(11)
    resumed = GSGD(dagpath.trace(other, EXAMPLE), lr=1.0, momentum=0.9, refresh=3)
    saved = torch.load(tmp_path / "state.pt")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for model, one in ((net, optimizer), (other, resumed)):
        for _ in range(5):
            one.zero_grad()
            loss_of(model).backward()
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="no state of a GSGD of a network with"):
        resumed.load_state_dict(torch.optim.SGD(other.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_model_and_optimizer_go_on_as_the_original(again):
    torch.manual_seed(0)
    net = mlp(5, 8, 6, 3).double()
    x = torch.randn(16, 5, dtype=torch.float64)
    pair = net, GSGD(dagpath.trace(net, x), lr=1e-3, momentum=0.9, refresh=2)

    def train(model: nn.Module, optimizer: GSGD) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(*pair)
    other = again(pair)
    train(*pair)
    train(*other)
    assert_equal_parameters(net, other[0], 0.0)
    assert all(p is not q for p, q in zip(net.parameters(), other[0].parameters(), strict=True))


def test_a_skeleton_that_is_overdue_is_chosen_anew(monkeypatch):
    net = residual_net(14)
    kept = train_residual(net, 5, lr=1e-4, refresh=None)
    optimizer = GSGD(dagpath.trace(net, EXAMPLE), lr=1e-4, refresh=3)
    optimizer.load_state_dict(kept.state_dict())
    chosen = []
    monkeypatch.setattr(optimizer, "choose_skeleton", lambda: chosen.append(optimizer._steps))
    optimizer.zero_grad()
    optimizer.step()  # without gradients nothing moves
    loss_of(net).backward()
    optimizer.step()
    assert chosen == [6]


@pytest.mark.parametrize(
    ("dtype", "widths", "rtol"), [(torch.float32, (5, *[8] * 40, 3), 1e-4), (torch.float16, (5, 8, 8, 3), 4e-3)]
)
def test_scales_beyond_the_range_of_the_parameters_do_no_harm(dtype, widths, rtol):
    """The inverse squares of the chains, by which gradients are multiplied, are infinite in this type."""
    torch.manual_seed(0)
    net = mlp(*widths)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.1)
    net = net.to(dtype)
    before, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    for model in (net, exact):
        optimizer = GSGD(dagpath.trace(model, torch.ones(4, 5).to(model[0].weight)), lr=0.0, momentum=0.9)
        with torch.no_grad():
            members = optimizer._skeleton.read(list(model.parameters()))
        smallest = float(optimizer._skeleton.chains(members)[1].square().min())
        assert smallest < 1 / torch.finfo(dtype).max
        optimizer.param_groups[0]["lr"] = smallest
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2**-10)
        optimizer.step()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=rtol, atol=rtol * float(q.detach().abs().max()))
    assert not torch.equal(net[0].bias, before[0].bias)


def test_a_model_without_trainable_parameters_stays():
    net = mlp(3, 4, 2).requires_grad_(False)
    before = copy.deepcopy(net)
    GSGD(dagpath.trace(net, torch.zeros(1, 3)), lr=1.0).step()
    assert_equal_parameters(net, before, 0.0)


def test_closures_schedulers_clipping_and_float32():
    torch.manual_seed(0)
    net = Net(residual, **dict(residual_net(12).float().named_children()))
    optimizer = GSGD(dagpath.trace(net, EXAMPLE.float()), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, target = torch.randn(8, 2, 5, 5), torch.randint(3, (8,))

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        return loss

    losses = []
    for _ in range(4):
        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 16)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"lr": np.nan}, "lr must be finite"),
        ({"lr": 1.0, "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"lr": 1.0, "skeleton": "one"}, "skeleton must be 'heaviest', 'ones' or a positive number, got 'one'"),
        ({"lr": 1.0, "skeleton": 0.0}, "skeleton must be 'heaviest', 'ones' or a positive number, got 0.0"),
        ({"lr": 1.0, "skeleton": 1e39}, r"skeleton must be in the range of the parameters' torch.float32, got 1e\+39"),
        ({"lr": 1.0, "skeleton": np.inf}, "skeleton must be in the range of the parameters' torch.float32, got inf"),
        ({"lr": 1.0, "skeleton": True}, "skeleton must be 'heaviest', 'ones' or a positive number, got True"),
        ({"lr": 1.0, "max_ratio": 1.0}, "max_ratio must be finite and above 1, got 1.0"),
        ({"lr": 1.0, "refresh": 0}, "refresh must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    traced = dagpath.trace(mlp(2, 3, 1), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=message):
        GSGD(traced, **options)
    with pytest.raises(TypeError, match="expected a TracedModel, got Sequential"):
        GSGD(traced.model, lr=0.1)
    with pytest.raises(TypeError, match=r"refresh must be a number of steps, got 2\.5"):
        GSGD(traced, lr=0.1, refresh=2.5)


def test_sparse_gradients_are_refused_before_anything_moves():
    net = Net(lambda m, i: m.head(m.table(i)), table=nn.Embedding(5, 4, sparse=True), head=nn.Linear(4, 2))
    optimizer = GSGD(dagpath.trace(net, torch.tensor([1, 2])), lr=0.1)
    before = copy.deepcopy(net)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert_equal_parameters(net, before, 0.0)
