"""The studies of the documentation: path conditioning at initialization, and its effect on training.

    python benchmarks/study.py            runs what is missing and prints the tables

Writes benchmarks/results/study_initialization.json, and a line for each training to
benchmarks/results/study_training.jsonl; when interrupted, it goes on there the next time. An hour on two cores.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dagpath import study
from dagpath.graph.explanation import table

from common import RESULTS, save

RUNS = RESULTS / "study_training.jsonl"
PERCEPTRONS = ("MLP, constant width", "MLP, narrowing", "autoencoder")
IMAGES = ("CNN on digits", "CNN on patches")
LEARNING_RATES = (0.01, 0.05, 0.2, 0.5)
ARCHITECTURES = {  # with their widths, the outputs last; the convolutional ones read 3 channels
    "MLP 64-64-64-64-64": (lambda: study.mlp(64, 64, 64, 64, 64), torch.zeros(1, 64)),
    "MLP 64-256-128-64-10": (lambda: study.mlp(64, 256, 128, 64, 10), torch.zeros(1, 64)),
    "MLP 64-256-128-64-64": (lambda: study.mlp(64, 256, 128, 64, 64), torch.zeros(1, 64)),
    "MLP 256-64-256-64-256": (lambda: study.mlp(256, 64, 256, 64, 256), torch.zeros(1, 256)),
    "CNN 64-64-64-64-64": (lambda: study.cnn(3, 64, 64, 64, 64, classes=64), torch.zeros(1, 3, 16, 16)),
    "CNN 64-128-64-96-64": (lambda: study.cnn(3, 64, 128, 64, 96, classes=64), torch.zeros(1, 3, 16, 16)),
}


def at_start() -> list[dict[str, object]]:
    """The norm of the gradient and the largest eigenvalue of the Hessian before the first step: medians over seeds."""
    rows = []
    for name, task in study.TASKS.items():
        inputs, targets = task.data()
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:400]
        for method in ("baseline", "ten sweeps", "path conditioning"):
            found = []
            for seed in range(10):
                torch.manual_seed(seed)
                model, _ = study.METHODS[method](task.build(), inputs[:1], 0.1)
                found.append(gradient_and_sharpness(model, task.loss(model(inputs[chosen]), targets[chosen])))
            norms, eigenvalues = zip(*found, strict=True)
            medians = {"gradient": statistics.median(norms), "sharpness": statistics.median(eigenvalues)}
            rows.append({"task": name, "method": method, **medians})
    return rows


def gradient_and_sharpness(model: torch.nn.Module, loss: torch.Tensor) -> tuple[float, float]:
    """The norm of a loss's gradient, and the eigenvalue of its Hessian of largest magnitude by 30 power iterations."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    vector, eigenvalue = [torch.randn_like(parameter) for parameter in parameters], 0.0
    for _ in range(30):
        norm = torch.sqrt(sum(part.square().sum() for part in vector))
        vector = [part / norm for part in vector]
        along = sum((a * b).sum() for a, b in zip(gradient, vector, strict=True))
        image = torch.autograd.grad(along, parameters, retain_graph=True)
        eigenvalue = float(sum((a * b).sum() for a, b in zip(image, vector, strict=True)))
        vector = list(image)
    return float(torch.sqrt(sum(part.detach().square().sum() for part in gradient))), eigenvalue


def training() -> study.TrainingStudy:
    study.train(RUNS, PERCEPTRONS, study.METHODS, LEARNING_RATES, seeds=10, epochs=30)
    study.train(RUNS, IMAGES, study.METHODS, LEARNING_RATES, seeds=6, epochs=15)
    return study.load(RUNS)


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    found = training()
    print(found, "\n")
    print(found.best_table(), "\n")
    print(found.comparison_table(), "\n")
    print(found.comparison_table(reference="ten sweeps"), "\n")
    started = at_start()
    print(table(tuple(started[0]), [tuple(map(str, row.values())) for row in started]))
    drawn = study.initialization(ARCHITECTURES, (0.25, 0.5, 1.0, 2.0, 4.0), 20, study.SCHEMES, bound=100.0)
    print(drawn)
    figures = rounded({"rows": drawn.to_dict(), "at start": started})
    save("study_initialization", "python benchmarks/study.py", figures, indent=None)


def rounded(value: Any) -> Any:
    """All numbers in lists and dictionaries to five digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
