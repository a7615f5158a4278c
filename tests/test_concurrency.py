"""Threads and processes beside each other."""

import copy
import gc
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import dagpath
from dagpath.runtime.state import mode, uncollected

from networks import RandomNet, mlp


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What functions return that start in as many threads at the same time."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def parameters_of(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in net.parameters()]


def test_models_rescaled_in_threads_are_bitwise_those_rescaled_one_after_the_other():
    nets = [RandomNet(seed).double() for seed in range(3)] + [mlp(4, 8, 8, 2).double()]
    inputs = [net.example(2) for net in nets[:3]] + [torch.randn(2, 4, dtype=torch.float64)]
    expected = copy.deepcopy(nets)
    for net, x in zip(expected, inputs, strict=True):
        dagpath.rescale_(net, x)
    at_once(*(lambda net=net, x=x: dagpath.rescale_(net, x) for net, x in zip(nets, inputs, strict=True)))
    for net, reference in zip(nets, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parameters_of(net), parameters_of(reference), strict=True))


def test_one_model_traced_in_threads_is_traced_alike_and_left_as_it_was():
    net, x = nn.Sequential(*mlp(4, 8, 8, 2), nn.Dropout(), nn.BatchNorm1d(2)).train(), torch.randn(2, 4)
    net[1].eval()
    modes = [module.training for module in net.modules()]
    digest = dagpath.trace(net, x).graph.digest()
    assert at_once(*[lambda: dagpath.trace(net, x).graph.digest()] * 4) == [digest] * 4
    assert [module.training for module in net.modules()] == modes


QUANTITIES: list[Callable[[dagpath.TracedModel], Any]] = [
    dagpath.path_norm,
    dagpath.path_count,
    dagpath.path_length_profile,
    lambda traced: dagpath.path_length_profile(traced, 1),
    lambda traced: dagpath.path_length_profile(traced, 2),
    lambda traced: [values.tolist() for values in dagpath.gram_diagonal(traced, log=True).values()],
    lambda traced: dagpath.path_mass(traced).tolist(),
    lambda traced: [path.value for path in dagpath.top_paths(traced, 3)],
    lambda traced: dagpath.balance(traced).log_scales.tolist(),
    lambda traced: dagpath.gram(traced).trace(),
    lambda traced: traced.unroll().path_norm(1),
    lambda traced: traced.explain(),
]


def test_quantities_of_one_trace_are_the_same_in_threads():
    net = RandomNet(3).double()
    traced = dagpath.trace(net, net.example())
    expected = [quantity(dagpath.trace(net, net.example())) for quantity in QUANTITIES]
    calls = [lambda quantity=quantity: quantity(traced) for quantity in QUANTITIES]
    assert at_once(*calls, *calls) == [*expected, *expected]


@pytest.mark.filterwarnings("ignore:.*script.* is deprecated")  # forward mode is scripted at its first use
@pytest.mark.parametrize("quantity", [lambda t: dagpath.path_length_profile(t, 1), dagpath.path_norm])
def test_quantities_are_computed_beside_forward_mode_differentiation(quantity):
    net = RandomNet(3).double()
    traced = dagpath.trace(net, net.example())
    expected, begun, done = quantity(traced), threading.Event(), threading.Event()

    def differentiate() -> None:
        try:
            while not done.is_set():
                torch.func.jvp(torch.sin, (torch.ones(3),), (torch.ones(3),))
                begun.set()
        finally:
            begun.set()  # the other thread does not wait for what failed

    def measure() -> Any:
        begun.wait()
        try:
            return [quantity(traced) for _ in range(3)]
        finally:
            done.set()

    _, found = at_once(differentiate, measure)
    assert found == [expected] * 3


