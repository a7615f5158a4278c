"""A network of two weights: the hyperbola of one function, contours of the loss, and two gradient flows."""

import numpy as np
from matplotlib import pyplot as plt
from scipy.integrate import solve_ivp

from dagpath.plots import BLUE, GREEN, GREY, ORANGE

START, TARGET = 0.5, 2.0


def flow(a):
    """The gradient flow of (ab - TARGET)²/2 from the point (a, START/a)."""

    def velocity(_, w):
        return -(w[0] * w[1] - TARGET) * w[::-1]

    return solve_ivp(velocity, (0, 20), [a, START / a], t_eval=np.linspace(0, 20, 2000), rtol=1e-8).y


a, b = np.meshgrid(np.linspace(0.05, 3.2, 300), np.linspace(0.05, 3.2, 300))
fig, ax = plt.subplots(figsize=(4.8, 4.6), layout="constrained")
levels = [0.02, 0.2, 0.6, 1.125, 2.0, 4.0, 8.0]
ax.contour(a, b, (a * b - TARGET) ** 2 / 2, levels, colors=GREY, linewidths=0.7, linestyles="dashed")
curve = np.linspace(0.1, 3.2, 400)
ax.plot(curve, START / curve, color=BLUE, lw=2.5)
ax.plot(curve, TARGET / curve, color=GREEN, lw=2.5, ls="-.")
box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
ax.text(0.22, 2.9, f"one function,\nab = {START:g}", color=BLUE, va="top", bbox=box)
ax.text(1.02, 2.35, f"loss zero, ab = {TARGET:g}", color=GREEN, va="top", bbox=box)
ax.text(2.1, 2.9, "dashed: contours\nof the loss", color="dimgrey", va="top", bbox=box)
for start, marker, name, place in (
    (START**0.5, "o", "balanced\nstart", (0.2, 0.25)),
    (2.6, "s", "rescaled\nstart", (1.85, 0.32)),
):
    path = flow(start)
    ax.plot(*path, color=ORANGE, lw=1.8)
    ax.plot(*path[:, 0], marker, color=ORANGE, ms=8)
    ax.text(*place, name, color=ORANGE)
    ax.plot(*path[:, -1], "x", color=ORANGE, ms=9, mew=2)
    half = int(np.argmax(path.prod(0) > (START + TARGET) / 2))
    arrow = {"arrowstyle": "->", "color": ORANGE, "lw": 1.8, "mutation_scale": 18}
    ax.annotate("", path[:, half + 1], path[:, half], arrowprops=arrow)
ax.text(1.62, 1.5, "gradient flow\nends here", color=ORANGE, bbox=box)
ax.set(xlim=(0, 3.2), ylim=(0, 3.2), xlabel="incoming weight a", ylabel="outgoing weight b", aspect="equal")
