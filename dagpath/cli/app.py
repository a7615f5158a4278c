"""The command line: ``dagpath COMMAND MODULE:FACTORY …``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from dagpath.checkpoint import TORCH_FILES, Checkpoint, rescale_checkpoint, some
from dagpath.cli.factory import built, line_of
from dagpath.errors import DagpathError
from dagpath.graph.explanation import table
from dagpath.lifting import path_count, path_length_profile, path_metric, path_norm
from dagpath.page import html_report
from dagpath.paths.top import top_paths
from dagpath.runtime.files import require_regular, written_whole
from dagpath.trace import require_finite, trace
from dagpath.words import counted

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
_errors = Console(stderr=True)
_MOST_ELEMENTS = 2**31
"""Most elements of an example input."""
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
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Values for the model: a file *.safetensors, an index of several, their folder, or a file of torch.save "
        "(tensors only: nothing in it is run). Without it the values are those that FACTORY makes.",
        show_default=False,
    ),
]
Prefix = Annotated[str, typer.Option(help="What stands before the model's names in the files.")]
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
def explain(
    model: Model,
    inputs: Inputs,
    html: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Also write a page for a browser: the graph of layers, the path mass and the factors of each, and "
            "what is fixed. One file that needs no other; it is replaced if it exists.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    prefix: Prefix = "",
    as_json: AsJson = False,
) -> None:
    """Say which neurons are free, tied and fixed, and what fixed them: operation, module, source line.

    The answer needs no weights; the path masses and factors of the page do.

    [bold]Example[/bold]: dagpath explain torchvision.models:mobilenet_v3_small --input 1,3,224,224 --html report.html
    """
    if html is not None:
        _check_output(html, model, weights)
        network = _loaded(model, weights, prefix)
    elif weights is not None:
        raise typer.BadParameter("--weights is for --html: the text needs no values")
    else:
        network = built(model, torch.device("meta"))
    with _errors.status("tracing"):
        traced = trace(network, tuple(map(_example, inputs)))
    if html is not None:
        with written_whole(html) as page:
            page.write_text(html_report(traced), encoding="utf-8")
    typer.echo(json.dumps(traced.explain("dict")) if as_json else traced.explain())
    if html is not None and not as_json:
        typer.echo(f"\nwritten: {html}")


@app.command()
def paths(
    model: Model,
    inputs: Inputs,
    weights: Weights = None,
    top: Annotated[int, typer.Option(min=0, help="List that many of the heaviest paths.")] = 5,
    prefix: Prefix = "",
    as_json: AsJson = False,
) -> None:
    """Count and weigh the paths of a model.

    [bold]Example[/bold]: dagpath paths torchvision.models:resnet18 --input 1,3,224,224 --weights in.safetensors
    """
    with _errors.status("tracing"):
        traced = trace(_loaded(model, weights, prefix), tuple(map(_example, inputs)))
    found = {
        "paths": path_count(traced),
        "log_path_norm_1": path_norm(traced, 1, log=True),
        "log_path_norm_2": path_norm(traced, 2, log=True),
        "lengths": path_length_profile(traced, p=2),
        "top": [
            {"neurons": list(path.neurons), "value": path.value, "share": path.share}
            for path in (top_paths(traced, top, progress=not as_json) if top else [])
        ],
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        ("paths", f"{found['paths']:,}" if found["paths"] < 10**15 else f"{Decimal(found['paths']):.6e}"),
        ("log of the path-norm, p = 1", f"{found['log_path_norm_1']:.6f}"),
        ("log of the path-norm, p = 2", f"{found['log_path_norm_2']:.6f}"),
    ]
    typer.echo(table(("quantity", "value"), rows))
    shares = [(str(length), f"{share:.4f}") for length, share in found["lengths"].items()]
    typer.echo("\n" + table(("parametrized layers", "share of Σ Φ²"), shares))
    if found["top"]:
        heaviest = [
            (f"{path['value']:.4g}", f"{path['share']:.2e}", " → ".join(path["neurons"])) for path in found["top"]
        ]
        typer.echo("\n" + table(("value", "share of Σ Φ²", "path"), heaviest))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Weights, as --weights of paths.", show_default=False)],
    second: Annotated[
        Path, typer.Argument(metavar="SECOND", help="Other weights of the same model.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODULE:FACTORY", help=_MODEL, show_default=False)],
    inputs: Inputs,
    prefix: Prefix = "",
    as_json: AsJson = False,
) -> None:
    """Compare two sets of weights: their distance in paths, which no rescaling changes, and in parameters.

    Two networks that are rescalings of each other are far apart in parameters, and at no distance in paths.

    [bold]Example[/bold]: dagpath compare a.safetensors b.safetensors --model nets.py:build --input 1,3,32,32
    """
    examples = tuple(map(_example, inputs))
    with _errors.status("tracing"):
        a, b = (trace(_loaded(model, weights, prefix), examples) for weights in (first, second))
    for traced in (a, b):
        require_finite(traced)
    distance = path_metric(a, b, 2, log=True)
    layers = [
        (name, _relative(value, b.values[name]))
        for name, value in a.values.items()
        if value.is_floating_point() or value.is_complex()
    ]
    found = {
        "log_path_distance": distance,
        "relative_path_distance": math.exp(distance - path_norm(a, 2, log=True)),
        "relative_parameter_differences": dict(layers),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        ("log of the path distance, p = 2", f"{distance:.6f}"),
        ("path distance / path-norm of the first", f"{found['relative_path_distance']:.3e}"),
    ]
    typer.echo(table(("quantity", "value"), rows))
    shown = [(name, f"{difference:.3e}") for name, difference in layers]
    typer.echo("\n" + table(("parameter", "relative difference"), shown))


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
        float | None,
        typer.Option(
            help="Largest factor, and the inverse of the smallest, above 1. By default as large as the types of the "
            "weights hold.",
            show_default=False,
        ),
    ] = None,
    prefix: Prefix = "",
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
    if bound is not None and not bound > 1:
        raise typer.BadParameter(f"--bound must be a factor above 1, got {bound}")
    _check_output(out, model, weights)
    network = built(model, None if with_values else torch.device("meta"))
    rescaling = rescale_checkpoint(
        network,
        tuple(map(_example, inputs)),
        weights,
        out,
        criterion.value,
        prefix=prefix,
        progress=not as_json,
        power_of_two=power_of_two,
        bound=None if bound is None else math.log(bound),
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
        _say(str(error))
        raise SystemExit(1) from None
    except Exception as error:  # of a type that nothing here raises on purpose
        _say(f"{type(error).__name__}: {error} ({line_of(error)}); nothing was written")
        raise SystemExit(1) from None


def _say(message: str) -> None:
    _errors.print(f"[bold red]error[/bold red] {escape(message)}", highlight=False, soft_wrap=True)


def _check_output(out: Path, model: str, weights: Path | None) -> None:
    """Refuse to write over what is read."""
    read = [Path(model.rpartition(":")[0])]
    if weights is not None:
        checkpoint = None if weights.suffix in TORCH_FILES else Checkpoint.open(weights)
        read += [weights] if checkpoint is None else [*checkpoint.files, checkpoint.index or weights]
    if any(path.is_file() and os.path.realpath(out) == os.path.realpath(path) for path in read):
        raise ValueError(f"{out} is the file that is read: name another")


def _loaded(spec: str, weights: Path | None, prefix: str) -> nn.Module:
    """The model with the values of files, or with its own."""
    if weights is None and prefix:
        raise typer.BadParameter("--prefix is for --weights")
    model = built(spec, None)
    if weights is None:
        return model
    tensors = _tensors(weights)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    expected = model.state_dict()
    for name in expected:
        if name not in named:
            raise ValueError(f"{weights} has no {prefix + name!r} of {spec}; in it are {some(tensors)}")
        if not isinstance(expected[name], Tensor):
            raise ValueError(f"{spec} keeps {name!r}, which is no tensor: no file of tensors has it")
        if named[name].shape != expected[name].shape:
            shapes = tuple(named[name].shape), tuple(expected[name].shape)
            raise ValueError(f"{prefix + name!r} in {weights} has shape {shapes[0]}, that of {spec} has {shapes[1]}")
    more = [name for name in named if name not in expected]
    if more:
        raise ValueError(
            f"{weights} has {prefix + more[0]!r}, which {spec} has not ({counted(len(more), 'such tensor')})"
        )
    model.load_state_dict(named)
    return model


def _tensors(weights: Path) -> Mapping[str, Tensor]:
    """What a file, or several, hold by name."""
    if weights.suffix not in TORCH_FILES:
        checkpoint = Checkpoint.open(weights)
        return {name: checkpoint.read(name) for name in checkpoint.places}
    require_regular(weights)
    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # one of many types
        raise ValueError(f"{weights} is no file of tensors (what else it may hold is not run)") from error
    others = [name for name, value in found.items() if not isinstance(value, Tensor)] if isinstance(found, dict) else []
    if not isinstance(found, dict) or others:
        inside = f"of which {some(others)} are no tensors" if others else f"a {type(found).__name__}"
        raise ValueError(
            f"{weights} holds more than named tensors, {inside}: save what model.state_dict() returned by itself"
        )
    return found


def _relative(a: Tensor, b: Tensor) -> float:
    """``‖a − b‖ / ‖a‖``, and the plain difference where a is zero."""
    difference, size = (float(torch.linalg.vector_norm(part.double())) for part in (a.double() - b.double(), a))
    return difference / size if size else difference


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
    if math.prod(shape) > _MOST_ELEMENTS:
        raise typer.BadParameter(
            f"--input {spec!r} has {math.prod(shape):.3g} elements, more than {_MOST_ELEMENTS:,}: one example is enough"
        )
    try:
        return torch.zeros(shape, dtype=dtype)
    except RuntimeError as error:
        raise typer.BadParameter(f"--input {spec!r}: there is no tensor of zeros of {dtype}") from error
