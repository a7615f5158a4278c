"""
How far does pruning move a network?
====================================

Pruning sets weights to zero. The distance of the parameters says little about what that does to the function: a
rescaling changes it at will. :func:`dagpath.path_metric` measures the distance of the values of all paths, which no
rescaling changes, and in the 1-norm it bounds the change of every output.
"""

# %%
# A network learns the digits of scikit-learn. Then the smallest weights of all layers together are set to zero.
import copy

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import dagpath
from dagpath import plots, study

digits = load_digits()
images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
torch.manual_seed(0)
model = study.mlp(64, 48, 32, 10).double()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(30):
    for batch in torch.randperm(len(images)).split(128):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
weights = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]


@torch.no_grad()
def pruned(network, share):
    network = copy.deepcopy(network)
    parameters = dict(network.named_parameters())
    threshold = torch.cat([parameters[name].abs().flatten() for name in weights]).quantile(share)
    for name in weights:
        parameters[name][parameters[name].abs() < threshold] = 0
    return network


# %%
# How far has it moved, relative to where it was? Pruning changes no sign and makes no weight larger, so that the path
# metric is known exactly in the 1-norm. Both networks together can be rescaled, which changes neither function: what
# is the distance of the parameters then?
@torch.no_grad()
def parameter_distance(one, other):
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    return float(sum((p - q).abs().sum() for p, q in pairs) / sum(p.abs().sum() for p, _ in pairs))


traced = dagpath.trace(model, images[:1])
norm = dagpath.path_norm(traced, p=1)
rescaling = dagpath.random_rescaling(traced, sigma=3.0)
shares = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
curves = {"paths": [], "parameters": [], "parameters, rescaled": [], "outputs": []}
bounds = []
print("pruned   " + "   ".join(curves) + "   accuracy")
with torch.no_grad():
    outputs = model(images)
    for share in shares:
        other = pruned(model, share)
        metric = dagpath.path_metric(traced, dagpath.trace(other, images[:1]), p=1)
        changes = (other(images) - outputs).abs().sum(1)
        accuracy = float((other(images).argmax(1) == labels).double().mean())
        copies = [rescaling.apply_(copy.deepcopy(network)) for network in (model, other)]
        moved = float(changes.sum() / outputs.abs().sum())
        row = (metric / norm, parameter_distance(model, other), parameter_distance(*copies), moved)
        for values, value in zip(curves.values(), row, strict=True):
            values.append(value)
        bounds.append(metric / float(changes.max()))
        columns = "   ".join(f"{value:>{len(name)}.1%}" for name, value in zip(curves, row, strict=True))
        print(f"{share:6.0%}   {columns}   {accuracy:8.1%}")

# %%
# Pixels are between 0 and 1. So the path metric in the 1-norm bounds the sum of the changes of all outputs, for any
# image (Gonon et al., ICML 2025). The distance of the parameters by itself bounds nothing. How sharp is the bound on
# the images at hand?
print(f"the path metric is {min(bounds):.0f} to {max(bounds):.0f} times the largest change on these images")

# %%
_, ax = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
styles = ((plots.BLUE, "o"), (plots.ORANGE, "^"), (plots.SKY, "v"), (plots.GREEN, "s"))
for (name, values), (color, marker) in zip(curves.items(), styles, strict=True):
    ax.plot(shares, values, color=color, marker=marker, label=name)
ax.set(xlabel="share of weights pruned", ylabel="relative change")
ax.legend()
plt.show()

# %%
# **Farther than its parameters say.** A path is lost with any one of its weights, so that the mass of the paths goes
# faster than that of the weights. The relative distance of the parameters depends on how both networks are scaled;
# that of the paths does not. The outputs keep to neither curve, as paths of both signs cancel. What the path metric
# says holds for all images, which is why it is far above the change on any of these.
