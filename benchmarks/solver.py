"""How fast the solver is: against coordinate descent, against reading the masses once, and as networks grow.

    python benchmarks/solver.py [--device cuda]        prints the tables and writes benchmarks/results/solver*.json

Coordinate descent is the published algorithm written plainly: one neuron after the other, its sums taken where they
stand in the tensors of diag(G), the sum of all masses kept up to date. All times are ratios within one run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from resnet import resnet50

import dagpath
from dagpath.criteria import PathConditioning
from dagpath.graph.explanation import table
from dagpath.solver import Problem, solve_coordinate, solve_newton
from dagpath.solver.newton import NewtonSystem
from dagpath.solver.preconditioner import SeparableHessian
from dagpath.solver.problem import DEFAULT_BOUND
from dagpath.study import mlp
from dagpath.trace import TracedModel

from common import ratio, save, seconds_in_turn


def vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise((3, 128, 128, 128, 256, 256, 256, 320, 320))):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        if index in (1, 3, 5):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 10))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a 1×1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1), norm(outputs)
        self.projection, self.norm3 = nn.Conv2d(inputs, outputs, 1, stride), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(branch + self.norm3(self.projection(x)))


def cifar_resnet18(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), norm(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(ResidualBlock(inputs, outputs, stride, norm))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class PlainCoordinateDescent:
    """The published algorithm, one neuron after the other, in place on the tensors of diag(G)."""

    def __init__(self, traced: TracedModel) -> None:
        self.gram = dagpath.gram_diagonal(traced)
        self.p = sum(int((masses > 0).sum()) for masses in self.gram.values())
        self.linear = 0.0
        groups = range(traced.graph.num_groups)
        self.into: list[list[tuple[str, int, int]]] = [[] for _ in groups]  # parameter, dimension, index
        self.out_of: list[list[tuple[str, int, int]]] = [[] for _ in groups]
        for name, ends in traced.graph.ends.items():
            for slices, end in ((self.into, ends.dst), (self.out_of, ends.src)):
                if end.numel() > 1:
                    dim = next(dim for dim, size in enumerate(end.shape) if size > 1)
                    for index, group in enumerate(end.flatten().tolist()):
                        if group:
                            slices[group - 1].append((name, dim, index))

    def sweep(self) -> float:
        """One sweep over all neurons; the objective that it reaches."""
        gram, p = self.gram, self.p
        total = sum(float(masses.sum()) for masses in gram.values())
        for into, out_of in zip(self.into, self.out_of, strict=True):
            parts_in = [gram[name].select(dim, index) for name, dim, index in into]
            parts_out = [gram[name].select(dim, index) for name, dim, index in out_of]
            inflow = sum(float(part.sum()) for part in parts_in)
            outflow = sum(float(part.sum()) for part in parts_out)
            surplus = sum(part.numel() for part in parts_in) - sum(part.numel() for part in parts_out)
            rest = total - inflow - outflow
            a, b, c = (p + surplus) * outflow, surplus * rest, (surplus - p) * inflow
            x = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
            for part in parts_in:
                part /= x
            for part in parts_out:
                part *= x
            total = inflow / x + outflow * x + rest
            self.linear += surplus * math.log(x)
        return p * math.log(total) + self.linear


def problem_of(traced: TracedModel, device: str) -> Problem:
    return PathConditioning().problem(traced, DEFAULT_BOUND, torch.device(device))


def num_masses(problem: Problem) -> int:
    matrix = problem.matrix
    return matrix.masses.numel() + sum(block.numel() for block in matrix.blocks)


def against_coordinate_descent(device: str, rounds: int) -> list[dict[str, float | str]]:
    networks = {
        "MLP 784-500×4-10": (mlp(784, 500, 500, 500, 500, 10), (1, 784)),
        "VGG-like, no norm": (vgg(), (1, 3, 32, 32)),
        "ResNet-18, batch norm": (cifar_resnet18(nn.BatchNorm2d), (1, 3, 32, 32)),
        "ResNet-18, no norm": (cifar_resnet18(lambda channels: nn.Identity()), (1, 3, 32, 32)),
    }
    rows: list[dict[str, float | str]] = []
    for name, (model, shape) in networks.items():
        traced = dagpath.trace(model.eval(), torch.zeros(shape))
        ratios, seconds = [], []
        for _ in range(rounds):
            problem = problem_of(traced, device)
            solution = solve_newton(problem)
            descent = PlainCoordinateDescent(traced)
            start = time.perf_counter()
            for _ in range(10):
                reached = descent.sweep() + problem.offset
            ratios.append((time.perf_counter() - start) / solution.seconds)
            seconds.append(solution.seconds)
        long = solve_coordinate(problem_of(traced, "cpu"), max_iter=2000)
        rows.append(
            {
                "network": name,
                "groups": problem.num_groups,
                "masses": num_masses(problem),
                "milliseconds": 1e3 * statistics.median(seconds),
                "10 sweeps / newton": statistics.median(ratios),
                "iterations": solution.iterations,
                "products": solution.products,
                "optimality": solution.optimality,
                "F, newton": solution.objective[1],
                "F, 10 sweeps": reached,
                "F, 2,000 sweeps": long.objective[1],
                "product / torch.sum": product_ratio(problem, solution.z),
                "memory / masses": peak_memory(problem) / mass_bytes(problem),
            }
        )
    return rows


def product_ratio(problem: Problem, z: Tensor) -> float:
    """A Hessian product, as the conjugate gradients make it, in units of one sum over the masses."""
    point = problem.at(z)
    product = NewtonSystem(point, torch.float32).product(SeparableHessian(point))
    vector = np.random.default_rng(0).normal(size=problem.num_groups + 1)
    parts = [problem.matrix.masses, *problem.matrix.blocks]

    def read() -> float:
        return sum(float(part.sum()) for part in parts)

    times = seconds_in_turn({"product": lambda: product(vector), "read": read}, rounds=200)
    return ratio(times, "product", "read")


def resnet50_ratio(device: str, rounds: int) -> dict[str, float]:
    model = resnet50().eval().to(device)
    image = torch.randn(1, 3, 224, 224, device=device)
    traced = dagpath.trace(model, image)

    def train_step() -> None:
        model.zero_grad()
        model(image).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    solutions = []
    times = seconds_in_turn(
        {"pass": train_step, "solve": lambda: solutions.append(solve_newton(problem_of(traced, device)))}, rounds
    )
    problem = problem_of(traced, device)
    seconds = [solution.seconds for solution in solutions[1:]]
    return {
        "solve / pass": statistics.median(a / b for a, b in zip(seconds, times["pass"], strict=True)),
        "solve, milliseconds": 1e3 * statistics.median(seconds),
        "iterations": solutions[-1].iterations,
        "optimality": solutions[-1].optimality,
        "masses": num_masses(problem),
        "peak memory, megabytes": peak_memory(problem) / 1e6,
        "z, c and the gradient, megabytes": 3 * 8 * problem.num_groups / 1e6,
        "twice the masses, megabytes": 2 * mass_bytes(problem) / 1e6,
    }


def mass_bytes(problem: Problem) -> int:
    return sum(part.numel() * part.element_size() for part in problem.matrix.parts)


def peak_memory(problem: Problem) -> int:
    """Most bytes that a solve holds beside the problem in the host's memory: NumPy's peak plus torch's."""
    tracemalloc.start()
    solve_newton(problem)
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        solve_newton(problem)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return arrays + max(itertools.accumulate(changes, initial=0))


