"""Plain architectures for studies."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers of the given widths, the input's first, with ReLU between them.

    Args:
        *widths: of the input, the hidden layers and the output.
        bias: do the layers have biases?

    Returns:
        The network, as PyTorch initializes it.

    Example:
        >>> from dagpath.study import mlp
        >>> [type(layer).__name__ for layer in mlp(64, 32, 10)]
        ['Linear', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(*channels: int, classes: int = 10, pool_after: int = 2, bias: bool = True) -> nn.Sequential:
    """3×3 convolutions of the given channels, the input's first, with ReLU; the mean over places; a linear layer.

    Args:
        *channels: of the input and of each convolution.
        classes: outputs.
        pool_after: a maximum over 2×2 follows every so many convolutions, but not the last.
        bias: do the layers have biases?

    Returns:
        The network, as PyTorch initializes it.

    Example:
        >>> import torch
        >>> from dagpath.study import cnn
        >>> cnn(3, 16, 32, classes=10)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(channels), start=1):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.ReLU()]
        if index % pool_after == 0 and index < len(channels) - 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes, bias))
