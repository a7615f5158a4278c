"""Tables of the documentation: from the registry of operations, the command line, and the committed results.

A page includes the table ``name`` with ``.. include:: /_name.inc``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from typer.main import get_command

from dagpath import study
from dagpath.cli import app as cli
from dagpath.graph.explanation import table
from dagpath.ops import registered
from dagpath.rules.base import Unknown

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"

TYPES = ("float32", "float64")
SAME_FUNCTION = ["baseline", "path conditioning", "ten sweeps", "ENorm"]
"""The methods that start from the same function."""
runs = study.load(RESULTS / "study_training.jsonl")
results: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
drawn = study.InitializationStudy.from_dict(results["study_initialization"]["figures"]["rows"])


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = results[name]["figures"]
    return found


def write_tables() -> None:
    """Write everything that pages include."""
    contents = {
        "operations_table": operations(),
        "study_initialization": wrapped(errors()),
        "study_training": wrapped(str(runs)),
        "study_best": wrapped(runs.best_table()),
        "study_at_start": wrapped(at_start()),
        "study_baseline": wrapped(runs.comparison_table()),
        "study_ten_sweeps": wrapped(runs.comparison_table(reference="ten sweeps")),
        "rescale_stages": rescale_stages(),
        "rescale_others": rescale_others(),
        "solver_costs": solver_networks(
            {"groups": ",", "masses": ",", "iterations": ",", "products": ",", "10 sweeps / newton": ".0f"}
        ),
        "solver_optima": solver_networks(
            {"optimality": ".0e", "F, newton": ",.0f", "F, 10 sweeps": ",.0f", "F, 2,000 sweeps": ",.0f"}
        ),
        "solver_products": solver_networks({"product / torch.sum": ".1f", "memory / masses": ".1f"}),
        "solver_resnet50": solver_resnet50(),
        "solver_growth_depth": solver_growth("depth"),
        "solver_growth_width": solver_growth("width"),
        "command_options": command_options(),
        "lifting_passes": lifting_passes(),
        "lifting_growth": lifting_growth(),
        "checkpoint_memory": checkpoint_memory(),
        "unroll_resnet20": unroll_resnet20(),
        "zoo_models": zoo_models(),
        "train_losses": train_losses(),
        "train_steps": train_steps(),
        **{f"made_{name}": made(name) for name in results},
    }
    for name, text in contents.items():
        (HERE / f"_{name}.inc").write_text(text)


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures", widths: str = "auto") -> str:
    """A table of reST: of words, all to the left, or of figures, to the right but for the first column."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :class: {kind}", f"   :widths: {widths}", ""]
    for row in (headings, *rows):
        lines += [f"   {'* ' if index == 0 else '  '}- {cell}" for index, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """Some figures of a row, each in its format."""
    return [format(row[name], spec) for name, spec in columns.items()]


def wrapped(text: str) -> str:
    """A table of :func:`dagpath.graph.explanation.table` as one of reST, whose headings and cells may wrap."""
    headings, rule, *rows = text.splitlines()
    spans = [column.span() for column in re.finditer("-+", rule)]
    first, *others = ([line[slice(*span)].strip() for span in spans] for line in (headings, *rows))
    return grid(first, others)


def made(name: str) -> str:
    """How a result file was made: the command, and on what."""
    command, machine = results[name]["command"], results[name]["machine"]
    versions = f"Python {machine['python']}, PyTorch {machine['torch']}, dagpath {machine['dagpath']}"
    cores = f"{machine['cores']} cores of an {machine['processor']}, {machine['threads']} thread(s) of PyTorch"
    return f".. code-block:: sh\n\n   {command}\n\nMeasured with {versions} on {cores}.\n"


def operations() -> str:
    """Which rule each operation has."""
    rules: dict[str, list[str]] = {}
    for name, rule in registered().items():
        if isinstance(rule, Unknown) and rule.known:
            text = f"Fixed: {rule.reason}."
        else:
            text = (type(rule).__doc__ or "").strip().splitlines()[0]
        rules.setdefault(text, []).append(f"``{name}``")
    rows = [(", ".join(names), text) for text, names in sorted(rules.items())]
    return grid(("Operations", "Rule"), rows, kind="words", widths="50 50")


def at_start() -> str:
    """Gradient and sharpness before the first step, by task and method."""
    rows = figures("study_initialization")["at start"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shown = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for name in ("gradient", "sharpness"):
            values = {row["method"]: row[name] for row in rows if row["task"] == task}
            shown.append((task, name, *(f"{values[method]:.3g}" for method in methods)))
    return table(("task", "of the loss", *methods), shown)


def errors() -> str:
    """The largest error of the prediction, by architecture and scheme."""
    schemes = list(dict.fromkeys(row.scheme for row in drawn.rows))
    rows = []
    for name in dict.fromkeys(row.architecture for row in drawn.rows):
        chosen = [row for row in drawn.rows if row.architecture == name]
        worst = (max(row.error for row in chosen if row.scheme == scheme) for scheme in schemes)
        rows.append((name, *(f"{error:.3f}" for error in worst)))
    return table(("architecture", *schemes), rows)


def command_options() -> str:
    """The arguments and options of each command, as the command line itself has them."""
    headings = ("argument or option", "what it says", "default")
    parts = []
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        about = plain(command.help).partition("\n\n")[0]
        rows = [option(one) for one in command.params]
        parts.append(f"{name}\n{'-' * len(name)}\n\n{about}\n\n" + grid(headings, rows, kind="words"))
    return "\n".join(parts)


def option(parameter: Any) -> tuple[str, str, str]:
    """How an argument or option is written, what it means, and its default."""
    flag, default = getattr(parameter, "is_flag", False), parameter.default
    choices = "|".join(choice.value for choice in type(default)) if isinstance(default, Enum) else ""
    value = "" if flag else parameter.metavar or choices or parameter.name.upper()
    name = f"{parameter.opts[0]} {value}".strip() if parameter.param_type_name == "option" else value
    if parameter.required:
        shown = "required"
    else:
        shown = f"``{getattr(default, 'value', default)}``" if default and not flag else ""
    return f"``{name}``", plain(parameter.help), shown


def plain(text: str) -> str:
    """Text with rich's marks as reST."""
    return re.sub(r"([*_`])", r"\\\1", text).replace("[bold]", "**").replace("[/bold]", "**")


def rescale_stages() -> str:
    names = {"rescale_": "the whole of ``rescale_``", "  trace": "tracing", "  masses": "path masses, in float64"}
    names |= {"  solve": "solving", "  apply": "applying", "  verify": "verifying"}
    found = figures("rescale")
    return grid(
        ("stage", "forward and backward passes"),
        [(text, f"{found[f'{name} / pass']:.2f}") for name, text in names.items()],
    )


def rescale_others() -> str:
    found = figures("rescale")
    rows = [
        ("plainly written coordinate descent, 10 sweeps", "plain coordinate descent, 10 sweeps / newton"),
        ('``solver="coordinate"``, 10 sweeps', "dagpath's coordinate solver, 10 sweeps / newton"),
    ]
    return grid(("", "Newton solves"), [(text, f"{found[name]:.0f}") for text, name in rows])


def solver_networks(columns: dict[str, str]) -> str:
    rows = figures("solver")["networks"]
    return grid(["network", *columns], [[row["network"], *cells(row, columns)] for row in rows])


def solver_resnet50() -> str:
    found = figures("solver")["resnet50"]
    specs = {
        "solve / pass": ".2f",
        "iterations": ",",
        "optimality": ".0e",
        "masses": ",",
        "peak memory, megabytes": ".1f",
    }
    return grid(("quantity", "value"), list(zip(specs, cells(found, specs), strict=True)))


def solver_growth(by: str) -> str:
    """One of the two series, first by depth, then by width, which begin with the same network."""
    found = figures("solver")["growth"]
    second = max(
        k for k, row in enumerate(found) if (row["width"], row["depth"]) == (found[0]["width"], found[0]["depth"])
    )
    columns = {by: ",", "masses": ",", "iterations": ",", "milliseconds": ".1f"}
    rows = {"depth": found[:second], "width": found[second:]}[by]
    return grid(list(columns), [cells(row, columns) for row in rows])


def lifting_passes() -> str:
    found = figures("lifting")
    names = [
        "path_norm, float32",
        "path_norm, float64",
        "path_mass",
        "gram_diagonal, float32",
        "gram_diagonal, float64",
    ]
    names += ["gram @ v, float32", "gram @ v, float64"]
    return grid(("quantity", "float32 forward passes"), [(name, f"{found[name]:.2f}") for name in names])


def lifting_growth() -> str:
    prefix, suffix = "gram_diagonal, ", " parameters, seconds"
    rows = [
        (name.removeprefix(prefix).removesuffix(suffix), f"{1e3 * value:.1f}")
        for name, value in figures("lifting").items()
        if name.endswith(suffix)
    ]
    return grid(("parameters", "milliseconds"), rows)


def checkpoint_memory() -> str:
    found = figures("checkpoint")
    growth = ("growth / largest file", "growth / largest file, memory returned")
    columns = {"largest file, megabytes": ".0f", "all files, megabytes": ".0f", **dict.fromkeys(growth, ".2f")}
    return grid(("checkpoint", *columns), [(case, *cells(row, columns)) for case, row in found.items()])


def unroll_resnet20() -> str:
    found = figures("unroll")
    rows = [("nodes", f"{found['nodes']:,}"), ("edges", f"{found['edges']:,}")]
    rows += [(f"seconds: {name}", f"{value:.1f}") for name, value in found["seconds"].items()]
    rows += [("peak memory, GiB", f"{found['peak GiB']:.1f}")]
    rows += [("relative difference of the two path-norms", f"{found['relative difference of norms']:.0e}")]
    return grid(("quantity", "value"), rows)


def zoo_models() -> str:
    rows = [
        (
            f"``{name}``",
            f"{model['parameters']:,}",
            f"{model['neurons']:,}",
            f"{model['free groups']:,}",
            "yes" if model["eval bitwise"] else "no",
            "yes" if model["train"] == 0 else f"{model['train']:.0e}",
        )
        for name, model in figures("zoo")["models"].items()
    ]
    return grid(("model", "parameters", "neurons", "free groups", "bitwise in eval mode", "in train mode"), rows)


def train_losses() -> str:
    losses = figures("train")["losses"]
    labels = {
        "SGD": "SGD",
        "GSGD, 0.5": "GSGD, ``skeleton=0.5``",
        "GSGD, 1": 'GSGD, ``skeleton="ones"``',
        "GSGD, heaviest": 'GSGD, ``skeleton="heaviest"``',
        "PathSGD, every 10": "PathSGD, ``every=10``",
        "SGD from the start of GSGD, 0.5": "SGD from the start of GSGD at 0.5",
        "SGD from the start of GSGD, 1": "SGD from the start of GSGD at 1",
    }
    rows = [
        (label, *(f"{statistics.median(losses[f'{net}, {name}']['losses']):.2e}" for net in ("MLP", "CNN")))
        for name, label in labels.items()
    ]
    return grid(("method", "MLP", "CNN"), rows)


def train_steps() -> str:
    steps = figures("train")["steps of SGD"]
    rows = [(name, f"{steps[name]:.2f}") for name in ("GSGD", "PathSGD, every 10", "Rebalance, every 100")]
    return grid(("optimizer", "steps of SGD"), rows)
