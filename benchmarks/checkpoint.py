"""Rescale checkpoints of several files: memory above the start, in units of the largest file.

python benchmarks/checkpoint.py      prints a table and writes benchmarks/results/checkpoint.json

Each checkpoint is rescaled in a process of its own, which starts with a model without values; and once more in one that
returns the memory of every tensor at once. By itself, glibc keeps that of tensors of up to 32 MiB for the next ones.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dagpath
from dagpath.graph.explanation import table

from common import save


class Block(nn.Module):
    """The feed-forward half of a transformer block, with a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def perceptron() -> nn.Module:
    layers = ([nn.Linear(3000, 3000), nn.ReLU()] for _ in range(10))
    return nn.Sequential(*itertools.chain.from_iterable(layers))[:-1]


def blocks() -> nn.Module:
    return nn.Sequential(*(Block(768) for _ in range(12)))


def convolutions() -> nn.Module:
    layers = ([nn.Conv2d(512, 512, 3, padding=1), nn.ReLU()] for _ in range(10))
    return nn.Sequential(*itertools.chain.from_iterable(layers))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "10 linear layers of 3000, 4 layers a file": (perceptron, (1, 3000), 8),
    "10 linear layers of 3000, 1 layer a file": (perceptron, (1, 3000), 2),
    "12 ReLU transformer blocks of 768, 4 blocks a file": (blocks, (1, 5, 768), 24),
    "10 convolutions of 512 channels, 4 layers a file": (convolutions, (1, 512, 8, 8), 8),
}
"""Model, input shape, and tensors in a file."""


def write(build: Callable[[], nn.Module], per_file: int, folder: Path) -> int:
    """Write the files and their index; the value is the size of the largest."""
    items = list(build().state_dict().items())
    places = {}
    for number, start in enumerate(range(0, len(items), per_file)):
        name = f"model-{number:05}.safetensors"
        save_file(dict(items[start : start + per_file]), folder / name)
        places |= {key: name for key, _ in items[start : start + per_file]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def growth(case: str, folder: Path) -> int:
    """Bytes by which rescaling raises the most memory that the process ever held."""
    build, shape, _ = CASES[case]
    with torch.device("meta"):
        model = build()
    x = torch.zeros(shape)
    dagpath.balance(dagpath.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.zeros(1, 2)))
    dagpath.trace(model, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dagpath.rescale_checkpoint(model, x, folder / "in", folder / "out", progress=False)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def in_fresh_process(case: str, folder: Path) -> int:
    """:func:`growth`, with what is written removed."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        grown: int = fresh.apply(growth, (case, folder))
    shutil.rmtree(folder / "out")
    return grown


def main() -> None:
    figures: dict[str, dict[str, float]] = {}
    for case, (build, _, per_file) in CASES.items():
        with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Pool(1) as writer:
            folder = Path(name)
            (folder / "in").mkdir()
            largest = writer.apply(write, (build, per_file, folder / "in"))
            total = sum(path.stat().st_size for path in (folder / "in").iterdir())
            grown = in_fresh_process(case, folder)
            with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "1000000"}):  # in bytes, see mallopt(3)
                returned = in_fresh_process(case, folder)
        figures[case] = {
            "largest file, megabytes": largest / 1e6,
            "all files, megabytes": total / 1e6,
            "growth, megabytes": grown / 1e6,
            "growth / largest file": grown / largest,
            "growth / largest file, memory returned": returned / largest,
        }
    rows = [(case, *(f"{value:.2f}" for value in row.values())) for case, row in figures.items()]
    print(table(("checkpoint", *next(iter(figures.values()))), rows))
    save("checkpoint", "python benchmarks/checkpoint.py", dict(figures))


if __name__ == "__main__":
    main()
