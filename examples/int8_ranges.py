"""
Does equalizing ranges help 8-bit weights?
==========================================

Rounded to 8 bits with one step for the whole layer, the weights of a channel with a small range lose most of their
digits. ``criterion="range"`` (cross-layer equalization) gives the channels of neighbouring layers equal ranges,
without any change to the function. It is meant for depthwise convolutions, whose channels have few weights each.
"""

# %%
# A small network of depthwise and pointwise convolutions learns the digits of scikit-learn, two thirds of them. Then
# its batch norms are folded into the convolutions, as is done before quantization.
import copy

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dagpath
from dagpath import plots

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
train, test = slice(0, 1200), slice(1200, None)


def separable(inputs, outputs, stride):
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return [depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU()]


torch.manual_seed(0)
stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
body = [*separable(16, 32, 2), *separable(32, 32, 1), *separable(32, 64, 2)]
model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
for _ in range(6):
    for batch in torch.randperm(1200).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()

layers = []
for module in model.eval():
    if isinstance(module, nn.BatchNorm2d):
        layers[-1] = fuse_conv_bn_eval(layers[-1], module)
    else:
        layers.append(module)
folded = nn.Sequential(*layers)


# %%
# Weights are rounded to multiples of 1/127 of the largest one of their layer; biases stay as they are. The error is
# that of the outputs on the test images, relative to the outputs.
@torch.no_grad()
def rounded(network):
    network = copy.deepcopy(network)
    for module in network:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            step = module.weight.abs().max() / 127
            module.weight.copy_((module.weight / step).round() * step)
    return network


@torch.no_grad()
def quality(network):
    outputs, reference = network(images[test]), folded(images[test])
    accuracy = (outputs.argmax(1) == labels[test]).float().mean()
    return float((outputs - reference).norm() / reference.norm()), float(accuracy)


# %%
# Larger networks can have much more unequal ranges: Nagel et al. (ICCV 2019) show those of MobileNetV2. Here a random
# rescaling of growing spread σ of log λ stands in for them: the function, and with it the accuracy without rounding,
# is the same each time.
options = {"as it is": None, "range": {}, "range, powers of two": {"power_of_two": True}}
sigmas, draws = (0.0, 0.3, 0.6, 0.9), 3
errors = {name: [] for name in options}
print(f"accuracy without rounding: {quality(folded)[1]:.1%}; with 8 bits (medians of {draws} random rescalings):")
for sigma in sigmas:
    for name, option in options.items():
        found = []
        for draw in range(draws):
            network = copy.deepcopy(folded)
            traced = dagpath.trace(network, images[:1])
            dagpath.random_rescaling(traced, sigma, generator=torch.Generator().manual_seed(draw)).apply_()
            if option is not None:
                dagpath.balance(traced, "range", **option).apply_()
            found.append(quality(rounded(network)))
        error, accuracy = torch.tensor(found).median(0).values.tolist()
        errors[name].append(error)
        print(f"σ = {sigma:.1f}, {name:20}: error of outputs {error:6.2%}, accuracy {accuracy:.1%}")

# %%
_, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
colors = (plots.ORANGE, plots.BLUE, plots.GREEN)
for (name, values), color, marker in zip(errors.items(), colors, "o^s", strict=True):
    ax.plot(sigmas, values, color=color, marker=marker, label=name)
ax.set(xlabel="spread σ of the ranges (log λ)", ylabel="relative error of outputs, 8 bits", yscale="log")
ax.legend()
plt.show()

# %%
# **It depends on how unequal the ranges are.** Where they are nearly equal already, there is little to gain, and
# rounding the factors to powers of two may lose it again. Where they are not, the error grows until accuracy falls,
# and equalized ranges bring it back, always to the same error: from every rescaled copy the same equalized network is
# reached. Powers of two make ranges equal up to a small factor, and leave the outputs before rounding bitwise as they
# were. :doc:`/howto/quantization` goes on from here.
