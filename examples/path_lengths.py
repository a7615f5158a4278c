"""
How long are the paths of a VGG, a ResNet and a DenseNet?
=========================================================

In a plain network every path from a pixel to an output crosses all layers. Skips and concatenations open shorter
ones. :func:`dagpath.path_length_profile` counts the paths of each length, the length being the number of
convolutions and linear layers on the path, and says which share of Σ Φ², the squared values of all paths, they
have.
"""

# %%
# Three models of torchvision, with random weights and for images of 32×32 pixels. Load a model of yours in their
# place.
import math

import torch
from matplotlib import pyplot as plt
from torch import nn
from torchvision import models

import dagpath
from dagpath import plots

torch.manual_seed(0)
vgg = models.vgg11(num_classes=10, init_weights=False)
vgg.avgpool, vgg.classifier = nn.Identity(), nn.Linear(512, 10)  # its own classifier is for larger images
networks = {
    "VGG-11": vgg,
    "ResNet-18": models.resnet18(num_classes=10),
    "DenseNet": models.DenseNet(12, (3, 3, 3), 24, num_classes=10),
}

# %%
# Counts are exact integers, here with dozens of digits. Paths also start at biases, in the middle of the network:
# those count, but where a bias is zero they have no mass. That is why a VGG has short paths at all.
profiles = {}
for name, model in networks.items():
    traced = dagpath.trace(model.eval(), torch.zeros(1, 3, 32, 32))
    counts, shares = dagpath.path_length_profile(traced, progress=False), dagpath.path_length_profile(traced, p=2)
    profiles[name] = counts, shares
    total = sum(counts.values())
    by_count = sum(length * count for length, count in counts.items()) / total
    by_mass = sum(length * share for length, share in shares.items())
    print(f"{name}: 10^{math.log10(total):.1f} paths, {max(counts)} layers at most")
    print(f"    mean length {by_count:.1f} where every path counts the same, {by_mass:.1f} where it counts by its mass")

# %%
_, (top, bottom) = plt.subplots(2, figsize=(5.2, 5.4), layout="constrained", sharex=True)
colors = (plots.ORANGE, plots.BLUE, plots.GREEN)
for (name, (counts, shares)), color, marker in zip(profiles.items(), colors, "so^", strict=True):
    logs = [math.log10(count) for count in counts.values()]
    top.plot(list(counts), logs, color=color, marker=marker, markersize=4, label=name)
    bottom.plot(list(shares), list(shares.values()), color=color, marker=marker, markersize=4)
top.set_ylabel("number of paths, log₁₀")
bottom.set(xlabel="layers on the path", ylabel="share of Σ Φ²", yscale="log", ylim=(1e-6, 2))
top.legend()
plt.show()

# %%
# **By number, almost all paths are as long as can be; by mass, those of a ResNet and a DenseNet are much shorter.**
# Each layer multiplies the number of paths by a large factor, whereas each skip shares the mass between a longer and
# a shorter way. What short paths a VGG has start at its biases.
