"""Running a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from dagpath.runtime.distributed import imported, is_spread, own, reshard
from dagpath.runtime.reach import Reach

GradMode = Callable[[], contextlib.AbstractContextManager[Any]]
"""``torch.enable_grad``, ``torch.no_grad`` or ``torch.inference_mode``."""


@dataclass(frozen=True)
class Setting:
    """How a model is called.

    Attributes:
        training: in train mode?
        grad_mode: makes the context that says whether the call records what a backward pass needs.
    """

    training: bool
    grad_mode: GradMode = torch.enable_grad


def unwrap(model: Any) -> nn.Module:
    """The module that owns the parameters: below parallel and compiled wrappers, of an exported program.

    Raises:
        TypeError: it is no module.
    """
    flat = imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    while True:
        if isinstance(model, nn.Module) and any(isinstance(part, flat) for part in model.modules()):
            raise TypeError(
                "FullyShardedDataParallel flattens the parameters of a model, so that no rescaling can tell their "
                "neurons apart: use torch.distributed.fsdp.fully_shard, or rescale the model before it is wrapped"
            )
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.export.ExportedProgram):
            model = model.module()
        elif isinstance(model, nn.Module):
            return model
        else:
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


@contextlib.contextmanager
def python_random_state() -> Iterator[None]:
    """Put the random states of Python and NumPy back afterwards."""
    python, numpy_ = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_)


def random_states() -> tuple[object, ...]:
    """The random states of Python and NumPy, to see whether something drew from them."""
    state: Any = numpy.random.get_state(legacy=False)
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"], state["gauss"]


_one_model = threading.RLock()
"""Held while a model is run or traced: PyTorch's exporter changes PyTorch itself meanwhile, for all threads, and puts
others in the place of parameters; modes and random states are put back one after the other."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread at a time is inside; the others wait."""
    with _one_model:
        yield


@contextlib.contextmanager
def mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Put ``model`` in train or eval mode, or leave it in its own (None).

    Afterwards every object that its code can reach, every tensor and every random state is what it was.

    One thread at a time; others wait.
    """
    with one_thread(), _changed_mode(model, training):
        yield


@contextlib.contextmanager
def _changed_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    reshard(model)
    modules = list(model.modules())
    reach = Reach(model)
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own_train = [module for module in modules if type(module).train is not nn.Module.train]  # it may merge weights
    parameters = {id(parameter): parameter for module in own_train for parameter in module.parameters()}
    others = {id(parameter) for parameter in model.parameters()}
    plain = {key: tensor for key, (_, tensor) in reach.tensors.items() if key not in others and _is_copied(tensor)}
    written = {**parameters, **{id(buffer): buffer for buffer in model.buffers()}, **plain}
    values = [(tensor, own(tensor).detach().clone()) for tensor in written.values()]
    derived = {key for key, tensor in written.items() if tensor.grad_fn is not None}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), python_random_state(), _without_cached_weights():
        try:
            if training is not None:
                with contextlib.suppress(NotImplementedError):  # an exported program has one mode only
                    switch(model, training)
            yield
        finally:
            reshard(model)
            try:
                reach.restore()
            finally:
                _put_back(frozen, values, derived)


@torch.no_grad()
def _put_back(
    frozen: Sequence[tuple[Tensor, bool]], values: Sequence[tuple[Tensor, Tensor]], derived: set[int]
) -> None:
    """Put back what is saved of tensors.

    Args:
        frozen: parameters, and whether they need gradients.
        values: tensors and their values.
        derived: the ids of those that were computed from others before.
    """
    for parameter, requires_grad in frozen:
        if parameter.grad_fn is not None:  # it was written to while gradients were recorded
            parameter.detach_()
        parameter.requires_grad_(requires_grad)
    for tensor, value in values:
        if tensor.grad_fn is not None and id(tensor) not in derived:
            tensor.detach_()
        local = own(tensor)
        if not local.is_meta and not _is_equal(local, value):
            if local.shape != value.shape:
                local.resize_(value.shape)
            local.copy_(value)


@contextlib.contextmanager
def _without_cached_weights() -> Iterator[None]:
    """Parametrized weights are made anew at each use, also inside of ``parametrize.cached()``."""
    with mock.patch.object(parametrize, "_cache_enabled", 0), mock.patch.object(parametrize, "_cache", {}):
        yield


_MOST_BYTES = 1 << 28


def _is_copied(tensor: Tensor) -> bool:
    """Are the values of a tensor kept that is neither parameter nor buffer? It may be a whole data set."""
    if tensor.is_nested:
        return False
    has_values = not (tensor.is_meta or isinstance(tensor, FakeTensor)) and _has_memory(tensor)
    return has_values and tensor.numel() * tensor.element_size() <= _MOST_BYTES


@contextlib.contextmanager
def parameters_kept(model: nn.Module) -> Iterator[list[str]]:
    """Afterwards all parameters have the values that they had; yields a list, which names then hold that were written.

    Few models write to their parameters when they are called (a moving average of another part, a table of embeddings
    with a largest norm). Parameters that have no values here, or parts of them alone, are left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if not p.is_meta and not is_spread(p)]
    named = [(name, p) for name, p in named if p.layout is torch.strided]
    saved = [(parameter.data, parameter.detach().clone()) for _, parameter in named]
    written: list[str] = []
    try:
        yield written
    finally:
        with torch.no_grad():
            for (name, parameter), (memory, value) in zip(named, saved, strict=True):
                if _address(parameter) != _address(memory):
                    parameter.data = memory
                    written.append(name)
                if not _is_equal(parameter, value) and not bool(((parameter == value) | (value != value)).all()):
                    parameter.copy_(value)
                    written.append(name)
        written[:] = dict.fromkeys(written)


