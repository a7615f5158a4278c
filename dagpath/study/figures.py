"""Pictures of studies. Needs matplotlib: ``pip install 'dagpath[study]'``.

Every function draws into ``ax``, or into a new figure, and returns the :class:`matplotlib.axes.Axes`. What differs in
colour also differs in the kind of line or in its mark.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.transforms import ScaledTranslation

from dagpath.plots import BLUE, GREEN, GREY, ORANGE, SKY, new_axes
from dagpath.study.initialization import FIGURES, InitializationStudy
from dagpath.study.runs import TrainingStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["epochs_to_target", "heat_map", "loss_curves", "prediction_against_samples"]

_STYLES = [
    (GREY, "-", "o"),
    (BLUE, "-", "s"),
    (SKY, "--", "^"),
    (GREEN, "-.", "D"),
    (ORANGE, ":", "v"),
    ("#CC79A7", "--", "P"),
    ("#E69F00", "-.", "X"),
]


def loss_curves(study: TrainingStudy, task: str, lr: float, ax: Axes | None = None) -> Axes:
    """The training loss after each epoch, one line for each method: the median over the seeds, and quartiles.

    Of an even number of seeds the median is the mean of the two middle losses; the quartiles are those of the nearest
    seeds.

    Args:
        study: the runs.
        task, lr: which of them.
        ax: where to draw; the loss is on a logarithmic axis.

    Returns:
        The axes.

    Raises:
        ValueError: there is no such run, or more than seven methods.

    Example:
        >>> from dagpath.plots import plt
        >>> from dagpath.study import TrainingStudy, figures
        >>> facts = {"task": "digits", "lr": 0.1, "epochs": 2, "batch_size": 64, "error": None, "seconds": 1.0}
        >>> losses = {"baseline": [2.3, 1.0, 0.5], "path conditioning": [2.0, 0.5, 0.25]}
        >>> runs = [{**facts, "method": method, "seed": 0, "losses": curve} for method, curve in losses.items()]
        >>> ax = figures.loss_curves(TrainingStudy(runs), "digits", 0.1)
        >>> ax.get_title(), [line.get_label() for line in ax.get_lines()]
        ('digits, learning rate 0.1', ['baseline', 'path conditioning'])
        >>> plt.close(ax.figure)
    """
    drawn = _styles([method for method in study.methods if study.has(task, method, lr)])
    if not drawn:
        raise ValueError(f"there is no run on {task!r} with learning rate {lr:g}")
    ax = new_axes(ax)
    for method, (color, line, mark) in drawn.items():
        curves = np.stack(list(study.curves(task, method, lr).values()))
        low, high = map(_finite, np.quantile(curves, (0.25, 0.75), axis=0, method="nearest"))
        median = _finite(np.median(curves, axis=0))
        epochs = np.arange(len(median))
        ax.plot(
            epochs, median, color=color, linestyle=line, marker=mark, markevery=max(1, len(epochs) // 8), label=method
        )
        ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss")
    ax.set_title(f"{task}, learning rate {lr:g}")
    _legend(ax)
    return ax


def _legend(ax: Axes) -> None:
    """Below the label of the x-axis, where it covers no line."""
    below = ax.transAxes + ScaledTranslation(0, -34 / 72, ax.figure.dpi_scale_trans)  # inches
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=3, frameon=False)


def _styles(names: list[str]) -> dict[str, tuple[str, str, str]]:
    if len(names) > len(_STYLES):
        raise ValueError(f"a figure tells {len(_STYLES)} methods apart, got {len(names)}; choose some with select()")
    return dict(zip(names, _STYLES, strict=False))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def epochs_to_target(study: TrainingStudy, task: str, reference: str = "baseline", ax: Axes | None = None) -> Axes:
    """After how many epochs each method has the loss that the reference ends with, by learning rate; medians.

    A method of which most runs never are there has a mark above the axis. There is none where it was not run, or where
    most runs of the reference diverged.

    Args:
        study: the runs.
        task: which of them.
        reference: the method whose median final loss is the target, for each learning rate by itself.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: there is no run of the reference on the task, or more than seven methods.

    Example:
        >>> from dagpath.plots import plt
        >>> from dagpath.study import TrainingStudy, figures
        >>> facts = {"task": "digits", "lr": 0.1, "epochs": 2, "batch_size": 64, "error": None, "seconds": 1.0}
        >>> losses = {"baseline": [2.3, 1.0, 0.5], "path conditioning": [2.0, 0.5, 0.25]}
        >>> runs = [{**facts, "method": method, "seed": 0, "losses": curve} for method, curve in losses.items()]
        >>> ax = figures.epochs_to_target(TrainingStudy(runs), "digits")
        >>> ax.get_ylabel(), ax.get_lines()[1].get_ydata().tolist()  # path conditioning is there after one epoch
        ('epochs to the final loss of baseline', [1.0])
        >>> plt.close(ax.figure)
    """
    rates = sorted(lr for name, lr in study.settings if name == task and study.has(task, reference, lr))
    if not rates:
        raise ValueError(f"there is no run of {reference!r} on {task!r}")
    styles = _styles(study.methods)
    ax = new_axes(ax)
    never = 1.08 * max(run["epochs"] for run in study.runs if run["task"] == task)
    for index, (method, (color, line, mark)) in enumerate(styles.items()):
        places, heights = [], []
        for place, lr in enumerate(rates):
            if not study.has(task, method, lr):
                continue
            target = study.target(task, lr, reference)
            reached = statistics.median(study.epochs_to(target, task, method, lr).values())
            places.append(place + 0.06 * (index - len(study.methods) / 2))
            heights.append(never if reached == math.inf else reached)
        ax.plot(places, heights, color=color, linestyle=line, marker=mark, linewidth=0.8, label=method)
    ax.axhline(never, color=GREY, linewidth=0.6, zorder=0)
    ax.annotate("never", (0.01, never), xycoords=("axes fraction", "data"), fontsize="small", va="bottom")
    ax.set_ylim(top=1.08 * never)
    ax.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    ax.set_xlabel("learning rate")
    ax.set_ylabel(f"epochs to the final loss of {reference}")
    ax.set_title(task)
    _legend(ax)
    return ax


def heat_map(study: InitializationStudy, scheme: str, figure: str = "spread", ax: Axes | None = None) -> Axes:
    """What path conditioning is predicted to do, by architecture and gain, with the mean over the samples below it.

    Args:
        study: from :func:`dagpath.study.initialization`.
        scheme: which of its schemes.
        figure: ``"spread"``, ``"drop"``, ``"condition before"`` or ``"condition after"``, as in
            :class:`dagpath.study.Effect`.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: the study has no such scheme, or there is no such figure.

    Example:
        >>> import torch
        >>> from dagpath import study
        >>> from dagpath.plots import plt
        >>> builds = {"narrowing": (lambda: study.mlp(16, 8, 4), torch.zeros(1, 16))}
        >>> found = study.initialization(builds, gains=[0.5, 1.0], seeds=2, progress=False)
        >>> ax = study.figures.heat_map(found, "default")
        >>> ax.get_xlabel(), [label.get_text() for label in ax.get_xticklabels()]
        ('gain', ['0.5', '1'])
        >>> plt.close(ax.figure)
    """
    rows = {(row.architecture, row.gain): row.record() for row in study.rows if row.scheme == scheme}
    if not rows:
        raise ValueError(f"the study has no scheme {scheme!r}")
    if figure not in FIGURES:
        raise ValueError(f"figure must be one of {', '.join(map(repr, FIGURES))}, got {figure!r}")
    names, gains = list(dict.fromkeys(name for name, _ in rows)), list(dict.fromkeys(gain for _, gain in rows))
    values = np.array([[float(rows[name, gain][f"{figure}, predicted"]) for gain in gains] for name in names])
    ax = new_axes(ax, height=1.4 + 0.6 * len(names))
    norm = PowerNorm(0.3, float(values.min()), float(values.max()))
    image = ax.imshow(values, cmap="cividis", aspect="auto", norm=norm)
    dark = np.asarray(norm(values)) < 0.5
    for row, name in enumerate(names):
        for column, gain in enumerate(gains):
            both = (float(rows[name, gain][f"{figure}, {part}"]) for part in ("predicted", "mean"))
            text = "\n".join(f"{value:.2g}" for value in both)
            color = "white" if dark[row, column] else "black"
            ax.text(column, row, text, ha="center", va="center", color=color, fontsize="large")
    bar = ax.figure.colorbar(image, ax=ax, label=f"{figure}, predicted", aspect=30, pad=0.02)
    ticks = np.asarray(norm.inverse(np.linspace(0, 1, 5)))
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks])
    ax.set_xticks(range(len(gains)), [f"{gain:g}" for gain in gains])
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("gain")
    ax.set_title(f"{figure}, {scheme} initialization\npredicted, and sampled below")
    return ax


def prediction_against_samples(study: InitializationStudy, ax: Axes | None = None) -> Axes:
    """The mean log λ of each layer: its prediction against its mean over the samples, with their standard deviation.

    Args:
        study: from :func:`dagpath.study.initialization`.
        ax: where to draw.

    Returns:
        The axes; logarithms are natural.

    Example:
        >>> import torch
        >>> from dagpath import study
        >>> from dagpath.plots import plt
        >>> builds = {"narrowing": (lambda: study.mlp(16, 8, 4), torch.zeros(1, 16))}
        >>> found = study.initialization(builds, gains=[1.0], seeds=2, progress=False)
        >>> ax = study.figures.prediction_against_samples(found)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('predicted mean log λ of a layer', 'sampled')
        >>> plt.close(ax.figure)
    """
    ax = new_axes(ax, height=5.0)
    schemes = list(dict.fromkeys(row.scheme for row in study.rows))
    ends: list[float] = [0.0]
    for scheme, (color, _, mark) in zip(schemes, _STYLES, strict=False):
        points = [
            (row.predicted.layers[name], statistics.fmean(values), statistics.pstdev(values))
            for row in study.rows
            if row.scheme == scheme
            for name, values in row.sampled_layers.items()
        ]
        x, y, bars = np.array(points).reshape(-1, 3).T  # a network without free neurons has none
        ax.errorbar(x, y, yerr=bars, color=color, marker=mark, linestyle="", markersize=4, elinewidth=0.8, label=scheme)
        ends += [*x, *y]
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linewidth=0.8, zorder=0)
    ax.set_xlabel("predicted mean log λ of a layer")
    ax.set_ylabel("sampled")
    ax.legend()
    return ax
