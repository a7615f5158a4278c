"""Neuron numbers in place of activations, through a few operations."""

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from dagpath.plots import BLUE, GREEN, GREY, ORANGE

SIDE = 0.5
COLOURS = dict.fromkeys(("1", "2"), BLUE) | dict.fromkeys(("3", "4"), GREEN) | dict.fromkeys(("5", "6"), ORANGE)

fig, ax = plt.subplots(figsize=(5.4, 3.5), layout="constrained")


def tensor(x, y, numbers, name=""):
    """A row of boxes that starts at (x, y), and a name above it."""
    for i, number in enumerate(numbers):
        place = x + i * SIDE, y - SIDE / 2
        ax.add_patch(Rectangle(place, SIDE, SIDE, facecolor=COLOURS.get(number, GREY), edgecolor="black", lw=0.8))
        middle = place[0] + SIDE / 2
        ax.text(middle, y, number, ha="center", va="center", color="white", fontsize=11, weight="bold")
    ax.text(x, y + 0.38, name, fontsize=9, va="bottom")


def arrow(start, end):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1.5})


tensor(0.0, 4.0, "000", "input")
tensor(3.0, 4.8, "1234", "linear")
tensor(3.0, 3.0, "56", "linear")
arrow((1.6, 4.1), (2.9, 4.7))
arrow((1.6, 3.9), (2.9, 3.1))
tensor(6.4, 4.8, "12", "chunk")
tensor(7.9, 4.8, "34")
arrow((5.1, 4.8), (6.3, 4.8))
tensor(3.0, 1.0, "00", "sigmoid")
ax.text(3.0, 0.35, "ties 5 and 6 to 0,\nreturns zeros", fontsize=9, va="top")
arrow((3.5, 2.65), (3.5, 1.85))
tensor(8.6, 3.0, "3456", "concatenation")
arrow((8.5, 4.45), (9.5, 3.85))
arrow((4.1, 2.95), (8.5, 2.95))
tensor(6.6, 1.0, "12", "sum")
ax.text(6.6, 0.35, "ties 1 to 5 and 2 to 6,\nreturns the numbers of one", fontsize=9, va="top")
arrow((6.9, 4.45), (7.1, 1.85))
arrow((4.1, 2.75), (6.5, 1.2))
ax.set(xlim=(-0.2, 10.8), ylim=(-0.7, 5.7))
ax.axis("off")
