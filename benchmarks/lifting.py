"""What path quantities cost.

    python benchmarks/lifting.py            prints the figures and writes benchmarks/results/lifting.json

For a ResNet-50 at batch 1 and 224 x 224, in units of one float32 forward and backward pass of the model (path-norms: of
one forward pass); a product with the Gram matrix in float64 is given in float64 passes too. Growth: the slope of the
logarithm of the seconds of gram_diagonal, in float64, against that of the number of parameters, for multilayer
perceptrons from 1e5 to 1e8 parameters.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from resnet import resnet50

import dagpath
from dagpath.graph.explanation import table

from common import ratio, save, seconds_in_turn

_LIMITS = {
    "gram_diagonal, float32": 1.5,
    "gram_diagonal, float64": 8.0,
    "path_norm, float32": 1.5,
    "gram @ v, float32": 6.0,
    "gram @ v, float64, in float64 passes": 6.0,
}


def costs(rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = resnet50().eval()
    image = torch.randn(1, 3, 224, 224)
    traced = dagpath.trace(model, image)
    vector = torch.randn(traced.graph.num_parameters, dtype=torch.float64)
    operators = {dtype: dagpath.gram(traced, dtype) for dtype in (torch.float32, torch.float64)}

    wide, wide_image = copy.deepcopy(model).double(), image.double()

    def train_step() -> None:
        model.zero_grad()
        model(image).sum().backward()

    def wide_step() -> None:
        wide.zero_grad()
        wide(wide_image).sum().backward()

    def forward() -> None:
        with torch.no_grad():
            model(image)

    times = seconds_in_turn(
        {
            "pass": train_step,
            "float64 pass": wide_step,
            "forward": forward,
            "gram_diagonal, float32": lambda: dagpath.gram_diagonal(traced, dtype=torch.float32),
            "gram_diagonal, float64": lambda: dagpath.gram_diagonal(traced),
            "path_norm, float32": lambda: dagpath.path_norm(traced, dtype=torch.float32),
            "path_norm, float64": lambda: dagpath.path_norm(traced),
            "path_mass": lambda: dagpath.path_mass(traced),
            "gram @ v, float32": lambda: operators[torch.float32] @ vector,
            "gram @ v, float64": lambda: operators[torch.float64] @ vector,
        },
        rounds,
    )
    measured = [name for name in times if name not in ("pass", "float64 pass", "forward")]
    figures = {name: ratio(times, name, "forward" if name.startswith("path_norm") else "pass") for name in measured}
    figures["gram @ v, float64, in float64 passes"] = ratio(times, "gram @ v, float64", "float64 pass")
    return figures | {"pass, seconds": statistics.median(times["pass"])}


def growth(rounds: int) -> dict[str, float]:
    """Seconds of gram_diagonal by number of parameters, and the slope of their logarithms."""
    seconds: dict[str, float] = {}
    points = []
    for width in (180, 560, 1800, 5700):
        model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())))
        traced = dagpath.trace(model, torch.zeros(1, width))
        taken = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            dagpath.gram_diagonal(traced)
            taken.append(time.perf_counter() - start)
        size = traced.graph.num_parameters
        seconds[f"gram_diagonal, {size:,} parameters, seconds"] = statistics.median(taken[1:])
        points.append((math.log(size), math.log(statistics.median(taken[1:]))))
    x, y = zip(*points, strict=True)
    return seconds | {"slope of log seconds against log parameters": statistics.linear_regression(x, y).slope}


def main() -> None:
    figures = costs(rounds=9) | growth(rounds=3)
    rows = [(name, f"{value:,.4g}", f"{_LIMITS[name]:g}" if name in _LIMITS else "") for name, value in figures.items()]
    print(table(("figure", "value", "limit"), rows))
    save("lifting", "python benchmarks/lifting.py", figures)


if __name__ == "__main__":
    main()
