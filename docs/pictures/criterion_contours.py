"""The criterion of path conditioning over two log-scales."""

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

import dagpath
from dagpath.plots import BLUE, GREY, ORANGE

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 3)).double()
with torch.no_grad():
    net[0].weight.mul_(4)
    net[4].weight.mul_(0.3)
traced = dagpath.trace(net, torch.zeros(1, 4).double())
problem = dagpath.PathConditioning().problem(traced, 14.0, torch.device("cpu"))
minimum = dagpath.balance(traced)

x, y = np.meshgrid(np.linspace(-3, 1.4, 60), np.linspace(-3.4, 1.1, 60))
values = np.array([problem.at(np.array(z)).value for z in zip(x.ravel(), y.ravel(), strict=True)]).reshape(x.shape)
values -= minimum.objective[1]

fig, ax = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
levels = [0.3, 1, 2, 4, 7, 11, 16, 22, 30]
lines = ax.contour(x, y, values, levels, colors=BLUE, linewidths=1)
ax.clabel(lines, fmt="%g", fontsize=8)
end = minimum.log_scales.tolist()
ax.plot([0, end[0]], [0, end[1]], color=GREY, lw=1.2, ls="--", zorder=1)
ax.plot(0, 0, "o", color="black", ms=8, zorder=3)
ax.plot(*end, "*", color=ORANGE, ms=15, zorder=3)
box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
ax.annotate("start: no rescaling", (0, 0), (8, 8), textcoords="offset points", bbox=box)
ax.annotate("minimum", end, (10, -14), textcoords="offset points", color=ORANGE, bbox=box)
ax.set(xlabel="log λ of the first neuron", ylabel="log λ of the second neuron", title="F − its minimum")
