"""Unroll a CIFAR ResNet-20 (He et al., 2016): seconds and peak memory, and two ways to its path-norm.

python benchmarks/unroll.py      prints a table and writes benchmarks/results/unroll.json
"""

from __future__ import annotations

import itertools
import resource
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath
from dagpath.graph.explanation import table

from common import save


class Block(nn.Module):
    """Two 3x3 convolutions; the skip takes every second position and pads the missing channels with zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.more = width // channels, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + skip)


def resnet20() -> nn.Module:
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(before, after) for before, after in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    torch.manual_seed(0)
    model = resnet20()
    traced = dagpath.trace(model, torch.zeros(1, 3, 32, 32))
    before, start = gibibytes(), time.perf_counter()
    graph = traced.unroll(progress=True)
    seconds = {"unroll": time.perf_counter() - start}
    peak = gibibytes()
    quantities = {
        "path_norm(2)": lambda: graph.path_norm(2),
        "gram_diagonal": graph.gram_diagonal,
        "path_count": graph.path_count,
    }
    found = {}
    for name, function in quantities.items():
        start = time.perf_counter()
        found[name] = function()
        seconds[name] = time.perf_counter() - start
    other = dagpath.path_norm(traced, 2)
    difference = abs(found["path_norm(2)"] / other - 1)
    print(graph)
    rows = [(name, f"{value:.1f} s") for name, value in seconds.items()]
    rows += [("peak memory", f"{peak:.2f} GiB ({before:.2f} before)"), ("to the other way's norm", f"{difference:.0e}")]
    print(table(("ResNet-20", ""), rows))
    figures = {
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "seconds": seconds,
        "peak GiB": peak,
        "GiB before": before,
        "paths": str(found["path_count"]),
        "relative difference of norms": difference,
    }
    save("unroll", "python benchmarks/unroll.py", figures)


if __name__ == "__main__":
    main()
