"""The ranges of the channels of a depthwise convolution before and after equalization."""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dagpath
from dagpath.plots import BLUE, ORANGE

torch.manual_seed(0)
digits = load_digits()
images, targets = torch.tensor(digits.images)[:, None] / 16, torch.tensor(digits.target)


def layer(inputs: int, outputs: int, size: int, groups: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


layers = [*layer(1, 16, 3), *layer(16, 16, 3, 16), *layer(16, 32, 1), *layer(32, 32, 3, 32), *layer(32, 32, 1)]
trained = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).double()
optimizer = torch.optim.Adam(trained.parameters(), lr=0.03)
for batch in torch.randperm(1500).repeat(2).split(30):
    optimizer.zero_grad()
    nn.functional.cross_entropy(trained(images[batch]), targets[batch]).backward()
    optimizer.step()

trained.eval()
convolutions = [fuse_conv_bn_eval(trained[index], trained[index + 1]) for index in range(0, 15, 3)]
folded = nn.Sequential(*(part for each in convolutions for part in (each, nn.ReLU())), *trained[15:])
folded.requires_grad_(False)
equalized = copy.deepcopy(folded)
dagpath.rescale_(equalized, images[:1], "range")

figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for model, label, color, marker, shift in (
    (folded, "before", BLUE, "o", -0.15),
    (equalized, "after", ORANGE, "^", 0.15),
):
    ranges = [model[index].weight.abs().amax((1, 2, 3)) for index in range(0, 10, 2)]
    heights = torch.cat([each / each.max() for each in ranges])
    places = torch.cat([torch.full_like(each, position + shift) for position, each in enumerate(ranges)])
    axes.scatter(places, heights, s=16, color=color, marker=marker, label=label, alpha=0.6)
axes.set_xticks(range(5), ["3 × 3", "depthwise", "1 × 1", "depthwise", "1 × 1"])
axes.set_ylim(bottom=0)
axes.set_ylabel("largest weight of a channel,\nover that of the tensor")
axes.legend(loc="lower left")
