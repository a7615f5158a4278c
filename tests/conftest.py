"""Makes torchvision's model definitions importable beside a PyTorch build without its compiled operators."""

import contextlib

import torch
from hypothesis import settings

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # a full torchvision defines them itself
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
