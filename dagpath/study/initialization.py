"""Path conditioning at initialization: its prediction beside networks that are drawn."""

from __future__ import annotations

import csv
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dagpath.graph.explanation import table
from dagpath.study.prediction import Effect, predict
from dagpath.study.schemes import checked_scheme, initialize_
from dagpath.trace import trace

FIGURES: dict[str, Callable[[Effect], float]] = {
    "spread": lambda effect: effect.spread,
    "drop": lambda effect: effect.drop,
    "condition before": lambda effect: effect.condition[0],
    "condition after": lambda effect: effect.condition[1],
}
"""What is compared: standard deviation of log λ, fall of the criterion per live parameter, and the largest entry of the
live Gram diagonal over the smallest."""


@dataclass(frozen=True)
class Comparison:
    """One architecture, scheme and gain: what was predicted, and what was found in networks that were drawn.

    Attributes:
        architecture: its name.
        scheme: how weights are drawn.
        gain: factor of the weights.
        predicted: the :class:`Effect` that :func:`predict` gives.
        sampled: the effect on each network that was drawn.

    Example:
        >>> import torch
        >>> from dagpath import study
        >>> builds = {"narrowing": (lambda: study.mlp(16, 8, 4), torch.zeros(1, 16))}
        >>> row = study.initialization(builds, gains=[1.0], seeds=2, progress=False).rows[0]
        >>> row.architecture, len(row.sampled), list(row.sampled_layers)
        ('narrowing', 2, ['0'])
    """

    architecture: str
    scheme: str
    gain: float
    predicted: Effect
    sampled: list[Effect]

    @property
    def sampled_layers(self) -> dict[str, list[float]]:
        """Name of a layer -> its mean log λ (natural logarithm) in each sample."""
        return {name: [effect.layers[name] for effect in self.sampled] for name in self.predicted.layers}

    @property
    def error(self) -> float:
        """The largest difference, over the layers, of the predicted mean log λ and its mean over the samples."""
        means = {name: statistics.fmean(values) for name, values in self.sampled_layers.items()}
        return max((abs(means[name] - value) for name, value in self.predicted.layers.items()), default=0.0)

    def record(self) -> dict[str, float | str]:
        """All of it as one row, with the prediction of each figure, and mean and standard deviation of the samples."""
        row: dict[str, float | str] = {"architecture": self.architecture, "scheme": self.scheme, "gain": self.gain}
        for name, figure in FIGURES.items():
            values = [figure(effect) for effect in self.sampled]
            row[f"{name}, predicted"] = figure(self.predicted)
            row[f"{name}, mean"] = statistics.fmean(values)
            row[f"{name}, std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        return {**row, "error of log λ": self.error, "samples": len(self.sampled)}


@dataclass(frozen=True)
class InitializationStudy:
    """What :func:`dagpath.study.initialization` found; ``print`` shows it, and :mod:`dagpath.study.figures` draws it.

    Attributes:
        rows: one :class:`Comparison` for each architecture, scheme and gain.

    Example:
        >>> import torch
        >>> from dagpath import study
        >>> builds = {"narrowing": (lambda: study.mlp(16, 8, 4), torch.zeros(1, 16))}
        >>> found = study.initialization(builds, gains=[0.5, 1.0], seeds=2, progress=False)
        >>> [(row.architecture, row.gain) for row in found.rows]
        [('narrowing', 0.5), ('narrowing', 1.0)]
        >>> study.InitializationStudy.from_dict(found.to_dict()).rows[0].error == found.rows[0].error
        True
    """

    rows: list[Comparison]

    def __str__(self) -> str:
        names = ("std of log λ", "drop of F / p", "max / min diag(G)", "after")
        headings = (
            "architecture",
            "scheme",
            "gain",
            *(f"{name}{part}" for name in names for part in ("", ", sampled")),
        )
        cells = []
        for row in self.rows:
            record = row.record()
            pairs = (f"{record[f'{name}, {part}']:.3g}" for name in FIGURES for part in ("predicted", "mean"))
            cells.append((row.architecture, row.scheme, f"{row.gain:g}", *pairs, f"{row.error:.3f}"))
        return table((*headings, "error of log λ"), cells)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the records of all rows as a table with a heading.

        Args:
            path: the file, which is replaced if it exists.
        """
        records = [row.record() for row in self.rows]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]) if records else [])
            writer.writeheader()
            writer.writerows(records)

    def to_dict(self) -> list[dict[str, Any]]:
        """All figures, layer by layer, as what JSON can hold; the factors of single neurons are left out."""

        def plain(effect: Effect) -> dict[str, Any]:
            return {name: getattr(effect, name) for name in ("layers", "spread", "drop", "condition")}

        return [
            {
                **{name: getattr(row, name) for name in ("architecture", "scheme", "gain")},
                "predicted": plain(row.predicted),
                "sampled": [plain(effect) for effect in row.sampled],
            }
            for row in self.rows
        ]

    @staticmethod
    def from_dict(rows: Iterable[Mapping[str, Any]]) -> InitializationStudy:
        """The inverse of :meth:`to_dict`, but for the factors of single neurons.

        Args:
            rows: what :meth:`to_dict` returned, perhaps by way of JSON.
        """

        def effect(values: Mapping[str, Any]) -> Effect:
            return Effect(**{**values, "condition": tuple(values["condition"])})

        return InitializationStudy(
            [
                Comparison(
                    **{**row, "predicted": effect(row["predicted"]), "sampled": [effect(one) for one in row["sampled"]]}
                )
                for row in rows
            ]
        )


def initialization(
    builds: Mapping[str, tuple[Callable[[], nn.Module], Any]],
    gains: Iterable[float] = (0.5, 1.0, 2.0),
    seeds: int | Iterable[int] = 20,
    schemes: Iterable[str] = ("default",),
    bound: float | None = None,
    progress: bool = True,
) -> InitializationStudy:
    """Compare the prediction of path conditioning with networks that are drawn.

    Args:
        builds: name of an architecture -> what makes the model, and example inputs as for :func:`dagpath.trace`.
        gains: factors of the weights.
        seeds: of the networks that are drawn for each architecture, scheme and gain, or how many. What the scheme does
            not draw is drawn by the model itself, from the seed as well; the prediction has that of the first.
        schemes, bound: as for :func:`predict`. Factors at the bound can only vary to one side of the prediction.
        progress: show a progress bar.

    Returns:
        An :class:`InitializationStudy`; ``print`` shows it.

    Raises:
        ValueError: nothing to compare, an unknown scheme, or a gain that is not positive and finite.

    Cost: for each architecture, scheme, gain and seed a trace, a forward and a backward pass in float64, and a solve.

    Example:
        >>> import torch
        >>> from dagpath import study
        >>> builds = {"narrowing": (lambda: study.mlp(64, 128, 64, 10), torch.zeros(1, 64))}
        >>> found = study.initialization(builds, gains=[1.0], seeds=5, progress=False)
        >>> found.rows[0].error < 0.1
        True
    """
    gains, schemes = list(gains), list(schemes)
    seeds = list(range(seeds) if isinstance(seeds, int) else seeds)
    if not (builds and gains and seeds and schemes):
        raise ValueError("there is nothing to compare: builds, gains, seeds and schemes must not be empty")
    for scheme, gain in itertools.product(schemes, gains):
        checked_scheme(scheme, gain)
    cases = list(itertools.product(builds, schemes, gains))
    rows = []
    with tqdm(total=len(cases) * (1 + len(seeds)), desc="networks", disable=not progress) as bar:
        for architecture, scheme, gain in cases:
            build, example_inputs = builds[architecture]
            predicted = predict(partial(_built, build, seeds[0]), example_inputs, scheme, gain, bound=bound)
            bar.update()
            sampled = []
            for seed in seeds:
                model = initialize_(_built(build, seed), scheme, gain, seed)
                sampled.append(Effect.on(trace(model, example_inputs), bound))
                bar.update()
            rows.append(Comparison(architecture, scheme, gain, predicted, sampled))
    return InitializationStudy(rows)


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(~seed)  # initialize_ draws from the seed itself: the same numbers would be correlated
        return build()
