"""Tables of the documentation, from the registry of operations and from the committed results.

A page includes the table ``name`` with ``.. include:: /_name.inc``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dagpath import study
from dagpath.ops import registered
from dagpath.ops.base import Unknown
from dagpath.report import table

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
        "study_initialization": literal(errors()),
        "study_training": literal(str(runs)),
        "study_best": literal(runs.best_table()),
        "study_at_start": literal(at_start()),
        "study_baseline": literal(runs.comparison_table()),
        "study_ten_sweeps": literal(runs.comparison_table(reference="ten sweeps")),
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
        "solver_growth": solver_growth(),
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


def literal(text: str) -> str:
    return ".. code-block:: text\n\n" + "".join(f"   {line}\n" for line in text.splitlines())


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of reST, with its first column to the left and numbers to the right."""
    lines = [".. list-table::", "   :header-rows: 1", "   :class: figures", ""]
    for row in (headings, *rows):
        lines += [f"   {'* ' if index == 0 else '  '}- {cell}" for index, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


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
    return grid(("Operations", "Rule"), [(", ".join(names), text) for text, names in sorted(rules.items())])


def at_start() -> str:
    """Gradient and sharpness before the first step, by task and method."""
    rows = figures("study_initialization")["at start"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for name in ("gradient", "sharpness"):
            values = {row["method"]: row[name] for row in rows if row["task"] == task}
            cells.append((task, name, *(f"{values[method]:.3g}" for method in methods)))
    return table(("task", "of the loss", *methods), cells)


def errors() -> str:
    """The largest error of the prediction, by architecture and scheme."""
    schemes = list(dict.fromkeys(row.scheme for row in drawn.rows))
    rows = []
    for name in dict.fromkeys(row.architecture for row in drawn.rows):
        chosen = [row for row in drawn.rows if row.architecture == name]
        worst = (max(row.error for row in chosen if row.scheme == scheme) for scheme in schemes)
        rows.append((name, *(f"{error:.3f}" for error in worst)))
    return table(("architecture", *schemes), rows)


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
    return grid(
        ["network", *columns], [[row["network"], *(format(row[c], columns[c]) for c in columns)] for row in rows]
    )


def solver_resnet50() -> str:
    found = figures("solver")["resnet50"]
    specs = {
        "solve / pass": ".2f",
        "iterations": ",",
        "optimality": ".0e",
        "masses": ",",
        "peak memory, megabytes": ".1f",
    }
    return grid(("quantity", "value"), [(name, format(found[name], spec)) for name, spec in specs.items()])


def solver_growth() -> str:
    columns = {"width": ",", "depth": ",", "masses": ",", "iterations": ",", "milliseconds": ".1f"}
    rows = figures("solver")["growth"]
    return grid(list(columns), [[format(row[name], spec) for name, spec in columns.items()] for row in rows])


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
    rows = [(case, *(format(row[name], spec) for name, spec in columns.items())) for case, row in found.items()]
    return grid(("checkpoint", *columns), rows)


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
