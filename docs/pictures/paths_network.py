"""A small network, with one of its paths."""

from matplotlib import pyplot as plt

from dagpath.plots import BLUE, GREY, ORANGE

INPUTS = [(0, 1.5), (0, 0.5)]
HIDDEN = [(1.6, 2.0), (1.6, 1.0), (1.6, 0.0)]
OUTPUT = (3.2, 1.0)
CONSTANTS = [(0, -0.6), (1.6, -0.9)]

fig, ax = plt.subplots(figsize=(5.4, 3.3), layout="constrained")


def edge(start, end, style="-", path=False):
    colour, width = (ORANGE, 3.2) if path else (GREY, 1.0)
    ax.plot(*zip(start, end, strict=True), style, color=colour, lw=width, zorder=1 + path)


def node(place, label, colour=BLUE):
    ax.scatter(*place, s=560, color="white", edgecolors=colour, linewidths=2, zorder=3)
    ax.text(*place, label, ha="center", va="center", zorder=4, fontsize=10)


for i, start in enumerate(INPUTS):
    for j, end in enumerate(HIDDEN):
        edge(start, end, path=(i, j) == (0, 1))
for j, start in enumerate(HIDDEN):
    edge(start, OUTPUT, path=j == 1)
for j in range(3):
    edge(CONSTANTS[0], HIDDEN[j], ":")
edge(CONSTANTS[1], OUTPUT, ":")

for i, place in enumerate(INPUTS):
    node(place, f"$x_{i}$", ORANGE if i == 0 else BLUE)
for j, place in enumerate(HIDDEN):
    node(place, f"$v_{j}$", ORANGE if j == 1 else BLUE)
node(OUTPUT, "out", ORANGE)
for place in CONSTANTS:
    node(place, "1", GREY)

ax.text(0.62, 1.46, r"$\theta_{x_0 \to v_1}$", color=ORANGE, fontsize=11, rotation=-6)
ax.text(2.2, 1.1, r"$\theta_{v_1 \to \mathrm{out}}$", color=ORANGE, fontsize=11)
ax.text(3.35, 1.75, "the value of this path:", ha="center", fontsize=10)
ax.text(
    3.35,
    1.45,
    r"$\Phi_p = \theta_{x_0 \to v_1}\,\theta_{v_1 \to \mathrm{out}}$",
    color=ORANGE,
    fontsize=11,
    ha="center",
)
ax.text(2.0, -0.85, "dotted: biases, from the constant 1", fontsize=9)
ax.set(xlim=(-0.4, 4.3), ylim=(-1.25, 2.35))
ax.axis("off")
