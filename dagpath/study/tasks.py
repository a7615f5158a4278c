"""What is learned in the comparisons of training: small networks on the images that scikit-learn ships."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagpath.study.architectures import cnn, mlp


@dataclass(frozen=True)
class Task:
    """A network, the images it learns, and what it minimizes.

    Attributes:
        build: makes a network.
        data: loads inputs and targets.
        loss: of outputs and targets.

    Example:
        >>> import torch
        >>> from dagpath.study import Task, mlp
        >>> def data():
        ...     x = torch.linspace(-1, 1, 64)[:, None]
        ...     return x, x.abs()
        >>> task = Task(lambda: mlp(1, 16, 1), data, torch.nn.functional.mse_loss)
        >>> inputs, targets = task.data()
        >>> task.build()(inputs).shape == targets.shape
        True
    """

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)


def _flat_digits() -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    return images.flatten(1), labels


def _digits_twice() -> tuple[Tensor, Tensor]:
    images = _flat_digits()[0]
    return images, images


def _digit_images() -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    return images[:, None], labels


@functools.cache
def _patches(size: int = 16) -> tuple[Tensor, Tensor]:
    """The two sample images in patches, and which of the two each is from."""
    from sklearn.datasets import load_sample_images

    patches, labels = [], []
    for label, image in enumerate(load_sample_images().images):
        pixels = torch.tensor(np.array(image), dtype=torch.float32).movedim(2, 0) / 255
        cut = pixels.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).movedim(1, 0)
        patches.append(cut)
        labels.append(torch.full((len(cut),), label))
    whole = torch.cat(patches)
    return (whole - whole.mean((0, 2, 3), keepdim=True)) / whole.std((0, 2, 3), keepdim=True), torch.cat(labels)


TASKS = {
    "MLP, constant width": Task(lambda: mlp(64, 128, 128, 128, 128, 10), _flat_digits, F.cross_entropy),
    "MLP, narrowing": Task(lambda: mlp(64, 256, 128, 64, 32, 10), _flat_digits, F.cross_entropy),
    "autoencoder": Task(lambda: mlp(64, 128, 32, 8, 32, 128, 64), _digits_twice, F.mse_loss),
    "CNN on digits": Task(lambda: cnn(1, 64, 32, 16, 64, 32), _digit_images, F.cross_entropy),
    "CNN on patches": Task(lambda: cnn(3, 32, 16, 32, classes=2, pool_after=1), _patches, F.cross_entropy),
}
"""Name of a task -> the :class:`dagpath.study.Task`. They learn the 1,797 digits of scikit-learn (8 × 8), as classes
and as an autoencoder's input, and its two sample images in patches of 16 × 16, to be told apart."""
