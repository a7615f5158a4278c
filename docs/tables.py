"""Tables of the documentation, from the registry of operations and from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from dagpath import study
from dagpath.ops import Unknown, registered
from dagpath.report import table

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"

SAME_FUNCTION = ["baseline", "path conditioning", "ten sweeps", "ENorm"]
"""The methods that start from the same function."""
runs = study.load(RESULTS / "study_training.jsonl")
_figures = json.loads((RESULTS / "study_initialization.json").read_text())["figures"]
drawn = study.InitializationStudy.from_dict(_figures["rows"])


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
    }
    for name, text in contents.items():
        (HERE / f"_{name}.inc").write_text(text)


def literal(text: str) -> str:
    return ".. code-block:: text\n\n" + "".join(f"   {line}\n" for line in text.splitlines())


def operations() -> str:
    """Which rule each operation has."""
    rules: dict[str, list[str]] = {}
    for name, rule in registered().items():
        if isinstance(rule, Unknown) and rule.known:
            text = f"Fixed: {rule.reason}."
        else:
            text = (type(rule).__doc__ or "").strip().splitlines()[0]
        rules.setdefault(text, []).append(f"``{name}``")
    rows = "".join(f"   * - {', '.join(names)}\n     - {text}\n" for text, names in sorted(rules.items()))
    return ".. list-table::\n   :header-rows: 1\n   :widths: 50 50\n\n   * - Operations\n     - Rule\n" + rows


def at_start() -> str:
    """Gradient and sharpness before the first step, by task and method."""
    rows = _figures["at start"]
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
