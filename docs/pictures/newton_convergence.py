"""Coordinate descent, Newton's method and dagpath's solver on the log-scales of a small convolutional network."""

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

import dagpath
from dagpath.plots import BLUE, GREEN, ORANGE
from dagpath.solver import solve_coordinate, solve_newton

SWEEPS = 60


def newton(problem, steps):
    """Newton's method with a dense Hessian; each step is halved until the objective falls."""
    incidence, masses = problem.to_scipy()
    incidence, p = incidence.toarray(), problem.live
    point = problem.at(np.zeros(problem.num_groups))
    yield point.value
    for _ in range(steps):
        w = masses * np.exp(-2 * incidence @ point.z)
        m = incidence.T @ w
        hessian = 4 * p / w.sum() * (incidence.T * w @ incidence - np.outer(m, m) / w.sum())
        step = -np.linalg.solve(hessian, point.gradient)
        following = point.at(point.z + step)
        while following.value > point.value + 1e-9:
            step /= 2
            following = point.at(point.z + step)
        point = following
        yield point.value


torch.manual_seed(0)
layers = [nn.Conv2d(1, 8, 3, padding=1)]
for _ in range(6):
    layers += [nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)).double()
traced = dagpath.trace(net, torch.zeros(1, 1, 8, 8).double())
problem = dagpath.PathConditioning().problem(traced, 14.0, torch.device("cpu"))
best = solve_newton(problem, 1e-12).objective[1]
sweeps = list(range(0, SWEEPS + 1, 5))
curves = {
    "coordinate descent, sweeps": (
        sweeps,
        [solve_coordinate(problem, 1e-12, k).objective[1] for k in sweeps],
        "o",
        BLUE,
    ),
    "Newton, plainly, iterations": (range(11), list(newton(problem, 10)), "s", GREEN),
    "dagpath's solver, iterations": (
        range(4),
        [solve_newton(problem, 1e-14, k).objective[1] for k in range(4)],
        "^",
        ORANGE,
    ),
}
fig, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for label, (steps, values, marker, colour) in curves.items():
    above = np.maximum((np.array(values) - best) / problem.live, 1e-16)
    ax.plot(steps, above, marker + "-", color=colour, label=label, ms=5)
ax.set(yscale="log", ylim=(1e-15, 30), xlabel="sweeps, or iterations", ylabel="(F − minimum) / p")
ax.legend(fontsize=9)
