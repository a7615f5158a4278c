"""How the masses of paths spread over their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import NOTHING, Mass, leaves, mapped


@dataclass(frozen=True)
class PartedMass(Mass):
    """A mass with its parts by the length of the paths: their values add up to its own and share its scale."""

    parts: Mapping[int, Tensor] = field(default_factory=dict, repr=False)


class LengthFlow(PowerFlow):
    """``Σ |Φ|^q`` by the number of layers that a path has crossed.

    Every operation is affine in the masses of activations. So each part of what enters it goes through its linear part,
    which is its derivative, and what it is at zero are paths that start there.

    Args:
        graph, parameters, rule, cut, kept, dtype, power: see :class:`~dagpath.passes.powers.PowerFlow`.
        progress: show a bar if it takes more than two seconds.
    """

    def __init__(self, *graph: Any, progress: bool = False, **options: Any) -> None:
        super().__init__(*graph, **options)
        total = len(self.graph_inputs.module.graph.nodes)
        self._bar = tqdm(total=total, desc="path lengths", disable=not progress, leave=False, delay=2)

    def shares(self) -> dict[int, float]:
        """Length -> share of the sum over all paths, in ascending order."""
        with self._bar:
            self.run_graph()
        top = max((sink.magnitude for sink in self.sinks), default=NOTHING)
        sums: dict[int, float] = {}
        for sink in self.sinks:
            for length, part in getattr(sink, "parts", {0: sink.values}).items():
                sums[length] = sums.get(length, 0.0) + float(self.shifted(part, sink.log2_scale - top).sum())
        total = sum(sums.values())
        return {length: sums[length] / total if total else 0.0 for length in sorted(sums)}

    def run_node(self, n: fx.Node) -> Any:
        self._bar.update()
        return super().run_node(n)

    def inputs(self, output: Any) -> Any:
        return mapped(super().inputs(output), Mass, lambda mass: _parted(mass, {0: mass.values}))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        entering = leaves((args, kwargs), PartedMass)
        start = len(self.sinks)
        whole = super().call_function(target, args, kwargs)
        if not entering:
            return whole
        ends = self.sinks[start:]
        parts: list[dict[int, Tensor]] = [{} for _ in _masses(whole)]
        step = int(self.node in self.layers)

        def run(convert: Any) -> list[Mass]:
            result = super(LengthFlow, self).call_function(target, *mapped((args, kwargs), object, convert))
            self.sinks[start:] = ends
            return _masses(result)

        def at_zero(leaf: Any) -> Any:
            return replace(leaf, values=torch.zeros_like(leaf.values), zero=True) if _is_parted(leaf) else leaf

        points = {id(mass): mass.values.detach().requires_grad_() for mass in entering}

        def at_points(leaf: Any) -> Any:
            return replace(leaf, values=points[id(leaf)]) if _is_parted(leaf) else leaf

        for found, new, mass in zip(parts, run(at_zero), _masses(whole), strict=True):
            if not new.zero:
                found[step] = self.at(new, mass.log2_scale)
        with torch.enable_grad():
            reached = [(found, mass.values) for found, mass in zip(parts, run(at_points), strict=True)]
            reached = [(found, values) for found, values in reached if values.requires_grad]
            move = _Linear([values for _, values in reached], points) if reached else None
        for length in sorted({length for mass in entering for length in mass.parts}):
            if move is None:  # no path goes on
                break
            given = {id(mass): mass.parts[length] for mass in entering if length in mass.parts}
            for (found, _), part in zip(reached, move(given), strict=True):
                if bool(part.any()):
                    crossed = length + step
                    found[crossed] = found[crossed] + part if crossed in found else part
        each = iter(parts)
        return mapped(whole, Mass, lambda mass: _parted(mass, next(each)))


class _Linear:
    """The linear part of an affine map.

    The backward pass is linear in what is fed to it, so its own backward pass is the map's linear part. (Forward mode
    would do, but threads share its one level.)

    Args:
        outputs: of the map.
        inputs: what they were computed from.
    """

    def __init__(self, outputs: list[Tensor], inputs: Mapping[int, Tensor]) -> None:
        self._feeds = [torch.zeros_like(values, requires_grad=True) for values in outputs]
        points = list(inputs.values())
        slopes = torch.autograd.grad(outputs, points, self._feeds, create_graph=True, materialize_grads=True)
        self._slopes = dict(zip(inputs, slopes, strict=True))

    def __call__(self, given: Mapping[int, Tensor]) -> Sequence[Tensor]:
        """Where it takes these inputs, the others being zero."""
        live = [(self._slopes[key], part) for key, part in given.items() if self._slopes[key].requires_grad]
        if not (live and self._feeds):  # a barrier has no output that its inputs reach
            return [torch.zeros_like(feed) for feed in self._feeds]
        slopes, parts = zip(*live, strict=True)
        return torch.autograd.grad(slopes, self._feeds, parts, retain_graph=True, materialize_grads=True)


def _masses(tree: Any) -> list[Mass]:
    return leaves(tree, Mass)


def _is_parted(leaf: Any) -> bool:
    return isinstance(leaf, PartedMass)


def _parted(mass: Mass, parts: Mapping[int, Tensor]) -> PartedMass:
    return PartedMass(mass.values, mass.log2_scale, mass.zero, mass.data, mass.params, mass.node, parts)
