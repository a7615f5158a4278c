"""
What changes when a ResNet is rescaled, and what does not?
==========================================================

One call of :func:`dagpath.rescale_` gives every free channel of a ResNet-18 and of a ResNet-50 the scale at which the
diagonal of the path Gram matrix is most even. The input is a real photograph. The tables say what was found, what it
took, and that the function is the one it was: ``python examples/rescale_resnet.py`` prints them.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
import torch.nn.functional as F
from resnet import resnet18, resnet50
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import dagpath

# %%
# The image, and networks with random weights whose batch norms know the statistics of real activations; load yours in
# place of them. The script needs ``rich`` and scikit-learn, and :download:`resnet.py <../../examples/resnet.py>` beside
# it, which holds the networks (in the repository both are in ``examples``).


def photograph(size: int = 224) -> Tensor:
    """A photograph of a Chinese temple, cropped to a square and normalized as ImageNet images are."""
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    edge = min(pixels.shape[1:])
    top, left = (pixels.shape[1] - edge) // 2, (pixels.shape[2] - edge) // 2
    square = pixels[None, :, top : top + edge, left : left + edge]
    image = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@torch.no_grad()
def settle_batch_norm(model: nn.Module, image: Tensor) -> None:
    """Give the batch norms the statistics of one forward pass over the photograph."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # keep those of the last pass alone
    model.train()
    model(image)
    model.eval()


# %%
# What the tables say. A copy is rescaled by powers of two, after which its outputs have to be bitwise equal.


def report(name: str, found: dagpath.Rescaling, exact: dagpath.Rescaling, bitwise: bool, largest: float) -> Table:
    graph = found.traced.graph
    table = Table(title=f"{name}: {graph.num_parameters:,} parameters", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row("neurons", f"{graph.num_neurons:,}")
    table.add_row("free scale groups", f"{graph.num_groups:,}")
    table.add_row("fixed neurons", f"{int((graph.group_of == 0).sum()):,}")
    causes = [graph.causes[index] for index in graph.cause_of[graph.cause_of >= 0].tolist()]
    for reason, count in Counter(f"{cause.reason} ({cause.site.operation})" for cause in causes).most_common():
        table.add_row(f"  {reason}", f"{count:,}")
    table.add_section()
    table.add_row("criterion before", f"{found.objective[0]:,.1f}")
    table.add_row("criterion after", f"{found.objective[1]:,.1f}")
    table.add_row("optimality ‖∇F‖∞ / p", f"{found.optimality:.1e}")
    table.add_row("Newton iterations", f"{found.iterations}")
    table.add_row("scale factors", f"{found.log_scales.exp().min():.3f} to {found.log_scales.exp().max():.3f}")
    table.add_section()
    for stage, seconds in found.stages.items():
        table.add_row(f"seconds: {stage}", f"{seconds:.3f}")
    table.add_row("seconds: all", f"{found.seconds:.3f}")
    table.add_section()
    table.add_row("largest difference of outputs, relative", f"{found.difference:.1e}")
    table.add_row("largest output", f"{largest:.1e}")
    table.add_row("criterion, powers of two", f"{exact.objective[1]:,.1f}")
    table.add_row("outputs bitwise equal, powers of two", "yes" if bitwise else "NO")
    return table


@torch.no_grad()
def rescaled(name: str, model: nn.Module, image: Tensor) -> dagpath.Rescaling:
    """Rescale the model and a copy of it, and print what was found."""
    settle_batch_norm(model, image)
    before, twin = model(image), copy.deepcopy(model)
    found = dagpath.rescale_(model, image)
    exact = dagpath.rescale_(twin, image, power_of_two=True, verify=False)  # compared here
    bitwise = torch.equal(twin(image), before)
    Console(color_system=None).print(report(name, found, exact, bitwise, float(before.abs().max())))
    return found


def main() -> list[dagpath.Rescaling]:
    torch.manual_seed(0)
    image = photograph()
    return [rescaled(name, model, image) for name, model in (("ResNet-18", resnet18()), ("ResNet-50", resnet50()))]


if __name__ == "__main__":
    found = main()

# %%
# **The scale of the channels changes, the function does not.** These are the factors of the free channels of the
# ResNet-18, layer by layer: what follows a normalization, and what the residual connections share.
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    from dagpath import plots

    ax = plt.subplots(figsize=(5.2, 4.8), layout="constrained")[1]
    plots.scale_factors(found[0], ax)
    ax.tick_params(axis="y", labelsize=9)
    plt.show()
