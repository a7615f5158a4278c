"""What rescaling a ResNet-50 costs, and how much faster Newton's method is than coordinate descent.

    python benchmarks/rescale.py            prints the figures and writes benchmarks/results/rescale.json

All times are ratios within one run: of the whole ``rescale_`` to a float32 forward and backward pass at batch 1, and of
ten coordinate sweeps to a Newton solve of the same problem: of the published algorithm written plainly, and of
dagpath's own ``solver="coordinate"``. Memory is the peak of a fresh process above what it held
with the model built.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from resnet import resnet50
from solver import PlainCoordinateDescent

import dagpath
from dagpath.graph.explanation import table
from dagpath.study import mlp

from common import ratio, save, seconds_in_turn


def rescale_ratios(rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = resnet50().eval()
    fresh = [copy.deepcopy(model) for _ in range(rounds + 1)]
    image = torch.randn(1, 3, 224, 224)

    def train_step() -> None:
        model.zero_grad()
        model(image).sum().backward()

    stages: list[dict[str, float]] = []

    def rescale() -> None:
        stages.append(dict(dagpath.rescale_(fresh.pop(), image).stages))

    times = seconds_in_turn({"pass": train_step, "rescale": rescale}, rounds)
    unit = statistics.median(times["pass"])
    figures = {"rescale_ / pass": ratio(times, "rescale", "pass")}
    for stage in stages[-1]:
        figures[f"  {stage} / pass"] = statistics.median(found[stage] for found in stages[1:]) / unit
    figures["pass, seconds"] = unit
    return figures


def solver_ratio(rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    traced = dagpath.trace(mlp(784, 500, 500, 500, 500, 10), torch.zeros(1, 784))
    best = dagpath.balance(traced)
    plain, newton, own = [], [], []
    for _ in range(rounds):
        descent = PlainCoordinateDescent(traced)
        start = time.perf_counter()
        for _ in range(10):
            reached = descent.sweep()
        plain.append(time.perf_counter() - start)
        newton.append(dagpath.balance(traced).stages["solve"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged after ten sweeps
            swept = dagpath.balance(traced, solver="coordinate", max_iter=10)
        own.append(swept.stages["solve"])
    return {
        "plain coordinate descent, 10 sweeps / newton": median_ratio(plain, newton),
        "dagpath's coordinate solver, 10 sweeps / newton": median_ratio(own, newton),
        "newton, seconds": statistics.median(newton),
        "objective, newton": best.objective[1],
        "objective, plain coordinate descent": reached,
        "objective, dagpath's coordinate solver": swept.objective[1],
    }


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory() -> None:
    """In a fresh process: print the peak of ``rescale_`` above the model, in units of the parameters' bytes."""
    model = resnet50().eval()
    image = torch.randn(1, 3, 224, 224)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with torch.no_grad():
        model(image)
    before = resident_bytes()
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    dagpath.rescale_(model, image)
    done.set()
    watcher.join()
    print((peak - before) / size)


def main() -> None:
    if sys.argv[1:] == ["--memory"]:
        peak_memory()
        return
    figures: dict[str, object] = {**rescale_ratios(rounds=7), **solver_ratio(rounds=3)}
    found = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
    figures["peak memory / parameter bytes"] = float(found.stdout)
    print(table(("figure", "value"), [(name, f"{value:,.3f}") for name, value in figures.items()]))
    save("rescale", "python benchmarks/rescale.py", figures)


if __name__ == "__main__":
    main()
