"""The path Gram matrix of a small network and its diagonal, before and after balancing."""

import torch
from matplotlib import pyplot as plt
from torch import nn

import dagpath
from dagpath.plots import BLUE, ORANGE

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
with torch.no_grad():
    net[0].weight.mul_(3)
    net[4].weight.div_(3)
traced = dagpath.trace(net, torch.zeros(1, 3).double())
matrices = [dagpath.gram(traced).to_dense()]
dagpath.balance(traced).apply_()
matrices.append(dagpath.gram(traced).to_dense())

fig, axes = plt.subplots(2, 2, figsize=(6.0, 4.8), layout="constrained", height_ratios=[2.2, 1], sharex=True)
sizes = [parameter.numel() for parameter in net.parameters()]
ends = torch.tensor(sizes).cumsum(0).tolist()
logs = [matrix.abs().clamp_min(1e-12).log10().numpy() for matrix in matrices]
top = max(log.max() for log in logs)
for column, (log, matrix, title) in enumerate(zip(logs, matrices, ("before", "after balancing"), strict=True)):
    image = axes[0, column].imshow(log, cmap="cividis", vmin=top - 5, vmax=top, aspect="auto", interpolation="nearest")
    axes[0, column].set_title(title, fontsize=10)
    below = axes[1, column]
    start = 0
    for index, end in enumerate(ends):
        marker, colour = ("o", BLUE) if index % 2 == 0 else ("^", ORANGE)
        label = ("weights", "biases")[index % 2] if index < 2 else None
        below.plot(range(start, end), matrix.diagonal()[start:end], marker, color=colour, ms=3.5, label=label)
        start = end
    below.set(yscale="log", xlabel="parameter element")
    for ax in axes[:, column]:
        for end in ends[:-1]:
            ax.axvline(end - 0.5, color="black", lw=0.4)
low, high = (float(bound) for bound in torch.stack([matrix.diagonal() for matrix in matrices]).aminmax())
for ax in axes[1]:
    ax.set_ylim(low / 2, high * 2)
axes[0, 0].set_ylabel("parameter element")
axes[1, 0].set_ylabel("diagonal of G")
axes[1, 0].legend(fontsize=8, loc="upper left")
fig.colorbar(image, ax=axes[0], label="log10 |G|")
