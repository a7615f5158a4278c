"""What a computation leaves behind: nothing."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import dagpath
from dagpath.passes.powers import PowerFlow
from dagpath.runtime.state import uncollected

from networks import Net


@pytest.fixture(autouse=True)
def _collection():
    yield
    gc.enable()


def test_garbage_is_collected_again_once_all_threads_are_done() -> None:
    first, second = uncollected(), uncollected()
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), uncollected():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    with uncollected(), uncollected():
        pass
    assert not gc.isenabled()


def test_a_pass_is_freed_without_garbage_collection() -> None:
    def function(m, x):
        return m.layer(x), m.read

    net = Net(function, layer=nn.Linear(2, 2), read=torch.ones(3), unread=torch.ones(3))
    flow = dagpath.trace(net, torch.zeros(1, 2)).masses(PowerFlow, power=2, on_gradient=lambda *visit: None)
    torch.autograd.backward(flow.total().values)
    freed = weakref.ref(flow)
    with uncollected():
        del flow
        assert freed() is None
