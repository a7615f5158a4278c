"""
What will balancing do to my architecture?
==========================================

:func:`dagpath.study.predict` says from an architecture and its initialization alone by which factors path
conditioning will rescale each layer: it balances the *expected* path Gram matrix in place of a sample. Which shapes
of a network leave it something to do?
"""

# %%
# Multilayer perceptrons of one depth, without biases, whose layers have different widths, at PyTorch's
# initialization. ``spread`` is the standard deviation of log λ: zero means that balancing leaves the network as it
# is.
import torch
from matplotlib import pyplot as plt

import dagpath
from dagpath import plots, study

shapes = {
    "constant": (64, 64, 64, 64, 64, 64),
    "narrowing": (64, 256, 128, 64, 32, 16),
    "widening": (64, 16, 32, 64, 128, 256),
    "bottleneck": (64, 128, 16, 16, 128, 64),
}
image = torch.zeros(1, 64)
effects = {
    name: study.predict(lambda widths=widths: study.mlp(*widths, bias=False), image) for name, widths in shapes.items()
}
for name, effect in effects.items():
    widths = "-".join(map(str, shapes[name]))
    print(f"{name:10} {widths:22} spread {effect.spread:.3f}, criterion falls by {effect.drop:.3f} per weight")

# %%
# How far is a network from what was expected of it? Each is drawn once and balanced; what chance adds neuron by
# neuron is averaged out, layer by layer.
for name, widths in shapes.items():
    torch.manual_seed(0)
    rescaling = dagpath.balance(dagpath.trace(study.mlp(*widths, bias=False), image))
    drawn = {layer: float(part.mean()) for layer, part in rescaling.layers()}
    error = max(abs(drawn[layer] - value) for layer, value in effects[name].layers.items())
    largest = max(abs(value) for value in effects[name].layers.values())
    print(f"{name:10} largest mean of log λ: {largest:.2f} predicted; largest error against one draw: {error:.3f}")

# %%
_, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
colors = (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN)
for (name, effect), color, marker in zip(effects.items(), colors, "Do^s", strict=True):
    ax.plot(range(1, 5), list(effect.layers.values()), color=color, marker=marker, label=name)
ax.axhline(0, color=plots.GREY, linewidth=0.8, zorder=0)
ax.set(xlabel="hidden layer", ylabel="predicted mean of log λ", xticks=range(1, 5))
ax.figure.legend(loc="outside lower center", ncols=4, fontsize=9)
plt.show()

# %%
# **Nothing where the width is constant, much where it changes.** Path conditioning makes the entries of diag(G), one
# for each weight, as equal as it can. log λ climbs over a layer whose entries are above the average, and falls over
# one whose entries are below it; at this initialization those are the layers of few and of many outputs.
# :func:`dagpath.study.mlp_log_scales` has the formula, and :func:`dagpath.study.predict` takes any model, also one
# with biases, convolutions and skips.
