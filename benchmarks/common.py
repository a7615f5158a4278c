"""What the benchmarks share: timing in turn, the machine's description, result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dagpath

RESULTS = Path(__file__).parent / "results"


def seconds_in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times of several functions, called in turn so that a change of the machine's speed meets all of them.

    The first call of each is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, unit: str) -> float:
    """Median over the rounds of one function's time in units of another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[unit], strict=True))


def machine() -> dict[str, object]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter([]),
        platform.processor() or platform.machine(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dagpath": dagpath.__version__,
    }


def save(name: str, command: str, figures: dict[str, object], indent: int | None = 2) -> None:
    """Write a result file that says how it was made."""
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "machine": machine(), "figures": figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=indent) + "\n")
