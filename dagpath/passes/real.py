"""What every node of a captured graph computes from an input, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.capture.graph import CapturedGraph
from dagpath.passes.values import dense, mapped


class RealFlow(fx.Interpreter):
    """Runs a captured graph on real tensors, all of it in float64 on the CPU."""

    def __init__(self, graph: CapturedGraph) -> None:
        super().__init__(graph.module, garbage_collect_values=False)

    @torch.no_grad()
    def values(self, given: Mapping[str, Any]) -> Mapping[fx.Node, Any]:
        """The values of all nodes.

        Args:
            given: placeholder name -> value: parameters, buffers and inputs.
        """
        placeholders = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        self.run(*(widened(given[name]) for name in placeholders), enable_io_processing=False)
        return self.env

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *mapped((args, kwargs), object, widened))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widened(super().get_attr(target, args, kwargs))


def widened(value: Any) -> Any:
    """Floating-point tensors and types in float64, and everything on the CPU."""
    if isinstance(value, Tensor):
        value = dense(value)
        return value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return torch.device("cpu") if isinstance(value, torch.device) else value
