"""Readable summaries: plain text that fits one screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dagpath.graph import NeuronGraph, Site

_MOST_MODULES = 24
_MOST_REASONS = 12
_MOST_NAMES = 2


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: numbers to the right, words to the left."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *map(line, rows)])


def _is_number(cell: str) -> bool:
    return bool(cell) and cell[0] in "-+0123456789" and not cell.endswith(")")


def explain(title: str, graph: NeuronGraph, train_failure: str) -> str:
    """What is free, tied and fixed in each module, and for everything fixed the operation, module and source line."""
    facts = explanation(title, graph, train_failure)
    lines = [
        f"{title}: {graph.num_neurons:,} neurons, {facts['free']:,} free in {graph.num_groups:,} groups, "
        f"{facts['fixed']:,} fixed",
        f"{graph.num_parameters:,} parameters",
    ]
    if train_failure:
        lines.append(f"train mode could not be captured, so only eval mode is accounted for: {train_failure}")
    modules = module_summary(graph, _depth_that_fits(graph))
    if modules:
        rows = [
            (
                module or "(the model itself)",
                *(f"{counts[kind]:,}" for kind in ("neurons", "free", "tied", "fixed")),
                _some(counts["tied_with"]),
            )
            for module, counts in modules.items()
        ]
        headings = ("module", "neurons", "free", "of these tied", "fixed", "tied with")
        lines += ["", table(headings, rows[:_MOST_MODULES])]
        if len(rows) > _MOST_MODULES:
            lines.append(f"... and {len(rows) - _MOST_MODULES} more modules; explain(format='dict') has them all")
    reasons = _reasons(facts["causes"])
    if reasons:
        lines += ["", "Why neurons are fixed", table(("neurons", "reason", "where"), reasons[:_MOST_REASONS])]
        if len(reasons) > _MOST_REASONS:
            lines.append(f"... and {len(reasons) - _MOST_REASONS} more reasons; explain(format='dict') has them all")
    if facts["without_rule"]:
        without = [(entry["operation"], _place(entry["module"], entry["source"])) for entry in facts["without_rule"]]
        lines += ["", "Operations without a rule (what they touch is fixed)"]
        lines.append(table(("operation", "where"), without[:_MOST_REASONS]))
        if len(without) > _MOST_REASONS:
            lines.append(f"... and {len(without) - _MOST_REASONS} more; explain(format='dict') has them all")
    if facts["not_edges"]:
        lines += ["", f"Parameters that are never multiplied: {_some(facts['not_edges'])}"]
    return "\n".join(lines)


def explanation(title: str, graph: NeuronGraph, train_failure: str) -> dict[str, Any]:
    """The same for programs: nothing is left out."""
    fixed = int((graph.group_of == 0).sum())
    counts = torch.bincount(graph.cause_of[graph.cause_of >= 0], minlength=len(graph.causes)).tolist()
    causes = [
        {"neurons": count, "reason": cause.reason, **_site(cause.site)}
        for cause, count in zip(graph.causes, counts, strict=True)
    ]
    return {
        "model": title,
        "neurons": graph.num_neurons,
        "groups": graph.num_groups,
        "parameters": graph.num_parameters,
        "free": graph.num_neurons - fixed,
        "fixed": fixed,
        "modules": module_summary(graph, None),
        "causes": sorted(causes, key=lambda cause: -int(cause["neurons"])),
        "without_rule": [_site(site) for site in graph.without_rule],
        "not_edges": list(graph.not_edges),
        "train_failure": train_failure,
    }


def _site(site: Site) -> dict[str, str]:
    return {"operation": site.operation, "module": site.module, "source": site.source}


def module_summary(graph: NeuronGraph, depth: int | None) -> dict[str, dict[str, Any]]:
    """Per module (or per prefix of ``depth`` parts of its path): neurons, free, tied, fixed, and tied with which."""
    paths = [".".join(site.module.split(".")[:depth]) for site in graph.sites]
    names = list(dict.fromkeys(paths))
    number = {name: index for index, name in enumerate(names)}
    module_of = torch.tensor([number[path] for path in paths], dtype=torch.long)[graph.maker_of]
    sizes = torch.bincount(graph.group_of, minlength=graph.num_groups + 1)
    free = graph.group_of > 0
    tied = free & (sizes[graph.group_of] > 1)
    members = torch.unique(torch.stack([graph.group_of[tied], module_of[tied]], 1), dim=0)
    modules_of_group: dict[int, list[int]] = {}
    for group, module in members.tolist():
        modules_of_group.setdefault(group, []).append(module)
    partners: list[set[int]] = [set() for _ in names]
    for together in {tuple(modules) for modules in modules_of_group.values()}:
        for module in together:
            partners[module].update(set(together) - {module})

    def count(chosen: torch.Tensor) -> list[int]:
        result: list[int] = torch.bincount(module_of[chosen], minlength=len(names)).tolist()
        return result

    columns = (count(torch.ones_like(free)), count(free), count(tied), count(~free))
    return {
        name: {
            **dict(zip(("neurons", "free", "tied", "fixed"), numbers, strict=True)),
            "tied_with": [names[partner] for partner in sorted(partners[index])],
        }
        for index, (name, *numbers) in enumerate(zip(names, *columns, strict=True))
    }


def _depth_that_fits(graph: NeuronGraph) -> int | None:
    """The longest module paths of which there are few enough to show."""
    depths = range(1, 1 + max((site.module.count(".") + 1 for site in graph.sites), default=1))
    fitting = [d for d in depths if len({".".join(s.module.split(".")[:d]) for s in graph.sites}) <= _MOST_MODULES]
    return max(fitting, default=1)


def fixed_summary(graph: NeuronGraph) -> list[tuple[int, str]]:
    """(neurons, reason) for each reason and operation that fixed neurons, most neurons first."""
    return [(count, reason) for count, reason, _ in _summed(explanation("", graph, "")["causes"])]


def _summed(causes: Iterable[dict[str, Any]]) -> list[tuple[int, str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cause in causes:
        operation = "" if cause["operation"] == "output" else f" ({cause['operation']})"
        found.setdefault(cause["reason"] + operation, []).append(cause)
    summed = [(sum(cause["neurons"] for cause in group), reason, group) for reason, group in found.items()]
    return sorted(summed, key=lambda row: -row[0])


def _reasons(causes: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    rows = []
    for count, reason, group in _summed(causes):
        first = min(group, key=lambda cause: str(cause["module"]))
        place = _place(first["module"], first["source"])
        rows.append((f"{count:,}", reason, f"{place} and {len(group) - 1} more" if place and group[1:] else place))
    return rows


def _place(module: str, source: str) -> str:
    """The module path and the end of the source line's path."""
    line = source.partition(" (")[0]
    short = "/".join(line.replace("\\", "/").rsplit("site-packages/", maxsplit=1)[-1].split("/")[-3:])
    return ", ".join(part for part in (module, short) if part)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name or "(the model itself)" for name in names[:_MOST_NAMES])
    return f"{shown} and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else shown
