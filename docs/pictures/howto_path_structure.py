"""The spectrum of a path Gram matrix before and after balancing."""

import torch
from torch import nn

import dagpath
from dagpath import plots

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4)).double()
traced = dagpath.trace(net, torch.zeros(1, 8, dtype=torch.float64))
axes = plots.gram_spectrum(traced, dagpath.balance(traced), plots.new_axes(None, height=3.4))