def test_who_reads_parameters_while_they_are_rescaled_sees_old_elements_or_new_ones():
    torch.manual_seed(0)
    net, x = mlp(64, 1000, 1000, 10), torch.randn(2, 64)
    rescaling = dagpath.random_rescaling(dagpath.trace(net, x), power_of_two=True)
    old = [parameter.clone() for parameter in parameters_of(net)]
    rescaling.apply_()
    new = [parameter.clone() for parameter in parameters_of(net)]
    done = threading.Event()

    def move() -> None:
        try:
            for _ in range(10):
                rescaling.inverse().apply_()
                rescaling.apply_()
        finally:
            done.set()

    def read() -> int:
        others = 0
        while not done.is_set():
            seen = [parameter.clone() for parameter in parameters_of(net)]
            others += sum(int(((s != a) & (s != b)).sum()) for s, a, b in zip(seen, old, new, strict=True))
            assert bool(net(x).isfinite().all())
        return others

    assert at_once(move, read)[1] == 0


def test_what_is_refused_is_never_written():
    net = mlp(64, 1000, 1000, 10).half()
    with torch.no_grad():
        net[4].weight[-1] = 6e4  # whose product is infinite, after all others are made
    traced = dagpath.trace(net, torch.zeros(1, 64, dtype=torch.float16))
    rescaling = dagpath.Rescaling(traced, torch.full((traced.graph.num_groups,), -1.0, dtype=torch.float64))
    done = threading.Event()

    def refuse() -> None:
        try:
            for _ in range(5):
                with pytest.raises(dagpath.BalanceError, match="leave the range"):
                    rescaling.apply_()
        finally:
            done.set()

    def read() -> bool:
        finite = True
        while not done.is_set():
            finite = finite and all(bool(parameter.isfinite().all()) for parameter in parameters_of(net))
        return finite

    assert at_once(refuse, read)[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_data_loader_with_workers_goes_on_while_a_model_is_rescaled():
    data = TensorDataset(torch.arange(200.0))
    net, x = RandomNet(1).double(), RandomNet(1).double().example(2)

    def load() -> float:
        context = "fork" if hasattr(os, "fork") else None
        return sum(
            float(batch.sum()) for (batch,) in DataLoader(data, 10, num_workers=2, multiprocessing_context=context)
        )

    total, rescaling = at_once(load, lambda: dagpath.rescale_(net, x))
    assert total == 200 * 199 / 2
    assert rescaling.converged


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_process_forked_meanwhile_collects_garbage_and_can_run_models():
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with uncollected(), mode(nn.ReLU(), training=False):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        free = gc.isenabled()
        with mode(nn.ReLU(), training=False), uncollected():
            os._exit(0 if free else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


def test_a_compiled_model_computes_with_its_new_parameters():
    net, x = mlp(4, 8, 8, 2).double(), torch.randn(3, 4, dtype=torch.float64)
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        before, first = compiled(x), net[0].weight.clone()
        dagpath.rescale_(compiled, x)
        assert not torch.equal(net[0].weight, first)
        torch.testing.assert_close(compiled(x), before)
        net[4].weight.mul_(2), net[4].bias.mul_(2)
        torch.testing.assert_close(compiled(x), 2 * before)


def test_a_model_that_other_threads_run_keeps_its_attributes_while_its_mode_is_put_back():
    net, x = nn.Sequential(*mlp(4, 8, 2), nn.Flatten()).eval(), torch.randn(3, 4)
    expected, done = net(x), threading.Event()

    def change() -> None:
        try:
            for _ in range(300):
                with mode(net, training=False):
                    pass
        finally:
            done.set()

    def run() -> bool:
        same = True
        while not done.is_set():
            same = same and torch.equal(net(x), expected)
        return same

    assert at_once(change, run)[1]


class Asks(nn.Module):
    """Its control flow depends on its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("alive", [False, True])
def test_other_threads_are_named_where_there_are_some(alive):
    with tqdm(total=1, disable=False, file=io.StringIO()):  # whose own thread, which lives on, is none of them
        pass
    end = threading.Event()
    waiting = threading.Thread(target=end.wait, daemon=True)
    if alive:
        waiting.start()
    try:
        with pytest.raises(dagpath.CaptureError) as caught:
            dagpath.trace(Asks(), torch.zeros(1, 2))
    finally:
        end.set()
    others = [thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"]
    assert ("Other threads are alive" in str(caught.value)) == (alive or len(others) > 1)
