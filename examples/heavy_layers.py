"""
Which layers carry the paths of a ResNet-18, and which are its heaviest paths?
==============================================================================

A block of a residual network can be walked through or skipped. :func:`dagpath.path_mass` says which share of the
squared path-norm Σ Φ² goes through each neuron, and :func:`dagpath.top_paths` finds the heaviest paths.
"""

# %%
# torchvision's ResNet-18 at full input size, with random weights; load yours in their place. Its batch norms get the
# statistics of a batch of noise: those they are made with belong to no data.
import torch
from matplotlib import pyplot as plt
from torchvision.models import resnet18

import dagpath
from dagpath import plots

torch.manual_seed(0)
model = resnet18()
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 1.0  # of the last batch alone
with torch.no_grad():
    model(torch.randn(4, 3, 224, 224))
model.eval()
traced = dagpath.trace(model, torch.zeros(1, 3, 224, 224))

# %%
# A neuron is a channel; ``traced.graph`` knows which layer made each. The convolutions of a block, one after the
# other, carry the same paths but for those that start at a bias.
shares = dagpath.path_mass(traced)
graph = traced.graph
layers = torch.zeros(len(graph.sites), dtype=shares.dtype).index_add_(0, graph.maker_of, shares)
mass = {site.module: float(share) for site, share in zip(graph.sites, layers, strict=True)}
blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
for block in blocks:
    kind = "projected" if f"{block}.downsample.0" in mass else "identity"
    print(f"{block}: {mass[f'{block}.conv2']:6.1%} of the mass through its convolutions, {kind} skip")

# %%
# The heaviest single paths. A path weighs the product of its weights, most of which are far below one, so that the
# shortest paths are the heaviest: those of the last biases. The mass lies in the longer ones, by their number.
for path in dagpath.top_paths(traced, 3, progress=False):
    print(path)
print(f"all paths through the first convolution together: share {mass['conv1']:.2f}")

# %%
values = [mass[f"{block}.conv2"] for block in blocks]
projected = [f"{block}.downsample.0" in mass for block in blocks]
_, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
for row, (value, has_projection) in enumerate(zip(values, projected, strict=True)):
    color, hatch = (plots.ORANGE, "//") if has_projection else (plots.BLUE, "")
    ax.barh(row, value, color=color, hatch=hatch, edgecolor="white")
ax.barh([0], [0], color=plots.BLUE, label="identity skip")
ax.barh([0], [0], color=plots.ORANGE, hatch="//", edgecolor="white", label="projected skip")
ax.set_yticks(range(len(blocks)), blocks)
ax.invert_yaxis()
ax.set(xlabel="share of Σ Φ² through the convolutions of the block", xlim=(0, 1))
ax.figure.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# **Every block carries most of the mass, and no single path carries much of it.** At a sum the two ways add their
# squared masses: the share of a block says how what its convolutions add compares with what its skip carries on. A
# block whose share is near zero is one that the mass goes around. :func:`dagpath.plots.mass_per_layer` draws the shares
# of all layers.
