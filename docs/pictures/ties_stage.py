"""A residual stage with identity skips, and the next one behind a projection: which channels share a factor."""

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from dagpath.plots import BLUE, GREEN, GREY, ORANGE, SKY

COLOURS = {"a": BLUE, "b": ORANGE, "c": GREEN, "d": SKY, "e": "#E69F00"}
SIDE, TOP, LOW = 0.42, 2.6, 0.0

fig, ax = plt.subplots(figsize=(5.4, 3.3), layout="constrained")


def layer(x, y, channels, name):
    """A column of channels; a blank is a channel that shares its factor with no other."""
    bottom = y - len(channels) * SIDE / 2
    for i, channel in enumerate(reversed(channels)):
        place = x - SIDE / 2, bottom + i * SIDE
        ax.add_patch(Rectangle(place, SIDE, SIDE, facecolor=COLOURS.get(channel, "white"), edgecolor="black", lw=0.8))
        ax.text(x, place[1] + SIDE / 2, channel, ha="center", va="center", color="white", fontsize=10, weight="bold")
    ax.text(x, bottom - 0.1, name, ha="center", va="top", fontsize=9)


def arrow(start, end):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1.5})


def block(x, first, left):
    """Two convolutions below the stream, which takes them in again at a sum; ``left`` is where they branch off."""
    arrow((left, TOP), (x - 0.25, LOW + 0.2))
    layer(x, LOW, "  ", "conv1")
    arrow((x + 0.25, LOW), (x + 0.75, LOW))
    layer(x + 1, LOW, first, "conv2")
    arrow((x + 1.25, LOW + 0.2), (x + 1.8, TOP - 0.22))
    ax.text(x + 1.85, TOP, "+", ha="center", va="center", fontsize=17)


layer(0, TOP, "abc", "stem")
block(1.0, "abc", 0.3)
arrow((0.25, TOP), (2.65, TOP))
block(3.9, "abc", 3.05)
arrow((3.05, TOP), (5.55, TOP))
block(6.9, "de", 5.95)
layer(7.2, TOP, "de", "projection")
arrow((5.95, TOP), (6.93, TOP))
arrow((7.47, TOP), (8.55, TOP))
arrow((8.95, TOP), (9.5, TOP))
ax.text(9.55, TOP, "head", va="center", fontsize=9)
ax.text(3.0, 3.55, "one stage: groups a, b, c", ha="center", fontsize=10)
ax.text(8.0, 3.55, "the next: d, e", ha="center", fontsize=10)
ax.plot([6.35, 6.35], [-1.0, 3.75], ":", color="black", lw=1)
ax.text(2.9, -1.25, "white: channels with a factor of their own", ha="center", fontsize=9)
ax.set(xlim=(-0.5, 10.3), ylim=(-1.5, 3.9))
ax.axis("off")
