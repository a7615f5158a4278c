"""Models that the command line makes: ``MODULE:FACTORY``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from torch import nn

from dagpath.runtime.files import require_regular


def built(spec: str, device: torch.device | None) -> nn.Module:
    """The model that ``MODULE:FACTORY`` makes."""
    made = _factory(spec)
    try:
        with device or contextlib.nullcontext():
            model = made()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{spec} raised {type(error).__name__}: {error}\n  {line_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{spec} returned {type(model).__name__}, not a torch.nn.Module: FACTORY is a function without arguments "
            "that returns the model"
        )
    return model


def _factory(spec: str) -> Callable[[], Any]:
    module, colon, name = spec.rpartition(":")
    if not colon or not module or not name:
        raise typer.BadParameter(f"{spec!r} is not of the form MODULE:FACTORY, such as torchvision.models:resnet18")
    path = Path(module)
    if path.suffix == ".py":
        try:
            require_regular(path)
        except OSError as error:
            raise typer.BadParameter(str(error)) from error
    try:
        loaded = _imported_file(path) if path.suffix == ".py" else _imported_module(module)
        made = getattr(loaded, name, None)
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise ImportError(f"{module} cannot be imported: {_cause(module, error)}") from error
    if not callable(made):
        raise typer.BadParameter(f"{module} has no function {name!r}")
    factory: Callable[[], Any] = made
    return factory


def _imported_file(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"dagpath_model_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    sys.modules[found.name] = loaded
    found.loader.exec_module(loaded)
    return loaded


def _imported_module(name: str) -> ModuleType:
    sys.path.insert(0, "")  # as ``python -m`` does
    return importlib.import_module(name)


def _cause(module: str, error: BaseException) -> str:
    """Why a module could not be imported, and what to do."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if module.startswith(".") or ".." in module:
        return "a module's name has no dots in front and no two in a row; name a file such as nets/mine.py"
    if missing and (module == missing or module.startswith(f"{missing}.")):
        advice = "install its package, run from the folder that has it, or name a file such as nets/mine.py"
        return f"{error}: {advice}"
    advice = f"; install {missing!r}, which it needs" if missing else ""
    return f"its own code raised {type(error).__name__}: {error} ({line_of(error)}){advice}"


def line_of(error: BaseException) -> str:
    """Where an error was raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"at {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else "at an unknown line"
