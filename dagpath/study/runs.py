"""What the runs of a training study say: losses, epochs to a target, and tests of differences."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dagpath.graph.explanation import table

FACTS = ("task", "method", "lr", "seed", "epochs", "batch_size")
"""What tells one run from another."""
Setting = tuple[str, float]
"""A task and a learning rate."""


@dataclass(frozen=True)
class Difference:
    """Two methods with the same task, learning rate and seeds.

    Attributes:
        task: which task.
        lr: which learning rate.
        losses: median final training loss of each of the two.
        target: the loss that both are measured by: the median final loss of the second method, of two in the middle the
            higher, so that half of its runs get there.
        epochs: median number of epochs after which each is at the target; infinite where most runs never are, NaN where
            the target is infinite.
        faster: in how many seeds the first method is at the target earlier, and in how many later.
        lower: in how many seeds its final loss is lower, and in how many higher.
        p_value: two-sided, of Wilcoxon's signed-rank test on the final losses, paired by seed; NaN where no pair
            differs.

    Example:
        >>> from dagpath.study import TrainingStudy
        >>> facts = {"task": "digits", "lr": 0.1, "epochs": 2, "batch_size": 64, "error": None, "seconds": 1.0}
        >>> losses = {"baseline": [2.3, 1.0, 0.5], "path conditioning": [2.0, 0.5, 0.25]}
        >>> runs = [{**facts, "method": method, "seed": 0, "losses": curve} for method, curve in losses.items()]
        >>> difference = TrainingStudy(runs).compare()[0]
        >>> difference.losses, difference.target, difference.epochs, difference.lower
        ((0.25, 0.5), 0.5, (1.0, 2.0), (1, 0))
    """

    task: str
    lr: float
    losses: tuple[float, float]
    target: float
    epochs: tuple[float, float]
    faster: tuple[int, int]
    lower: tuple[int, int]
    p_value: float


@dataclass(frozen=True)
class TrainingStudy:
    """Runs of a training study; ``print`` shows the losses that each method ended with.

    Attributes:
        runs: one dictionary for each run, as in the file: task, method, lr, seed, epochs, batch_size, losses (one more
            than epochs, None once it diverged), error, seconds, versions.

    Example:
        >>> from dagpath.study import TrainingStudy
        >>> facts = {"task": "digits", "lr": 0.1, "epochs": 2, "batch_size": 64, "error": None, "seconds": 1.0}
        >>> losses = {"baseline": [2.3, 1.0, 0.5], "path conditioning": [2.0, 0.5, 0.25]}
        >>> runs = [{**facts, "method": method, "seed": 0, "losses": curve} for method, curve in losses.items()]
        >>> found = TrainingStudy(runs)
        >>> found.settings, found.methods
        ([('digits', 0.1)], ['baseline', 'path conditioning'])
        >>> target = found.target("digits", 0.1)
        >>> target, found.epochs_to(target, "digits", "path conditioning", 0.1)
        (0.5, {0: 1.0})
        >>> found.select(methods=["baseline"]).methods
        ['baseline']
    """

    runs: Sequence[Mapping[str, Any]]

    @property
    def settings(self) -> list[Setting]:
        """Tasks and learning rates, in order."""
        return list(dict.fromkeys((run["task"], run["lr"]) for run in self.runs))

    @property
    def methods(self) -> list[str]:
        """Methods, in order."""
        return list(dict.fromkeys(run["method"] for run in self.runs))

    def curves(self, task: str, method: str, lr: float) -> dict[int, np.ndarray]:
        """Seed -> the loss before the first epoch and after each, float64, infinite once it was not finite.

        Args:
            task, method, lr: which runs.

        Raises:
            ValueError: there is no such run, or a seed has several, which differ in epochs or batch size.
        """
        runs = [run for run in self.runs if (run["task"], run["method"], run["lr"]) == (task, method, lr)]
        where = f"of {method!r} on {task!r} with learning rate {lr:g}"
        if not runs:
            raise ValueError(f"there is no run {where}")
        found = {run["seed"]: run for run in runs}
        if len(found) < len(runs):
            kinds = sorted({(run["epochs"], run["batch_size"]) for run in runs})
            raise ValueError(
                f"a seed has several runs {where}: (epochs, batch size) are {', '.join(map(str, kinds))}; choose with "
                "select(epochs=..., batch_size=...)"
            )
        return {
            seed: np.array([math.inf if loss is None else loss for loss in run["losses"]], dtype=np.float64)
            for seed, run in found.items()
        }

    def final_losses(self, task: str, method: str, lr: float) -> dict[int, float]:
        """Seed -> the loss after the last epoch. Raises what :meth:`curves` does."""
        return {seed: float(curve[-1]) for seed, curve in self.curves(task, method, lr).items()}

    def epochs_to(self, target: float, task: str, method: str, lr: float) -> dict[int, float]:
        """Seed -> after how many epochs the loss is at most the target for the first time.

        Infinite for never, NaN for all seeds if the target is not finite: that of a reference that diverged.

        Args:
            target: a loss.
            task, method, lr: which runs.

        Raises:
            ValueError: as :meth:`curves`.
        """
        curves = self.curves(task, method, lr)
        if not math.isfinite(target):
            return dict.fromkeys(curves, math.nan)
        return {
            seed: float(np.argmax(curve <= target)) if bool((curve <= target).any()) else math.inf
            for seed, curve in curves.items()
        }

    def target(self, task: str, lr: float, reference: str = "baseline") -> float:
        """The median of a method's final losses; of two middle ones the higher, so that half of its runs get there."""
        return _target(list(self.final_losses(task, reference, lr).values()))

    def compare(self, method: str = "path conditioning", reference: str = "baseline") -> list[Difference]:
        """Each setting in which both methods were run with the same seeds, over the seeds that both have.

        Args:
            method: the one that is asked about.
            reference: the one that it is held against.

        Returns:
            A :class:`Difference` for each.

        Raises:
            ValueError: there is no run of one of the two methods.
        """
        for name in (method, reference):
            if name not in self.methods:
                raise ValueError(f"there is no run of {name!r}; there are {', '.join(map(repr, self.methods))}")
        found = []
        for task, lr in self.settings:
            if not all(self.has(task, name, lr) for name in (method, reference)):
                continue
            ours, theirs = (self.final_losses(task, name, lr) for name in (method, reference))
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds:
                continue
            a, b = (np.array([losses[seed] for seed in seeds]) for losses in (ours, theirs))
            target = _target(b)
            epochs = [self.epochs_to(target, task, name, lr) for name in (method, reference)]
            s, t = (np.array([reached[seed] for seed in seeds]) for reached in epochs)
            differences = np.subtract(a, b, out=np.zeros_like(a), where=a != b)  # two that diverged are a tie
            p_value = float(stats.wilcoxon(differences).pvalue) if differences.any() else math.nan
            found.append(
                Difference(
                    task,
                    lr,
                    (float(np.median(a)), float(np.median(b))),
                    target,
                    (float(np.median(s)), float(np.median(t))),
                    (int((s < t).sum()), int((s > t).sum())),
                    (int((a < b).sum()), int((a > b).sum())),
                    p_value,
                )
            )
        return found

    def comparison_table(self, method: str = "path conditioning", reference: str = "baseline") -> str:
        """:meth:`compare` as a table."""
        headings = ("task", "lr", f"loss, {method}", f"loss, {reference}", "epochs to target", "of reference")
        rows = [
            (
                found.task,
                f"{found.lr:g}",
                *(f"{loss:.3g}" for loss in found.losses),
                *(f"{epochs:g}" for epochs in found.epochs),
                "{} : {}".format(*found.lower),
                f"{found.p_value:.2g}",
            )
            for found in self.compare(method, reference)
        ]
        return table((*headings, "lower : higher", "p"), rows)

    def median_losses(self, task: str, method: str) -> dict[float, float]:
        """Learning rate -> the median of the final losses, over the seeds."""
        rates = (lr for name, lr in self.settings if name == task and self.has(task, method, lr))
        return {lr: float(np.median(list(self.final_losses(task, method, lr).values()))) for lr in rates}

    def best_table(self) -> str:
        """The lowest median final loss of each method, and the learning rate that it needs for that, by task."""
        rows = []
        for task in dict.fromkeys(name for name, _ in self.settings):
            cells = []
            for method in self.methods:
                medians = self.median_losses(task, method)
                best = min(medians, key=medians.__getitem__, default=None)
                cells.append("" if best is None else f"{medians[best]:.3g} at {best:g}")
            rows.append((task, *cells))
        return table(("best median loss", *self.methods), rows)

    def __str__(self) -> str:
        rows = []
        for task, lr in self.settings:
            medians = (self.median_losses(task, method) for method in self.methods)
            rows.append((task, f"{lr:g}", *(f"{found[lr]:.3g}" if lr in found else "" for found in medians)))
        return table(("median final loss", "lr", *self.methods), rows)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each run, with its facts, its final loss and its seconds.

        Args:
            path: the file, which is replaced if it exists.
        """
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*FACTS, "final loss", "seconds"])
            for run in self.runs:
                writer.writerow([*(run[name] for name in FACTS), run["losses"][-1], run["seconds"]])

    def select(
        self,
        methods: Iterable[str] | None = None,
        tasks: Iterable[str] | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
    ) -> TrainingStudy:
        """Only the runs of some methods, of some tasks, of so many epochs, or with that batch size.

        Args:
            methods, tasks, epochs, batch_size: what to keep; None for all.
        """
        one = {"epochs": epochs, "batch_size": batch_size}
        kept: dict[str, set[Any]] = {name: {value} for name, value in one.items() if value is not None}
        kept |= {name: set(some) for name, some in (("method", methods), ("task", tasks)) if some is not None}
        return TrainingStudy([run for run in self.runs if all(run[name] in values for name, values in kept.items())])

    def has(self, task: str, method: str, lr: float) -> bool:
        """Is there a run of the method in that setting?"""
        return any((run["task"], run["method"], run["lr"]) == (task, method, lr) for run in self.runs)


def _target(losses: Sequence[float] | np.ndarray) -> float:
    return float(np.quantile(losses, 0.5, method="higher"))
