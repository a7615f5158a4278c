"""A report on a model as one page for a browser: its layers, their paths, and what may be rescaled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch

from dagpath.apply.rescaling import Rescaling
from dagpath.balance import balance
from dagpath.graph.explanation import explanation, summed
from dagpath.lifting import path_count, path_mass, path_norm
from dagpath.trace import TracedModel, require_finite, require_traced

ROW = 26
"""Height of a layer's row in pixels."""
LANE, MOST_LANES = 9.0, 12
"""Width of one skip in pixels, and how many are drawn that wide; more of them share the same room."""


@dataclass(frozen=True)
class Row:
    """One layer, join, input, output or barrier.

    Attributes:
        name: its name in the graph of layers.
        operation: the ATen operation.
        role: as in :meth:`dagpath.NeuronGraph.to_networkx`.
        size: number of neurons; 0 for what is none.
        free: how many of them are free, those that are tied included.
        tied: how many of them are free, and in a group with others.
        mass: share of ``Σ Φ²`` through it; None for what is no neuron.
        factors: log₂ λ of its free neurons: smallest, quartiles and largest; None where none is free.
        reasons: why its fixed neurons are fixed.
    """

    name: str
    operation: str
    role: str
    size: int
    free: int
    tied: int
    mass: float | None
    factors: tuple[float, ...] | None
    reasons: tuple[str, ...]


def html_report(traced: TracedModel, rescaling: Rescaling | None = None) -> str:
    """A model on one page: the graph of its layers, the path mass and the scale factors of each, what is fixed and why.

    Masses are those of the parameters' current values, factors and criterion those of a rescaling. The page is one
    string of HTML that needs no other file and no network. It follows the browser's light or dark mode and fits a
    telephone.

    Args:
        traced: the traced model.
        rescaling: whose factors to show, one of this trace; by default those of :func:`balance`.

    Returns:
        The page.

    Raises:
        ImportError: jinja2 is missing, ``pip install 'dagpath[cli]'``.
        ValueError: a parameter is not finite or has no values (PyTorch's meta device), or the rescaling is of another
            trace.

    Cost: that of :func:`path_mass`, :func:`path_norm` and :func:`balance`: a few forward and backward passes in
    float64.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> page = dagpath.html_report(dagpath.trace(net, torch.zeros(1, 4)))
        >>> page.startswith("<!doctype html>"), "Sequential" in page
        (True, True)
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report page needs jinja2: pip install 'dagpath[cli]'") from error
    require_traced(traced)
    if rescaling is not None and rescaling.traced.graph is not traced.graph:
        raise ValueError("the rescaling was found for another trace: pass rescaling.traced")
    require_finite(traced)
    rescaling = rescaling or balance(traced)
    layers = traced.graph.to_networkx(mass=path_mass(traced))
    layers.remove_nodes_from([node for node, role in layers.nodes(data="role") if role == "constant"])
    rows = list(_rows(rescaling, layers))
    facts = explanation(
        type(traced.model).__name__, traced.graph, traced.captured.train_failure, traced.captured.covers
    )
    lines, width = _drawing(layers)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("dagpath.page", ""), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        facts=facts,
        numbers=_numbers(facts, rescaling),
        rows=rows,
        lines=lines,
        width=width,
        row_height=ROW,
        axis=_axis(rows),
        reasons=summed(facts["causes"]),
    )


def _numbers(facts: dict[str, Any], rescaling: Rescaling) -> list[tuple[str, str]]:
    log_count = path_count(rescaling.traced, log=True)
    if log_count < math.log(1e12):
        paths = f"{path_count(rescaling.traced):,}"
    else:
        power = log_count / math.log(10)
        paths = f"{10 ** (power % 1):.2f} · 10^{int(power)}"
    numbers = [
        ("parameters", f"{facts['parameters']:,}"),
        ("neurons", f"{facts['neurons']:,}"),
        ("free", f"{facts['free']:,}"),
        ("free scale groups", f"{facts['groups']:,}"),
        ("fixed", f"{facts['fixed']:,}"),
        ("paths", paths),
        ("log of the path-norm, p = 2", f"{path_norm(rescaling.traced, 2, log=True):,.2f}"),
    ]
    if not math.isnan(rescaling.objective[0]):
        before, after = (f"{value:,.1f}" for value in rescaling.objective)
        numbers += [("criterion before", before), ("criterion after", after)]
    return numbers


def _rows(rescaling: Rescaling, layers: nx.DiGraph) -> Iterator[Row]:
    graph = rescaling.traced.graph
    members = torch.bincount(graph.group_of, minlength=graph.num_groups + 1)
    start = 0
    for node, data in layers.nodes(data=True):
        hidden = data["role"] == "hidden"
        count = data["size"] if hidden else 0
        own = slice(start, start + count)
        start += count
        groups = graph.group_of[own]
        free = groups[groups > 0]
        causes = torch.unique(graph.cause_of[own]).tolist()
        factors = None
        if len(free):
            z = (rescaling.log_scales.cpu()[free - 1] / math.log(2)).numpy()
            factors = tuple(np.quantile(z, [0, 0.25, 0.5, 0.75, 1]).tolist())
        yield Row(
            name=node,
            operation=data["operation"],
            role=data["role"],
            size=count,
            free=len(free),
            tied=int((members[free] > 1).sum()),
            mass=data.get("mass"),
            factors=factors,
            reasons=tuple(dict.fromkeys(graph.causes[cause].reason for cause in causes if cause >= 0)),
        )


def _axis(rows: Iterable[Row]) -> float:
    """The largest ``|log₂ λ|`` of all layers, the end of the axis on both sides."""
    return max((max(-row.factors[0], row.factors[-1]) for row in rows if row.factors), default=0.0) or 1.0


def _drawing(layers: nx.DiGraph) -> tuple[list[str], float]:
    """The edges as paths of SVG, and the width of the drawing: a straight line to the next row, an arc past others."""
    place = {node: index for index, node in enumerate(layers)}
    edges = sorted(((place[a], place[b]) for a, b in layers.edges), key=lambda edge: (edge[1] - edge[0], edge))
    arcs = [(a, b) for a, b in edges if b - a != 1]
    lane_of = _lanes(arcs)
    lanes = max(lane_of, default=-1) + 1
    step = LANE * min(1.0, MOST_LANES / max(lanes, 1))
    x = round(lanes * step + 8, 2)

    def y(index: int) -> float:
        return (index + 0.5) * ROW

    lines = [f"M{x} {y(a)}V{y(b)}" for a, b in edges if b - a == 1]
    for (a, b), lane in zip(arcs, lane_of, strict=True):
        left = round(x - (lane + 1) * step, 2)
        bend = ROW / 2
        lines.append(f"M{x} {y(a)}Q{left} {y(a)} {left} {y(a) + bend}V{y(b) - bend}Q{left} {y(b)} {x} {y(b)}")
    return lines, x + 8


def _lanes(arcs: Sequence[tuple[int, int]]) -> list[int]:
    """The first lane, from the right, in which no earlier arc overlaps."""
    taken: list[list[tuple[int, int]]] = []
    found = []
    for a, b in arcs:
        lane = next(
            lane
            for lane in itertools.count()
            if lane == len(taken) or all(b <= other[0] or a >= other[1] for other in taken[lane])
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append((a, b))
        found.append(lane)
    return found
