"""The studies of the documentation: path conditioning at initialization, and its effect on training.

    python benchmarks/study.py            runs what is missing and prints the tables

Writes benchmarks/results/study_initialization.json, and a line for each training to
benchmarks/results/study_training.jsonl; when interrupted, it goes on there the next time. An hour on two cores.
"""

from __future__ import annotations

import torch

from dagpath import study

from common import RESULTS, save

RUNS = RESULTS / "study_training.jsonl"
PERCEPTRONS = ("MLP, constant width", "MLP, narrowing", "autoencoder")
IMAGES = ("CNN on digits", "CNN on patches")
LEARNING_RATES = (0.01, 0.05, 0.2, 0.5)
ARCHITECTURES = {
    "MLP 64-64-64-64-64": (lambda: study.mlp(64, 64, 64, 64, 64), torch.zeros(1, 64)),
    "MLP 64-256-128-64-10": (lambda: study.mlp(64, 256, 128, 64, 10), torch.zeros(1, 64)),
    "MLP 256-64-256-64-256": (lambda: study.mlp(256, 64, 256, 64, 256), torch.zeros(1, 256)),
    "CNN 64-64-64-64": (lambda: study.cnn(3, 64, 64, 64, 64), torch.zeros(1, 3, 16, 16)),
    "CNN 64-128-64-96": (lambda: study.cnn(3, 64, 128, 64, 96), torch.zeros(1, 3, 16, 16)),
}


def training() -> study.TrainingStudy:
    study.train(RUNS, PERCEPTRONS, study.METHODS, LEARNING_RATES, seeds=10, epochs=30)
    study.train(RUNS, IMAGES, study.METHODS, LEARNING_RATES, seeds=6, epochs=15)
    return study.load(RUNS)


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    found = training()
    print(found, "\n")
    print(found.comparison_table(), "\n")
    print(found.comparison_table(reference="ten sweeps"), "\n")
    drawn = study.initialization(ARCHITECTURES, (0.25, 0.5, 1.0, 2.0, 4.0), 20, study.SCHEMES)
    print(drawn)
    save("study_initialization", "python benchmarks/study.py", {"rows": drawn.to_dict()})


if __name__ == "__main__":
    main()
