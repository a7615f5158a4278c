"""torchvision's models with random weights and statistics, and their outputs: for the benchmarks and the tests."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_OPERATORS: list[torch.library.Library] = []  # an operator exists as long as the library that defines it


def _import_models() -> ModuleType:
    """Import ``torchvision.models``, also where torchvision's compiled operators cannot be loaded.

    Its models do not need them, but importing torchvision there fails for want of their names. The names are defined
    only after such a failure: an operator that is defined twice aborts Python.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what was imported before the failure
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.append(library)
    return importlib.import_module("torchvision.models")


models = _import_models()


def build(name: str) -> nn.Module:
    """A model with random weights, and batch norms with random statistics."""
    options: dict[str, object] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": True}
    if name in models.list_models(module=models.segmentation):
        options |= {"weights_backbone": None}
        if not name.startswith("lraspp"):
            options |= {"aux_loss": True}
    torch.manual_seed(0)
    model: nn.Module = models.get_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model.eval()


def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        found = [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
        for buffer, saved in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    model.eval()
    return found


def relative(after: list[Tensor], before: list[Tensor]) -> float:
    """Largest difference over the largest entry; an output of zeros must stay one."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(after, before, strict=True))
