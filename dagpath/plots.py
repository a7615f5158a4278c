"""Pictures of a traced model. Needs matplotlib: ``pip install 'dagpath[plots]'``.

Every function draws into ``ax``, or into a new figure, and returns the :class:`matplotlib.axes.Axes`, from which
``ax.figure.savefig("picture.png")`` writes a file. The colours are
those of Okabe and Ito, which the colour-blind can tell apart; what differs in colour also differs in shape or place.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import torch

from dagpath.apply.rescaling import Rescaling
from dagpath.lifting import gram, path_mass
from dagpath.lifting import path_length_profile as length_profile
from dagpath.lifting.operator import live_eigenvalues
from dagpath.trace import TracedModel, require_finite, require_traced

try:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("dagpath.plots needs matplotlib: pip install 'dagpath[plots]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["gram_spectrum", "layer_graph", "mass_per_layer", "path_length_profile", "scale_factors"]

BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999999"


def new_axes(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """``ax``, or the only one of a new figure of that size in inches."""
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def path_length_profile(traced: TracedModel, p: float | None = None, ax: Axes | None = None, **options: Any) -> Axes:
    """How many paths of each length there are (a logarithmic axis), or, with ``p``, the share of ``Σ |Φ|^p`` they have.

    Args:
        traced: the traced model.
        p: as in :func:`dagpath.path_length_profile`.
        ax: where to draw.
        **options: passed on to :meth:`matplotlib.axes.Axes.bar`.

    Returns:
        The axes.

    Raises:
        ValueError: p is below 1 or not finite.

    Cost: that of :func:`dagpath.path_length_profile`.

    Example:
        >>> import torch, dagpath, dagpath.plots
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> ax = dagpath.plots.path_length_profile(traced)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('parametrized layers on the path', 'number of paths, log10')
        >>> dagpath.plots.plt.close(ax.figure)
    """
    profile = length_profile(traced, p)
    ax = new_axes(ax)
    heights = [math.log10(value) if p is None else value for value in profile.values()]
    ax.bar(list(profile), heights, **{"color": BLUE, **options})
    ax.set_xlabel("parametrized layers on the path")
    ax.set_ylabel("number of paths, log10" if p is None else f"share of Σ |Φ|^{p:g}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def mass_per_layer(traced: TracedModel, p: float = 2, ax: Axes | None = None) -> Axes:
    """The share of ``Σ |Φ|^p`` that goes through each layer, one bar a layer, from the input down.

    Layers that every path crosses have all of it; in a residual network the blocks share what the skips leave.

    Args:
        traced: the traced model.
        p: as in :func:`dagpath.path_mass`.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: p is below 1 or not finite.

    Cost: one forward and one backward pass in float64 at batch 1.

    Example:
        >>> import torch, dagpath, dagpath.plots
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> ax = dagpath.plots.mass_per_layer(traced)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['0', '2']
        >>> dagpath.plots.plt.close(ax.figure)
    """
    graph = traced.graph
    shares = torch.zeros(len(graph.sites), dtype=torch.float64).index_add_(
        0, graph.maker_of, path_mass(traced, p).cpu()
    )
    names = [site.module or site.operation for site in graph.sites]
    ax = new_axes(ax, height=max(2.5, 0.18 * len(names)))
    ax.barh(range(len(names)), shares.numpy(), color=BLUE)
    _name_rows(ax, names)
    ax.set_xlabel(f"share of Σ |Φ|^{p:g} through the layer")
    return ax


def scale_factors(rescaling: Rescaling, ax: Axes | None = None) -> Axes:
    """The factors λ of the free neurons of each layer: a box from quartile to quartile, whiskers to the extremes.

    Args:
        rescaling: from :func:`dagpath.balance` or :func:`dagpath.rescale_`.
        ax: where to draw. The axis is logarithmic, in powers of two.

    Returns:
        The axes.

    Cost: quantiles of the factors.

    Example:
        >>> import torch, dagpath, dagpath.plots
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> ax = dagpath.plots.scale_factors(dagpath.rescale_(net, torch.zeros(1, 4)))
        >>> ax.get_xlabel()
        'log₂ of the factor λ'
        >>> dagpath.plots.plt.close(ax.figure)
    """
    rows = [(name, (z / math.log(2)).cpu().numpy()) for name, z in rescaling.layers()]
    ax = new_axes(ax, height=max(2.5, 0.18 * len(rows)))
    for row, (_, values) in enumerate(rows):
        low, first, median, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        ax.hlines(row, low, high, color=BLUE, linewidth=1)
        ax.barh(row, third - first, left=first, height=0.6, color=SKY, edgecolor=BLUE)
        ax.plot(median, row, marker="|", color=ORANGE, markersize=9, markeredgewidth=2)
    _name_rows(ax, [name for name, _ in rows])
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.set_xlabel("log₂ of the factor λ")
    return ax


def gram_spectrum(traced: TracedModel, rescaling: Rescaling | None = None, ax: Axes | None = None) -> Axes:
    """The eigenvalues of the path Gram matrix, largest first, and those after a rescaling that is not applied yet.

    Eigenvalues that are zero but for rounding (along rescalings, and in dead parameters) are left out. Both spectra are
    divided by their mean, since path conditioning leaves a common factor free.

    Args:
        traced: the traced model, with at most 20,000 parameters.
        rescaling: one of this model.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: the model is too large, a parameter is not finite, or the rescaling is of another trace.

    Cost: one pair of backward passes for every 64 parameters, and the eigenvalues of dense matrices.

    Example:
        >>> import torch, dagpath, dagpath.plots
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> ax = dagpath.plots.gram_spectrum(traced, dagpath.balance(traced))
        >>> [line.get_label().split(":")[0] for line in ax.get_lines()], len(ax.get_lines()[0].get_xdata())
        (['before', 'after'], 50)
        >>> dagpath.plots.plt.close(ax.figure)
    """
    require_traced(traced)
    if rescaling is not None and rescaling.traced.graph is not traced.graph:
        raise ValueError("the rescaling was found for another trace: pass rescaling.traced")
    require_finite(traced)
    dense = gram(traced).to_dense()
    spectra = [("before", dense, BLUE, "o")]
    if rescaling is not None:
        multipliers = rescaling.multipliers()
        shapes = traced.graph.shapes.items()
        d = torch.cat([multipliers[name].expand(shape).reshape(-1) for name, shape in shapes]).to(dense)
        spectra.append(("after", dense / d[:, None] / d[None, :], ORANGE, "^"))
    ax = new_axes(ax)
    for label, matrix, color, marker in spectra:
        live = live_eigenvalues(torch.linalg.eigvalsh(matrix).flip(0).cpu().numpy())
        condition = f"{live[0] / live[-1]:.1e}" if len(live) else "none"
        ax.plot(
            range(1, len(live) + 1),
            live / (live.mean() if len(live) else 1.0),
            color=color,
            marker=marker,
            markevery=max(1, len(live) // 12),
            label=f"{label}: condition number {condition}",
        )
    ax.set_yscale("log")
    ax.set_xlabel("eigenvalue, largest first")
    ax.set_ylabel("eigenvalue over the mean")
    ax.legend()
    return ax


def layer_graph(traced: TracedModel, ax: Axes | None = None) -> Axes:
    """The layers of a model and what they read, from the input at the left to the output at the right.

    Layers are circles, joins (residual sums) squares, inputs and outputs triangles, operations that no path crosses
    diamonds. For a figure that can be searched, write :meth:`dagpath.NeuronGraph.to_networkx` to a file instead.

    Args:
        traced: the traced model.
        ax: where to draw.

    Returns:
        The axes.

    Cost: a pass over the captured graph, in which what lies between layers is run on ones.

    Example:
        >>> import torch, dagpath, dagpath.plots
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> ax = dagpath.plots.layer_graph(traced)
        >>> sorted(text.get_text() for text in ax.texts if text.get_text())
        ['0', '2', 'input', 'output']
        >>> dagpath.plots.plt.close(ax.figure)
    """
    require_traced(traced)
    graph = traced.graph.to_networkx(level="layer")
    graph.remove_nodes_from([node for node, data in graph.nodes(data=True) if data["role"] == "constant"])
    columns = list(nx.topological_generations(graph))
    for column, nodes in enumerate(columns):
        for node in nodes:
            graph.nodes[node]["column"] = column
    places = nx.multipartite_layout(graph, subset_key="column")
    ax = new_axes(ax, width=max(6.4, 0.3 * len(columns)), height=4.0)
    styles = {
        "hidden": (BLUE, "o"),
        "join": (GREEN, "s"),
        "input": (ORANGE, ">"),
        "output": (ORANGE, "<"),
        "barrier": (GREY, "D"),
    }
    for role, (color, marker) in styles.items():
        nodes = [node for node, data in graph.nodes(data=True) if data["role"] == role]
        if nodes:
            nx.draw_networkx_nodes(graph, places, nodes, 60, color, marker, ax=ax, label=role)
    nx.draw_networkx_edges(graph, places, ax=ax, edge_color=GREY, arrowsize=6, connectionstyle="arc3,rad=0.1")
    if len(graph) <= 40:
        above = {node: (x, y + 0.04) for node, (x, y) in places.items()}
        nx.draw_networkx_labels(graph, above, font_size=6, ax=ax)
    ax.legend(loc="best", fontsize="small")
    ax.set_axis_off()
    return ax


def _name_rows(ax: Axes, names: list[str]) -> None:
    """Names down the side, the first on top; every second or third where there are too many to read."""
    step = max(1, math.ceil(len(names) / 80))
    rows = list(itertools.islice(enumerate(names), 0, None, step))
    ax.set_yticks([row for row, _ in rows], [name for _, name in rows], fontsize=7)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
