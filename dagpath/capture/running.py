"""Running a model, and saying what went wrong."""

from __future__ import annotations

import contextlib
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from tqdm import TMonitor

from dagpath.capture.containers import opened
from dagpath.capture.sizes import copies
from dagpath.distributed import has_all_values, stand_in, whole
from dagpath.errors import CaptureError
from dagpath.state import mode, without_autocast

_LIBRARY_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def user_line(error: BaseException) -> str:
    """The deepest source line of ``error`` that lies in the user's code, as ``file:line (code)``; empty if none."""
    found = ""
    current: BaseException | None = error
    while current is not None:
        for frame in traceback.extract_tb(current.__traceback__):
            if not frame.filename.startswith((*_LIBRARY_FOLDERS, "<")):
                found = f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def check_model(model: nn.Module) -> None:
    """Raise CaptureError for a model that holds no Python code, or parameters without a shape."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a TorchScript module, which holds no Python code to capture; trace the "
            "torch.nn.Module that it was made from"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise CaptureError(f"the parameter {lazy[0]!r} has no shape yet: run the model once before tracing it")


def _at(error: BaseException) -> str:
    line = user_line(error)
    return f"  at {line}\n" if line else ""


def headline(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def run(model: nn.Module, inputs: Any, training: bool, dry: bool = False) -> list[Tensor]:
    """The tensors that the model returns, computed without gradients; the model is left as it was.

    Args:
        model: the model.
        inputs: its inputs, positional and by keyword.
        training: in train mode?
        dry: without the values of parameters and buffers: the results have none either.

    Raises:
        CaptureError: the model's forward raised, or, without values, asked for one; the message names the line.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True) if dry else None
    try:
        with mode(model, training), without_autocast(), torch.no_grad(), fakes or contextlib.nullcontext():
            args, kwargs = stand_in(model, inputs, fakes) if fakes else copies(inputs)
            leaves = pytree.tree_leaves(opened(model(*args, **kwargs)))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise capture_error(model, error) from error
    except Exception as error:
        shapes = ", ".join(
            f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in pytree.tree_leaves(inputs)
        )
        raise CaptureError(
            f"the model's forward raised on the example inputs ({shapes}): {headline(error)}\n"
            f"{_at(error)}"
            f"  Pass inputs that the model accepts: model(*example_inputs, **kwargs) must run in "
            f"{'train' if training else 'eval'} mode."
        ) from error
    return [whole(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


_NO_VALUES = (
    "\n  This model was made without values (on the meta device, say): if it computes with tensors of its own, such as "
    "tables, make it with values."
)


def capture_error(model: nn.Module, failure: Exception) -> CaptureError:
    alive = [thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)]  # progress bars have one
    threads = (
        "\n  Other threads are alive: PyTorch's exporter fails where one of them runs a module meanwhile, be it of "
        "another model; trace while none does."
    )
    return CaptureError(
        f"{type(model).__name__} cannot be captured as a graph: {headline(failure)}\n"
        f"{_at(failure)}"
        "  A graph needs control flow and shapes that do not depend on the values of the input: replace such a "
        "branch by torch.where or torch.cond, or trace the submodule that does not contain it."
        f"{'' if has_all_values(model) else _NO_VALUES}"
        f"{threads if len(alive) > 1 else ''}"
    )
