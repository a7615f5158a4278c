"""Running a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The module that owns the parameters, below DataParallel, DistributedDataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put ``model`` in train or eval mode; afterwards every attribute, buffer and random state is what it was."""
    attributes = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    registered = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.train(training)
            yield
        finally:
            for current, saved in (*attributes, *registered):
                current.clear()
                current.update(saved)
            for parameter, requires_grad in frozen:
                parameter.requires_grad_(requires_grad)
            with torch.no_grad():
                for buffer, values in buffers:
                    if not buffer.is_meta and not torch.equal(buffer, values):
                        buffer.copy_(values)


@contextlib.contextmanager
def plain_computation(device: torch.device) -> Iterator[None]:
    """Outside of inference mode and autocast, with new tensors on the CPU, whatever the caller is in."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), torch.device("cpu"):
        yield
