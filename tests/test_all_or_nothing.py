"""Whatever happens at whichever line: parameters and optimizer state are what they were, or all of them new."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dagpath
from dagpath.apply import multiply

from networks import mlp

FILES = {
    str(Path(dagpath.__file__).parent / name)
    for name in (
        *("apply/multiply.py", "apply/rescaling.py", "apply/optimizer_state.py"),
        *("rescale.py", "optim/rebalance.py"),
    )
}


class Interrupter:
    """Does something at the n-th line that runs in the modules that change parameters."""

    def __init__(self, at: int, act) -> None:
        self.at, self.act, self.lines = at, act, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.act()
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C interrupts, also where these tests run in the background and the system ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise MemoryError("out of memory")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


class Applying:
    """A rescaling of a model whose optimizer has state."""

    def __init__(self) -> None:
        self.net = network()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.x = torch.randn(6, 3)
        self.net(self.x).square().sum().backward()
        self.optimizer.step()
        self.net.eval()
        self.traced = dagpath.trace(self.net, self.x)
        self.rescaling = dagpath.random_rescaling(self.traced, generator=torch.Generator().manual_seed(0))

    def tensors(self) -> list[Tensor]:
        held = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [*self.net.parameters(), *self.net.buffers(), *held, *(p.grad for p in self.net.parameters())]

    def change(self) -> None:
        self.rescaling.apply_(optimizers=[self.optimizer])


class ApplyingToTheOptimizer(Applying):
    def change(self) -> None:
        self.rescaling.apply_to_optimizer_(self.optimizer)


class Rescaling(Applying):
    def change(self) -> None:
        dagpath.rescale_(self.net, self.x)


class Rebalancing(Applying):
    def __init__(self) -> None:
        super().__init__()
        self.rebalance = dagpath.optim.Rebalance(self.traced, self.optimizer, every=1)
        self.optimizer.zero_grad()  # without gradients, a step changes nothing but what is called after it

    def tensors(self) -> list[Tensor]:
        held = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [*self.net.parameters(), *held]

    def change(self) -> None:
        self.optimizer.step()


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def equal(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("act", [press, fail])
@pytest.mark.parametrize("kind", [Applying, ApplyingToTheOptimizer, Rescaling, Rebalancing])
def test_an_interruption_at_any_line_leaves_everything_old_or_makes_everything_new(kind, act):
    scene = kind()
    tensors = scene.tensors()
    before = copies(tensors)
    with Interrupter(0, act) as counter:
        scene.change()
    after = copies(tensors)
    assert not equal(before, after)
    step = {Rescaling: 37, Rebalancing: 11}.get(kind, 1)  # where a line costs a trace, or a solution
    outcomes = set()
    for line in range(1, counter.lines + 1, step):
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        stopped = False
        with Interrupter(line, act) as counted:
            try:
                scene.change()
            except (KeyboardInterrupt, MemoryError):
                stopped = True
        assert counted.lines >= line
        assert stopped
        old, new = equal(tensors, before), equal(tensors, after)
        assert old or new, line
        outcomes.add(old)
    assert True in outcomes


@pytest.mark.parametrize("line", range(1, 6))
def test_a_second_interruption_does_not_stop_the_first_from_being_undone(line, monkeypatch):
    net = mlp(3, 4, 4, 2)
    found = dagpath.random_rescaling(dagpath.trace(net, torch.zeros(1, 3)))
    before, done = copies(list(net.parameters())), []
    real, pressed = multiply.multiply_one_, []

    def interrupt_at_third(*arguments):
        real(*arguments)
        done.append(1)
        if len(done) == 3:
            press()

    class Impatient(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), kwargs=None):
            if function is Tensor.copy_ and len(done) == 3:
                pressed.append(1)
                if len(pressed) == line:
                    press()
            return super().__torch_function__(function, types, arguments, kwargs or {})

    monkeypatch.setattr(multiply, "multiply_one_", interrupt_at_third)
    detach = Tensor.detach
    monkeypatch.setattr(multiply, "own", lambda tensor: detach(tensor).as_subclass(Impatient))
    with pytest.raises(KeyboardInterrupt):
        found.apply_()
    assert len(pressed) == 5  # the last bias does not change
    assert equal(list(net.parameters()), before)


def test_ctrl_c_works_as_before_once_a_block_is_done():
    from dagpath.runtime.state import uninterrupted

    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        press()
        reached.append(1)
    assert reached == [1]
    with pytest.raises(KeyboardInterrupt):
        press()
    with uninterrupted():
        pass

    def elsewhere() -> None:
        with uninterrupted():
            reached.append(2)

    thread = threading.Thread(target=elsewhere)  # where Ctrl-C never arrives
    thread.start()
    thread.join()
    assert reached == [1, 2]
