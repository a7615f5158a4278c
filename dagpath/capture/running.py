"""Running a model, and saying what went wrong."""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from dagpath.capture.causes import cause_of, messages
from dagpath.capture.containers import opened
from dagpath.capture.sizes import copies
from dagpath.errors import CaptureError
from dagpath.runtime.distributed import stand_in, whole
from dagpath.runtime.state import GradMode, mode, without_autocast

_OWN_FOLDER = str(Path(__file__).parents[1])
_LIBRARY_FOLDERS = (str(Path(torch.__file__).parent) + os.sep, _OWN_FOLDER + os.sep, "<")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_PASSED_THROUGH = ("__torch_function__", "__torch_dispatch__", "applied", "called")
"""Functions of dagpath that only hand on what a model calls."""


def user_line(error: BaseException) -> str:
    """The deepest source line of ``error`` that lies in the user's code, as ``file:line (code)``; empty if none."""
    found = ""
    current: BaseException | None = error
    while current is not None:
        for frame in traceback.extract_tb(current.__traceback__):
            in_standard_library = frame.filename.startswith(_STANDARD_LIBRARY) and "-packages" not in frame.filename
            if not in_standard_library and not frame.filename.startswith(_LIBRARY_FOLDERS):
                found = f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def headline(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _at(error: BaseException) -> str:
    line = user_line(error)
    return f"  at {line}\n" if line else ""


def _is_own(error: BaseException) -> bool:
    """Was it raised in dagpath itself, not in the model's code or in what that calls?"""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_OWN_FOLDER) and frames[-1].name not in _PASSED_THROUGH


def mode_text(training: bool | None) -> str:
    """The mode of a call, in words."""
    return "the modes that its modules are in" if training is None else f"{'train' if training else 'eval'} mode"


def run(
    model: nn.Module, inputs: Any, training: bool | None, dry: bool = False, grad_mode: GradMode = torch.no_grad
) -> list[Tensor]:
    """The tensors that the model returns; the model is left as it was.

    Args:
        model: the model.
        inputs: its inputs, positional and by keyword.
        training: in train mode? None for the modes that its modules are in.
        dry: without the values of parameters and buffers: the results have none either.
        grad_mode: makes the context that says whether the call records what a backward pass needs.

    Raises:
        CaptureError: the model's forward raised, or, without values, asked for one; the message names the line.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True) if dry else None
    try:
        with mode(model, training), without_autocast(), grad_mode(), fakes or contextlib.nullcontext():
            args, kwargs = stand_in(model, inputs, fakes) if fakes else copies(inputs)
            leaves = pytree.tree_leaves(opened(model(*args, **kwargs)))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise capture_error(model, error) from error
    except Exception as error:
        if _is_own(error):
            raise
        shapes = ", ".join(
            f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in pytree.tree_leaves(inputs)
        )
        raise CaptureError(
            f"the model's forward raised on the example inputs ({shapes}): {headline(error)}\n"
            f"{_at(error)}"
            f"  Pass inputs that the model accepts: model(*example_inputs, **kwargs) must run in "
            f"{mode_text(training)}."
        ) from error
    return [whole(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def capture_error(model: nn.Module, failure: Exception) -> CaptureError:
    """Why a model cannot be captured, and what to do.

    Raises:
        Exception: the failure itself, where it is one of dagpath's own.
    """
    if _is_own(failure) and not isinstance(failure, CaptureError):
        raise failure
    return CaptureError(
        f"{type(model).__name__} cannot be captured as a graph: {headline(failure)}\n{_at(failure)}"
        f"  {cause_of(model, messages(failure))}"
    )
