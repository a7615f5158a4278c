"""Readable summaries: plain text that fits one screen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dagpath.graph import NeuronGraph

_MOST_ROWS = 20


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
    """What is free and what is fixed, and for everything fixed the operation, the module and the source line."""
    fixed = int((graph.group_of == 0).sum())
    free = graph.num_neurons - fixed
    lines = [
        f"{title}: {graph.num_neurons:,} neurons, {free:,} free in {graph.num_groups:,} groups, {fixed:,} fixed",
        f"{graph.num_parameters:,} parameters",
    ]
    sizes = torch.bincount(graph.group_of[graph.group_of > 0], minlength=1)
    if graph.num_groups and int(sizes.max()) > 1:
        lines.append(f"largest group: {int(sizes.max())} neurons share one scale")
    if train_failure:
        lines.append(f"train mode could not be captured, so only eval mode is accounted for: {train_failure}")
    rows = [
        (f"{count:,}", reason, operation, f"{place} (and {places - 1} more)" if places > 1 else place)
        for count, reason, operation, place, places in fixed_summary(graph)
    ]
    if rows:
        lines += ["", "Fixed neurons", table(("neurons", "reason", "operation", "where"), rows[:_MOST_ROWS])]
        if len(rows) > _MOST_ROWS:
            lines.append(f"... and {len(rows) - _MOST_ROWS} more reasons")
    return "\n".join(lines)


def fixed_summary(graph: NeuronGraph) -> list[tuple[int, str, str, str, int]]:
    """(neurons, reason, operation, first place, number of places) for each reason, most neurons first."""
    counts = torch.bincount(graph.cause_of[graph.cause_of >= 0], minlength=len(graph.causes)).tolist()
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for cause, count in zip(graph.causes, counts, strict=True):
        site = cause.site
        place = ", ".join(part for part in (site.module, site.source) if part)
        found.setdefault((cause.reason, site.operation), []).append((count, place))
    summary = [
        (sum(count for count, _ in places), reason, operation, places[0][1], len(places))
        for (reason, operation), places in found.items()
    ]
    return sorted(summary, key=lambda row: -row[0])
