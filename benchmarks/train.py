"""Training in path space against SGD: final losses on real images, and what a step costs.

    python benchmarks/train.py            prints two tables and writes benchmarks/results/train.json

Losses: the 1,797 digits of scikit-learn (8 x 8), a multilayer perceptron and a small convolutional network, each method
with its best learning rate of a grid of factors of two, over five seeds, on all cores. Costs: training steps of a
convolutional network of 2 M parameters at batch 128, in units of a step of SGD.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm.auto import tqdm

import dagpath
from dagpath.graph.explanation import table
from dagpath.optim import GSGD, PathSGD, Rebalance

from common import ratio, save, seconds_in_turn

EPOCHS = 20
BATCH = 64
SEEDS = range(5)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 60), nn.ReLU(), nn.Linear(60, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )


NETWORKS = {"MLP": perceptron, "CNN": convolutional}
METHODS: dict[str, tuple[Callable[[nn.Module, float], Optimizer], range]] = {
    "SGD": (lambda model, lr: SGD(model.parameters(), lr), range(-6, 2)),
    "GSGD, heaviest": (lambda model, lr: GSGD(traced(model), lr), range(-20, -9)),
    "GSGD, 1": (lambda model, lr: GSGD(traced(model), lr, skeleton="ones"), range(-8, 0)),
    "GSGD, 0.5": (lambda model, lr: GSGD(traced(model), lr, skeleton=0.5), range(-11, -2)),
    "SGD from the start of GSGD, 1": (lambda model, lr: from_start(model, 1.0, lr), range(-7, 0)),
    "SGD from the start of GSGD, 0.5": (lambda model, lr: from_start(model, 0.5, lr), range(-6, 2)),
    "PathSGD, every 10": (lambda model, lr: PathSGD(traced(model), lr, every=10), range(-11, -1)),
}
"""How each is made from a model and a learning rate, and the exponents of two of its grid."""


def traced(model: nn.Module) -> dagpath.TracedModel:
    return dagpath.trace(model, torch.zeros(1, 1, 8, 8))


def from_start(model: nn.Module, skeleton: float, lr: float) -> Optimizer:
    """SGD, with the elements of the skeleton set as GSGD sets them."""
    GSGD(traced(model), 0.0, skeleton=skeleton)
    return SGD(model.parameters(), lr)


def final_loss(build: Callable[[], nn.Module], method: str, lr: float, seed: int, data: tuple[Tensor, Tensor]) -> float:
    """The training loss over all images after the last epoch; infinite where it diverged."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build()
    optimizer = METHODS[method][0](model, lr)
    images, labels = data
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if not math.isfinite(loss.item()):
                return math.inf
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = F.cross_entropy(model(images), labels).item()
    return found if math.isfinite(found) else math.inf


def compare() -> dict[str, dict[str, object]]:
    """For each network and method, its best learning rate, all losses with it, and the median loss with each other."""
    digits = load_digits()
    data = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    found: dict[str, dict[str, object]] = {}
    rates = [
        (name, method, 2.0**exponent) for name in NETWORKS for method in METHODS for exponent in METHODS[method][1]
    ]
    runs = [(name, method, lr, seed) for name, method, lr in rates for seed in SEEDS]
    jobs = [delayed(final_loss)(NETWORKS[name], method, lr, seed, data) for name, method, lr, seed in runs]
    losses = Parallel(n_jobs=-1, return_as="generator")(jobs)
    tried: dict[tuple[str, str], dict[float, list[float]]] = {}
    for (name, method, lr, _), loss in zip(runs, tqdm(losses, desc="training", total=len(runs)), strict=True):
        tried.setdefault((name, method), {}).setdefault(lr, []).append(loss)
    for (name, method), by_rate in tried.items():
        medians = {lr: statistics.median(losses) for lr, losses in by_rate.items()}
        best = min(medians, key=medians.__getitem__)
        found[f"{name}, {method}"] = {
            "learning rate": best,
            "losses": by_rate[best],
            "medians": {f"{lr:g}": median for lr, median in medians.items()},
        }
    return found


def costs(rounds: int) -> dict[str, float]:
    """Steps, forward and backward pass included, in units of a step of SGD; means over what happens every so often."""
    torch.manual_seed(0)
    layers, channels = [], 1
    for width in (32, 64, 128, 128, 256, 256, 320):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if width == 64 else [])]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    images, labels = torch.randn(128, 1, 16, 16), torch.randint(10, (128,))
    graph = dagpath.trace(model, images[:1])
    sgd, with_momentum = SGD(model.parameters(), 0.0), SGD(model.parameters(), 0.0, momentum=0.9)
    gsgd, measuring, not_measuring = GSGD(graph, 0.0), PathSGD(graph, 0.0), PathSGD(graph, 0.0, every=10**6)
    rebalance = Rebalance(graph, with_momentum, every=1)

    def step(optimizer: Optimizer) -> Callable[[], object]:
        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return run

    times = seconds_in_turn(
        {
            "SGD": step(sgd),
            "GSGD": step(gsgd),
            "choosing the skeleton": gsgd.choose_skeleton,
            "PathSGD, measuring": step(measuring),
            "PathSGD": step(not_measuring),
            "Rebalance": step(with_momentum),
        },
        rounds,
    )
    rebalance.remove()
    once = {name: ratio(times, name, "SGD") for name in times}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "GSGD": once["GSGD"] + once["choosing the skeleton"] / 100,
        "PathSGD, every 10": once["PathSGD"] + (once["PathSGD, measuring"] - once["PathSGD"]) / 10,
        "Rebalance, every 100": 1 + (once["Rebalance"] - 1) / 100,
        "SGD, seconds": statistics.median(times["SGD"]),
    }


def main() -> None:
    compared, spent = compare(), costs(rounds=7)
    rows = []
    for name, result in compared.items():
        losses = sorted(result["losses"])
        spread = (statistics.median(losses), losses[0], losses[-1])
        rows.append((name, f"{result['learning rate']:.2g}", *(f"{loss:.2e}" for loss in spread)))
    print(table(("network and method", "best rate", "median loss", "smallest", "largest"), rows))
    print(table(("step", "value"), [(name, f"{value:,.4g}") for name, value in spent.items()]))
    save("train", "python benchmarks/train.py", {"losses": compared, "steps of SGD": spent})


if __name__ == "__main__":
    main()