def growth(device: str) -> tuple[list[dict[str, float]], dict[str, float]]:
    rows, slopes = [], {}
    series = {
        "depth": [(64, depth) for depth in (4, 8, 16, 32, 64, 128, 256)],
        "width": [(width, 4) for width in (64, 128, 256, 512, 1024, 2048, 4096)],
    }
    for name, shapes in series.items():
        sizes, times = [], []
        for width, depth in shapes:
            traced = dagpath.trace(mlp(*[width] * (depth + 1)), torch.zeros(1, width))
            solutions = [solve_newton(problem_of(traced, device)) for _ in range(5)]
            problem = problem_of(traced, device)
            sizes.append(num_masses(problem))
            times.append(statistics.median(solution.seconds for solution in solutions))
            rows.append(
                {
                    "width": width,
                    "depth": depth,
                    "masses": sizes[-1],
                    "iterations": solutions[-1].iterations,
                    "products": solutions[-1].products,
                    "optimality": solutions[-1].optimality,
                    "milliseconds": 1e3 * times[-1],
                }
            )
        slopes[f"slope in {name}"] = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
    return rows, slopes


def show(rows: list[dict[str, Any]]) -> None:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:,.1f}"
        return f"{value:,}" if isinstance(value, int) else value

    print(table(tuple(rows[0]), [tuple(text(value) for value in row.values()) for row in rows]), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    compared = against_coordinate_descent(device, rounds=5)
    show(compared)
    large = resnet50_ratio(device, rounds=7)
    show([{"ResNet-50, 224 × 224": name, "": value} for name, value in large.items()])
    grown, slopes = growth(device)
    show(grown)
    show([{"growth of the time with the number of masses": name, "": value} for name, value in slopes.items()])
    name = "solver" if device == "cpu" else f"solver_{device}"
    figures = {"networks": compared, "resnet50": large, "growth": grown, **slopes}
    save(name, f"python benchmarks/solver.py --device {device}", figures)


if __name__ == "__main__":
    main()
