"""A small network with its skeleton, and one basis path."""

import itertools

import torch
from matplotlib import pyplot as plt
from torch import nn

import dagpath
from dagpath.paths.basis import basis_paths
from dagpath.plots import BLUE, GREEN, GREY, ORANGE

torch.manual_seed(4)
net = nn.Sequential(
    *(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
)
basis = basis_paths(dagpath.trace(net, torch.zeros(1, 2)))
entering, leaving = (set(chosen[chosen >= 0].tolist()) for chosen in (basis.entering, basis.leaving))

columns = [[(0.0, 1.0), (0.0, 0.0)], [(1.5, 1.0), (1.5, 0.0)], [(3.0, 1.0), (3.0, 0.0)], [(4.5, 0.5)]]
names = [["$x_0$", "$x_1$"], ["$a_0$", "$a_1$"], ["$b_0$", "$b_1$"], ["out"]]
elements = [(start, end) for first, second in itertools.pairwise(columns) for end in second for start in first]
chosen = next(e for e in range(4, 8) if e not in entering | leaving)
ends = {place: name for layer in zip(columns, names, strict=True) for place, name in zip(*layer, strict=True)}
edge = " → ".join(ends[place] for place in elements[chosen])
on_path = set(basis.to_scipy()[:, [int(basis.class_of[chosen])]].nonzero()[0].tolist())

fig, ax = plt.subplots(figsize=(5.2, 3.1), layout="constrained")
for e, (start, end) in enumerate(elements):
    xs, ys = zip(start, end, strict=True)
    if e in on_path:
        ax.plot(xs, ys, color=ORANGE, lw=9, alpha=0.45, solid_capstyle="round", zorder=1)
    ax.plot(xs, ys, color=GREY, lw=1, zorder=2)
    if e in entering:
        ax.plot(xs, ys, color=BLUE, lw=2.6, zorder=3)
    if e in leaving:
        ax.plot(xs, ys, color=GREEN, lw=2.6, ls=(0, (3, 2)), zorder=4)
for places, labels in zip(columns, names, strict=True):
    for place, label in zip(places, labels, strict=True):
        ax.scatter(*place, s=650, color="white", edgecolors="black", zorder=5)
        ax.text(*place, label, ha="center", va="center", fontsize=10, zorder=6)
for label, style in (
    ("s(γ): enters its neuron", {"color": BLUE, "lw": 2.6}),
    ("t(γ): leaves its neuron", {"color": GREEN, "lw": 2.6, "ls": (0, (3, 2))}),
    (f"basis path of {edge}", {"color": ORANGE, "lw": 9, "alpha": 0.45}),
    ("other edges", {"color": GREY, "lw": 1}),
):
    ax.plot([], [], label=label, **style)
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=9, frameon=False)
ax.set(xlim=(-0.4, 4.9), ylim=(-0.3, 1.3))
ax.axis("off")
