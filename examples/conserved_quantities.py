"""What gradient flow conserves, and how fast SGD loses it.

python examples/conserved_quantities.py [FILE.png]

A network learns the digits of scikit-learn for the same time (steps times learning rate) at three learning rates. The
sums of squares into each hidden neuron less those out of it would stay as they are under gradient flow; gradient
descent moves them, in proportion to the learning rate.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

import dagpath

RATES = {0.2: "#D55E00", 0.05: "#0072B2", 0.0125: "#009E73"}
TIME = 20.0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10)).double()


def drift(rate: float, time: float, points: int = 20) -> tuple[list[float], list[float]]:
    """Times, and the relative change of the conserved quantities since the start: full-batch gradient descent."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    model = network()
    traced = dagpath.trace(model, images[:1])
    optimizer = torch.optim.SGD(model.parameters(), rate)
    start = dagpath.conserved_quantities(traced)
    steps = round(time / rate)
    times, changes = [0.0], [0.0]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step % max(steps // points, 1) == 0:
            change = dagpath.conserved_quantities(traced) - start
            times.append(step * rate)
            changes.append(float(change.norm() / start.norm()))
    return times, changes


def main() -> None:
    _, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (rate, colour), marker in zip(RATES.items(), "osD", strict=True):
        times, changes = drift(rate, TIME)
        ax.plot(times[1:], changes[1:], color=colour, marker=marker, label=f"learning rate {rate:g}")
        print(f"learning rate {rate:<6g} relative change after time {times[-1]:.3g}: {changes[-1]:.2e}")
    ax.set(xlabel="time (steps × learning rate)", ylabel="relative change of Σ in² − Σ out²", yscale="log")
    ax.legend()
    if sys.argv[1:]:
        ax.figure.savefig(sys.argv[1], dpi=150)
        print(f"wrote {sys.argv[1]}")
    else:
        plt.show()


if __name__ == "__main__":
    main()
