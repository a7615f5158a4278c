"""Readable summaries: plain text that fits one screen."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dagpath.capture.site import Site
from dagpath.graph.neuron_graph import NeuronGraph
from dagpath.words import counted

_ITSELF = "(the model itself)"
_MOST_MODULES = 24
_MOST_REASONS = 8


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: numbers to the right, words to the left."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    numeric = [column > 0 and all(_is_number(row[column]) for row in rows) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *map(line, rows)])


def _is_number(cell: str) -> bool:
    return bool(cell) and cell[0] in "-+0123456789" and not cell.endswith(")")


def explain(title: str, graph: NeuronGraph, train_failure: str, covers: Sequence[str]) -> str:
    """What is free, tied and fixed in each module, and for everything fixed the operation, module and source line."""
    facts = explanation(title, graph, train_failure, covers)
    elsewhere = graph.num_groups - int(torch.unique(graph.group_of[graph.group_of > 0]).numel())
    other = f" ({elsewhere:,} of them with neurons in other calls only)" if elsewhere else ""
    lines = [
        f"{title}: {counted(graph.num_neurons, 'neuron')}, {facts['free']:,} free in "
        f"{counted(graph.num_groups, 'group')}{other}, {facts['fixed']:,} fixed; "
        f"{counted(graph.num_parameters, 'parameter')}",
        "Free neurons may be rescaled, tied ones only together, by one factor a group; fixed ones keep their scale.",
    ]
    lines += [f"Holds for {line}." for line in covers]
    if train_failure:
        lines.append(f"train mode could not be captured, so only eval mode is accounted for: {train_failure}")
    modules = module_summary(graph, _depth_that_fits(graph))
    if modules:
        rows = [
            (
                module or _ITSELF,
                *(f"{counts[kind]:,}" for kind in ("neurons", "free", "tied", "fixed")),
                _some(counts["tied_with"]),
            )
            for module, counts in modules.items()
        ]
        headings = ("module", "neurons", "free", "of these tied", "fixed", "tied with")
        lines += ["", table(headings, rows[:_MOST_MODULES])]
        if len(rows) > _MOST_MODULES:
            more = counted(len(rows) - _MOST_MODULES, "more module")
            lines.append(f"... and {more}; explain(format='dict') has them all")
    lines += _section("Why neurons are fixed", _reasons(facts["causes"]), "reason")
    operations = dict.fromkeys(entry["operation"] for entry in facts["without_rule"])
    calls = [_call(name, [e for e in facts["without_rule"] if e["operation"] == name]) for name in operations]
    lines += _section(
        "Operations without a rule: what they touch is fixed (dagpath.register_op gives one)", calls, "operation"
    )
    if facts["unknown"]:
        lines += [
            "",
            f"Parameters with elements that read zeros alone, which are left as they are: {_some(facts['unknown'])}",
        ]
    if facts["not_edges"]:
        lines += ["", f"Parameters that no rescaling multiplies: {_some(facts['not_edges'])}"]
    return "\n".join(lines)


def _section(title: str, entries: Sequence[str], name: str) -> list[str]:
    if not entries:
        return []
    more = len(entries) - _MOST_REASONS
    rest = [f"... and {counted(more, f'more {name}')}; explain(format='dict') has them all"] if more > 0 else []
    return ["", title, *entries[:_MOST_REASONS], *rest]


def explanation(title: str, graph: NeuronGraph, train_failure: str, covers: Sequence[str]) -> dict[str, Any]:
    """The explanation as a dictionary for programs: nothing is left out."""
    fixed = int((graph.group_of == 0).sum())
    counts = torch.bincount(graph.cause_of[graph.cause_of >= 0], minlength=len(graph.causes)).tolist()
    causes = [
        {"neurons": count, "reason": cause.reason, "tied_to": list(cause.tied_to), "of": of, **_site(cause.site)}
        for cause, count, of in zip(graph.causes, counts, _modules_of_causes(graph), strict=True)
    ]
    return {
        "model": title,
        "neurons": graph.num_neurons,
        "groups": graph.num_groups,
        "parameters": graph.num_parameters,
        "free": graph.num_neurons - fixed,
        "fixed": fixed,
        "modules": module_summary(graph, None),
        "causes": causes,
        "without_rule": [_site(site) for site in graph.without_rule],
        "not_edges": list(graph.not_edges),
        "unknown": list(graph.unknown),
        "covers": list(covers),
        "train_failure": train_failure,
    }


def _modules_of_causes(graph: NeuronGraph) -> list[list[str]]:
    """For each cause the modules of the neurons that it fixed."""
    found: list[dict[str, None]] = [{} for _ in graph.causes]
    fixed = graph.cause_of >= 0
    for cause, site in torch.unique(torch.stack([graph.cause_of[fixed], graph.maker_of[fixed]], 1), dim=0).tolist():
        found[cause][graph.sites[site].module] = None
    return [list(modules) for modules in found]


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


def summed(causes: Iterable[dict[str, Any]]) -> list[tuple[int, str, list[dict[str, Any]]]]:
    """(neurons, reason and operation, causes) for each reason and operation, most neurons first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cause in causes:
        operation = "" if cause["operation"] in ("output", "placeholder") else f" ({cause['operation']})"
        found.setdefault(cause["reason"] + operation, []).append(cause)
    rows = [(sum(cause["neurons"] for cause in group), reason, group) for reason, group in found.items()]
    return sorted(rows, key=lambda row: -row[0])


def _reasons(causes: Iterable[dict[str, Any]]) -> list[str]:
    """Two lines for each reason: the neurons and what fixed them, and where."""
    found = summed(causes)
    width = max((len(f"{count:,}") for count, *_ in found), default=0)
    return [f"{count:>{width},}  {_call(reason, group, width + 2)}" for count, reason, group in found]


def _call(what: str, entries: Sequence[dict[str, Any]], indent: int = 2) -> str:
    partners = dict.fromkeys(name for entry in entries for name in entry.get("tied_to", []))
    places = dict.fromkeys(_place(entry["module"], entry["source"]) for entry in entries)
    places.pop("", None)
    to = f" to {_some([*partners])}" if partners else ""
    at = f"\n{' ' * indent}at {_some([*places], 1)}" if places else ""
    return what + to + at


def _place(module: str, source: str) -> str:
    """The module path and the end of the source line's path."""
    line = source.partition(" (")[0]
    short = "/".join(line.replace("\\", "/").split("/")[-2:])
    return ", ".join(part for part in (module, short) if part)


def _some(names: Sequence[str], width: int = 48) -> str:
    """The first name, and as many more as fit."""
    words = [name or _ITSELF for name in names]
    ends = itertools.accumulate(len(word) + 2 for word in words)
    shown = max(1, sum(end <= width for end in ends))
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(words[:shown]) + more
