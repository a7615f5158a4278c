"""
How soon does training leave the balance, and does Rebalance keep it?
=====================================================================

A network that was balanced before training is not balanced after it. :class:`dagpath.optim.Rebalance` balances it
again after every k-th step of the optimizer, whose state it carries along. How far does training move in between?
"""

# %%
# The digits of scikit-learn, and a network whose layers grow narrower. The distance from balance is the criterion of
# path conditioning less its minimum over all rescalings, per parameter: zero where the network is balanced.
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import dagpath
from dagpath import optim, plots, study

digits = load_digits()
images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)


def imbalance(traced):
    found = dagpath.balance(traced)
    return (found.objective[0] - found.objective[1]) / found.live


def train(balanced, every, steps=300):
    """The distance from balance after every fifth step, and the loss of each step."""
    torch.manual_seed(0)
    model = study.mlp(64, 96, 48, 24, 10).double()
    if balanced:
        dagpath.rescale_(model, images[:1])
    traced = dagpath.trace(model, images[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if every:
        optim.Rebalance(traced, optimizer, every)
    generator = torch.Generator().manual_seed(0)
    distances, losses = [imbalance(traced)], []
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (128,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            distances.append(imbalance(traced))
        losses.append(loss.item())
    return distances, losses


# %%
# Three runs, with the same batches. They are balanced:
runs = {
    "never": train(balanced=False, every=0),
    "at the start only": train(balanced=True, every=0),
    "every 50 steps": train(balanced=True, every=50),
}
for name, (distances, losses) in runs.items():
    late = sum(losses[-50:]) / 50
    print(f"{name:17} distance at the start {distances[0]:.4f}, at the end {distances[-1]:.4f}")
    print(f"    largest after the start {max(distances[1:]):.4f}, mean loss of the last 50 steps {late:.3f}")

# %%
_, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
colors = (plots.GREY, plots.BLUE, plots.ORANGE)
for (name, (distances, _)), color, marker in zip(runs.items(), colors, "Do^", strict=True):
    ax.plot(range(0, 301, 5), distances, color=color, marker=marker, markevery=5, label=name)
ax.set(xlabel="step", ylabel="F above its minimum, per parameter")
ax.figure.legend(loc="outside lower center", ncols=3, fontsize=9)
plt.show()

# %%
# **Training leaves the balance within a few dozen steps; Rebalance keeps it.** While the network learns fast, these
# steps take it a good part of the way from balance; later it hardly moves, so that there is little left to do. What the
# loss gains is another question: one run says nothing about it, and :doc:`/benchmarks/training_study` compares many.
