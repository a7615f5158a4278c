"""Rescale a ResNet-18 and a ResNet-50 on a real photograph, and show what was found and that nothing changed.

python examples/rescale_resnet.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from resnet import resnet18, resnet50
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import dagpath
from dagpath.report import fixed_summary


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
    """Give the batch norms the statistics of real activations: forward passes over crops of the photograph."""
    model.train()
    crops = torch.cat([image, image.flip(3), image.roll(40, 2), image.roll(40, 3)])
    for _ in range(20):
        model(crops)
    model.eval()


def report(name: str, model: nn.Module, image: Tensor) -> Table:
    exact = copy.deepcopy(model)
    with torch.no_grad():
        before = model(image)
        found = dagpath.rescale_(model, image)
        after = model(image)
        powers = dagpath.rescale_(exact, image, power_of_two=True)
        bitwise = torch.equal(exact(image), before)

    graph = found.traced.graph
    table = Table(title=f"{name}: {graph.num_parameters:,} parameters", title_justify="left", title_style="bold")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row("neurons", f"{graph.num_neurons:,}")
    table.add_row("free scale groups", f"{graph.num_groups:,}")
    table.add_row("fixed neurons", f"{int((graph.group_of == 0).sum()):,}")
    for count, reason in fixed_summary(graph):
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
    table.add_row("largest difference of outputs", f"{float((after - before).abs().max()):.1e}")
    table.add_row("largest output", f"{float(before.abs().max()):.1e}")
    table.add_row("criterion, powers of two", f"{powers.objective[1]:,.1f}")
    table.add_row("outputs bitwise equal, powers of two", "yes" if bitwise else "NO")
    return table


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    image = photograph()
    for name, model in (("ResNet-18", resnet18()), ("ResNet-50", resnet50())):
        settle_batch_norm(model, image)
        console.print(report(name, model, image))


if __name__ == "__main__":
    main()