def switch(model: nn.Module, training: bool) -> None:
    """Put a model in train or eval mode, if it is not there: its own ``train`` may drop what it keeps."""
    if any(module.training != training for module in model.modules()):
        model.train(training)


def _has_memory(tensor: Tensor) -> bool:
    """Is there memory for the entries of a tensor? Libraries free that of tensors that they make again."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return True
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return own(tensor).untyped_storage().nbytes() > last * tensor.element_size()


def _address(tensor: Tensor) -> int | None:
    """Where a tensor lies, where it has an address (a sparse one has none)."""
    return tensor.data_ptr() if tensor.layout is torch.strided else None


def has_mixed_modes(model: nn.Module) -> bool:
    """Are some modules in train mode, and others in eval mode?"""
    return len({module.training for module in model.modules()}) > 1


def _is_equal(tensor: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(tensor, other)
    except NotImplementedError:  # sparse tensors
        return False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the block finish before Ctrl-C interrupts the program."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    pressed: list[Any] = []
    handler: Any = signal.signal(signal.SIGINT, lambda *event: pressed.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])


def _after_fork() -> None:
    """A process forked while another thread was inside has one thread, which is not."""
    global _one_model, _collection
    _one_model, _collection = threading.RLock(), threading.Lock()
    if _pausing and _pausing[0]:
        gc.enable()
    _pausing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_collection = threading.Lock()
_pausing: list[bool] = []
"""One for each that is inside :func:`uncollected`, in any thread: was the garbage collection on before the first?"""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: looking through the many objects that graphs are made of takes long.

    Threads share one garbage collection: it pauses until the last of them is done.
    """
    with _collection:
        _pausing.append(_pausing[0] if _pausing else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _collection:
            if _pausing.pop() and not _pausing:
                gc.enable()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Every operation in the type of its arguments, whatever the caller is in."""
    torch.clear_autocast_cache()  # inside any autocast, weights that were cast before they changed would be used again
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_value_checks() -> contextlib.AbstractContextManager[Any]:
    """Distributions of PyTorch do not check their arguments: a graph has no values to check."""
    return mock.patch.object(torch.distributions.Distribution, "_validate_args", False)


@contextlib.contextmanager
def plain_computation() -> Iterator[None]:
    """Outside of inference mode and autocast, with new tensors on the CPU, whatever the caller is in."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(without_autocast())
        if torch.empty(0).device.type != "cpu":  # get_default_device() of PyTorch 2.6 overlooks ``with torch.device``
            stack.enter_context(torch.device("cpu"))
        yield
