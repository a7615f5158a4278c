"""Conserved quantities of gradient flow, along gradient descent with three learning rates."""

import torch
from matplotlib import pyplot as plt
from torch import nn

import dagpath
from dagpath.plots import BLUE, GREEN, ORANGE

TIME = 8.0


def drift(rate):
    """Times, and the relative change of the conserved quantities since the start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x = torch.randn(64, 4).double()
    y = x.prod(1, keepdim=True)
    traced = dagpath.trace(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    start = dagpath.conserved_quantities(traced)
    steps = round(TIME / rate)
    times, changes = [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        if step % (steps // 16) == 0:
            times.append(step * rate)
            changes.append(float((dagpath.conserved_quantities(traced) - start).norm() / start.norm()))
    return times, changes


fig, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for rate, marker, colour in ((0.16, "o", ORANGE), (0.04, "s", BLUE), (0.01, "D", GREEN)):
    ax.plot(*drift(rate), marker + "-", color=colour, ms=4.5, label=f"learning rate {rate:g}")
ax.set(yscale="log", xlabel="time (steps × learning rate)", ylabel="relative change of Σ in² − Σ out²")
ax.legend(fontsize=9)
