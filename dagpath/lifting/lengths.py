"""How the masses of paths spread over their lengths."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from tqdm.auto import tqdm

from dagpath.flow.powers import PowerFlow
from dagpath.flow.values import NOTHING, Mass, leaves, mapped


@dataclass(frozen=True)
class PartedMass(Mass):
    """A mass with its parts by the length of the paths: their values add up to its own and share its exponent."""

    parts: Mapping[int, Tensor] = field(default_factory=dict, repr=False)


class LengthFlow(PowerFlow):
    """``Σ |Φ|^q`` by the number of layers that a path has crossed.

    Every operation is affine in the masses of activations. So each part of what enters it goes through its linear part,
    which is its derivative, and what it is at zero are paths that start there.

    Args:
        graph, parameters, rule, cut, kept, dtype, exponent: see :class:`~dagpath.flow.powers.PowerFlow`.
        progress: show a bar if it takes more than two seconds.
    """

    def __init__(self, *graph: Any, progress: bool = False, **options: Any) -> None:
        super().__init__(*graph, **options)
        total = len(self.graph_inputs.module.graph.nodes)
        self._bar = tqdm(total=total, desc="path lengths", disable=not progress, leave=False, delay=2)

    def shares(self) -> dict[int, float]:
        """Length -> share of the sum over all paths, in ascending order."""
        with self._bar, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's forward mode is scripted at its first use
            self.run_graph()
        top = max((sink.magnitude for sink in self.sinks), default=NOTHING)
        sums: dict[int, float] = {}
        for sink in self.sinks:
            for length, part in getattr(sink, "parts", {}).items():
                sums[length] = sums.get(length, 0.0) + float(self.shifted(part, sink.exponent - top).sum())
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

        def towards(leaf: Any) -> Any:
            if not _is_parted(leaf):
                return leaf
            part = leaf.parts.get(length)
            tangent = torch.zeros_like(leaf.values) if part is None else part
            return replace(leaf, values=_dual(leaf.values, tangent))

        for found, new, mass in zip(parts, run(at_zero), _masses(whole), strict=True):
            if not new.zero:
                found[step] = self.shifted(new.values, new.exponent - mass.exponent)
        for length in sorted({length for mass in entering for length in mass.parts}):
            with forward_ad.dual_level():
                for found, mass in zip(parts, run(towards), strict=True):
                    part = _tangent(mass.values)
                    if part is not None and bool(part.any()):
                        crossed = length + step
                        found[crossed] = found[crossed] + part if crossed in found else part
        given = iter(parts)
        return mapped(whole, Mass, lambda mass: _parted(mass, next(given)))


def _masses(tree: Any) -> list[Mass]:
    return leaves(tree, Mass)


def _dual(values: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(values, tangent)  # type: ignore[no-untyped-call]
    return dual


def _tangent(values: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(values).tangent  # type: ignore[no-untyped-call]
    return tangent


def _is_parted(leaf: Any) -> bool:
    return isinstance(leaf, PartedMass)


def _parted(mass: Mass, parts: Mapping[int, Tensor]) -> PartedMass:
    return PartedMass(mass.values, mass.exponent, mass.zero, mass.data, mass.params, mass.node, parts)
