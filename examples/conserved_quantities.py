"""
What does gradient flow conserve, and how fast does gradient descent lose it?
=============================================================================

The squares of the weights into a hidden neuron, less the squares of those out of it, stay what they are under
gradient flow: the loss does not change under a rescaling. Gradient descent takes steps of finite size, and moves
them. How does the drift depend on the learning rate? :func:`dagpath.conserved_quantities` has one number for each
free scale group.
"""

# %%
# A network learns digits of scikit-learn by full-batch gradient descent, always for the same *time*, which is the
# number of steps times the learning rate.
from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import dagpath
from dagpath import plots, study

digits = load_digits()
images, labels = torch.tensor(digits.data[:300] / 16), torch.tensor(digits.target[:300])


def drift(rate, time, points=12):
    """Times, and the relative change of the conserved quantities since the start."""
    torch.manual_seed(0)
    model = study.mlp(64, 50, 30, 10).double()
    traced = dagpath.trace(model, images[:1])
    optimizer = torch.optim.SGD(model.parameters(), rate)
    start = dagpath.conserved_quantities(traced)
    steps = round(time / rate)
    times, changes = [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step % (steps // points) == 0:
            times.append(step * rate)
            changes.append(float((dagpath.conserved_quantities(traced) - start).norm() / start.norm()))
    return times, changes


# %%
# Each learning rate is a quarter of the one before.
rates = (0.2, 0.05, 0.0125)
curves = [drift(rate, time=19.2) for rate in rates]
for rate, (times, changes) in zip(rates, curves, strict=True):
    print(f"learning rate {rate:<6g} relative change after time {times[-1]:.3g}: {changes[-1]:.2e}")
for (_, coarse), (_, fine) in pairwise(curves):
    print(f"a quarter of the learning rate: the drift is {coarse[-1] / fine[-1]:.2f} times smaller")

# %%
_, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
colors = (plots.ORANGE, plots.BLUE, plots.GREEN)
for rate, (times, changes), color, marker in zip(rates, curves, colors, "osD", strict=True):
    ax.plot(times, changes, color=color, marker=marker, label=f"learning rate {rate:g}")
ax.set(xlabel="time (steps × learning rate)", ylabel="relative change of Σ in² − Σ out²", yscale="log")
ax.legend()
plt.show()

# %%
# **As fast as its learning rate says.** Over the same time the drift is proportional to the learning rate: a step of
# size η changes the quantities by η² times something that depends on the gradients alone, and there are 1/η times as
# many of them.
