"""
Does a rescaled copy of a network learn the same?
=================================================

A rescaling changes the parameters and not the function. But the gradient changes with the parameters, so that two
copies of one function may learn differently. Which optimizers tell them apart?
"""

# %%
# The digits of scikit-learn, and a network with a rescaled copy: each hidden neuron has a random factor. The network
# starts as G-SGD asks for, with one weight of 1 into and out of each hidden neuron, its *skeleton*. A little noise on
# top leaves no two paths equally heavy, for G-SGD chooses its skeleton at the heaviest ones.
import copy

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import dagpath
from dagpath import optim, plots, study

digits = load_digits()
images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
torch.manual_seed(0)
model = study.mlp(64, 32, 32, 10).double()
optim.GSGD(dagpath.trace(model, images[:1]), lr=0.0, skeleton="ones")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
rescaled = copy.deepcopy(model)
dagpath.random_rescaling(dagpath.trace(rescaled, images[:1]), sigma=0.5).apply_()
with torch.no_grad():
    print(f"largest difference of outputs at the start: {float((model(images) - rescaled(images)).abs().max()):.0e}")


# %%
# Both are trained in the same way, on the same batches. The learning rates of the optimizers are in different units
# (those of path values for the last two), so the curves of different optimizers are not to be compared.
def losses(network, make, steps=150):
    network = copy.deepcopy(network)
    optimizer = make(dagpath.trace(network, images[:1]))
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        batch = torch.randint(len(images), (128,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


optimizers = {
    "SGD": lambda traced: torch.optim.SGD(traced.model.parameters(), lr=0.1),
    "Adam": lambda traced: torch.optim.Adam(traced.model.parameters(), lr=0.002),
    "G-SGD": lambda traced: optim.GSGD(traced, lr=0.1),
    "Path-SGD": lambda traced: optim.PathSGD(traced, lr=0.2),
}
curves = {name: (losses(model, make), losses(rescaled, make)) for name, make in optimizers.items()}
for name, (original, copied) in curves.items():
    difference = float((original - copied).abs().max())
    print(f"{name:8} loss at the end {original[-1]:.4f} and {copied[-1]:.4f}, largest difference {difference:.0e}")

# %%
_, axes = plt.subplots(2, 2, figsize=(5.2, 4.4), layout="constrained", sharex=True, sharey=True)
for ax, (name, (original, copied)) in zip(axes.flat, curves.items(), strict=True):
    ax.plot(original, color=plots.BLUE, linewidth=3, alpha=0.6, label="original")
    ax.plot(copied, color=plots.ORANGE, linestyle="--", marker="^", markevery=25, label="rescaled copy")
    ax.set(title=name, yscale="log")
    ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    ax.minorticks_off()
axes[0, 0].legend()
axes[0, 0].set(ylabel="loss")
axes[1, 0].set(ylabel="loss", xlabel="step")
axes[1, 1].set(xlabel="step")
plt.show()

# %%
# **With SGD and with Adam it does not; with G-SGD and with Path-SGD it does, up to rounding.** The last two take
# their steps in the values of paths, which no rescaling changes. That is why it matters where among all its
# rescalings a network is when SGD starts, and what :func:`dagpath.rescale_` chooses.
