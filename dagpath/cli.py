"""The command line: ``dagpath COMMAND MODULE:FACTORY …``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from dagpath.checkpoint import rescale_checkpoint
from dagpath.errors import DagpathError
from dagpath.solver.problem import DEFAULT_BOUND

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
_errors = Console(stderr=True)
_INTERRUPTED = 130
"""The exit code after Ctrl-C."""

_MODEL = (
    "MODULE:FACTORY. The module is a name such as torchvision.models or a file such as nets/mine.py, and FACTORY a "
    "function without arguments in it that returns the model. [bold]Both are run[/bold]: name only code that you trust."
)
Model = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help=_MODEL, show_default=False)]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of an example input, the batch first: 1,3,224,224. With a type if it is not float32: "
        "1,128:int64. Again for each further input.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


class CriterionName(str, Enum):
    """What --criterion takes."""

    pathcond = "pathcond"
    equinorm = "equinorm"
    range = "range"


@app.callback()
def about() -> None:
    """The neurons and paths of PyTorch ReLU networks, and the rescaling that balances them."""


@app.command()
def rescale(
    model: Model,
    inputs: Inputs,
    weights: Annotated[
        Path,
        typer.Option(
            help="The weights: a file *.safetensors, an index *.safetensors.index.json, or their folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Where the new weights go: a file for a file, which is replaced if it exists; a folder that does not "
            "exist for several, in which only the weights and their index are written. It appears once it is complete. "
            "Never the input.",
            show_default=False,
        ),
    ],
    criterion: Annotated[CriterionName, typer.Option(help="What to balance.")] = CriterionName.pathcond,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Factors that are powers of two: outputs stay bitwise the same.")
    ] = False,
    bound: Annotated[
        float,
        typer.Option(help="Largest factor, and the inverse of the smallest. Smaller where a half type overflows."),
    ] = math.exp(DEFAULT_BOUND),
    prefix: Annotated[str, typer.Option(help="What stands before the model's names in the files.")] = "",
    with_values: Annotated[
        bool,
        typer.Option(
            "--with-values",
            help="Let FACTORY make the model with values. By default it has none (PyTorch's meta device), so that "
            "models of any size fit; some need values, such as constants that they do not store.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rescale weights in safetensors files; the function of the model stays.

    [bold]Example[/bold]: dagpath rescale torchvision.models:resnet50 --input 1,3,224,224 --weights in.safetensors
    --out out.safetensors
    """
    network = _built(model, None if with_values else torch.device("meta"))
    rescaling = rescale_checkpoint(
        network,
        tuple(map(_example, inputs)),
        weights,
        out,
        criterion.value,
        prefix=prefix,
        progress=not as_json,
        power_of_two=power_of_two,
        bound=math.log(bound) if bound > 1 else 0.0,
    )
    if as_json:
        found = {
            "out": str(out),
            "groups": len(rescaling.log_scales),
            "objective": rescaling.objective,
            "optimality": rescaling.optimality,
            "converged": rescaling.converged,
            "iterations": rescaling.iterations,
            "seconds": rescaling.seconds,
        }
        typer.echo(json.dumps(found))
    else:
        typer.echo(rescaling.summary(layers=True))
        typer.echo(f"\nwritten: {out}")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 it could not be done, 2 the command is wrong, 130 Ctrl-C."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            _errors.print("[bold red]interrupted[/bold red]: nothing was written")
        raise
    except (DagpathError, ValueError, TypeError, OSError, ImportError) as error:
        _errors.print(f"[bold red]error[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def _built(spec: str, device: torch.device | None) -> nn.Module:
    """The model that ``MODULE:FACTORY`` makes."""
    made = _factory(spec)
    if device is None:
        model = made()
    else:
        with device:
            model = made()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _factory(spec: str) -> Callable[[], Any]:
    module, colon, name = spec.rpartition(":")
    if not colon or not module or not name:
        raise typer.BadParameter(f"{spec!r} is not of the form MODULE:FACTORY, such as torchvision.models:resnet18")
    path = Path(module)
    if path.suffix == ".py":
        if not path.is_file():
            raise typer.BadParameter(f"there is no file {module}")
        found = importlib.util.spec_from_file_location(f"dagpath_model_{path.stem}", path)
        assert found is not None
        assert found.loader is not None
        loaded = importlib.util.module_from_spec(found)
        sys.modules[found.name] = loaded
        found.loader.exec_module(loaded)
    else:
        sys.path.insert(0, "")  # as ``python -m`` does
        loaded = importlib.import_module(module)
    if not callable(getattr(loaded, name, None)):
        raise typer.BadParameter(f"{module} has no function {name!r}")
    made: Callable[[], Any] = getattr(loaded, name)
    return made


def _example(spec: str) -> Tensor:
    """Zeros of a shape such as ``1,3,224,224`` or ``1,128:int64``."""
    sizes, _, kind = spec.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [-1]
    if not isinstance(dtype, torch.dtype) or min(shape) < 1:
        raise typer.BadParameter(f"--input {spec!r} is no shape such as 1,3,224,224 or 1,128:int64")
    return torch.zeros(shape, dtype=dtype)
