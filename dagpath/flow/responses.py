"""What an operation multiplies its input by: its rule of masses, run on equal entries."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.capture import CapturedGraph
from dagpath.flow.constants import Constants
from dagpath.flow.powers import PowerFlow
from dagpath.flow.values import Call, Mass, ldexp_, leaves, mapped

_LARGEST = 32
"""Sums of this power are as good as the maximum for the weights of an interpolation: (1/3)^32 is 5e-16."""


_FILL = 2.0**200
"""The mass of every entry: so large that what constants add can be subtracted without a trace."""


@dataclass(frozen=True)
class Response:
    """How one call treats paths.

    Attributes:
        ended: operands whose paths end here.
        data: for each tensor that the call returns, does it depend on an activation?
        factors: for each, the largest constant that an entry of the only operand is multiplied by on its way to each
            entry; empty where all are 1, where several activations enter, and where paths end.
        constants: for each, what constants alone contribute to each entry; as long as ``factors``.
    """

    ended: tuple[fx.Node, ...]
    data: tuple[bool, ...]
    factors: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()


class Responses:
    """Measures calls of a captured graph at the current values of parameters and buffers.

    Args:
        graph: the eval graph of a model.
        values: the true values of what does not depend on the input.
        rule: finds the rule of a call's target.
        cut: calls through which no path goes.
        kept: which factor paths go through, for calls that multiply two activations.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        values: Constants,
        rule: Callable[[Any], Any],
        cut: Container[fx.Node],
        kept: Mapping[fx.Node, int],
    ) -> None:
        self._graph = graph
        self._values = values
        self._rule = rule
        self._cut = cut
        self._kept = kept

    def __call__(self, node: fx.Node, data: Mapping[fx.Node, bool]) -> Response:
        """The response of a call.

        Args:
            node: the call.
            data: those of its operands that are activations -> do they depend on a parameter?
        """
        filled, sinks = self._run(node, data, 1, _FILL)
        ended = tuple(mass.node for mass in sinks if mass.node is not None)
        flags = tuple(mass is not None and mass.data for mass in filled)
        if ended or len(data) != 1 or not any(flags):
            return Response(ended, flags)
        constants = [_plain(mass) for mass in self._run(node, data, 1, 0.0)[0]]
        sums = [(_plain(mass) - constant) / _FILL for mass, constant in zip(filled, constants, strict=True)]
        squares = self._sums(node, data, 2)
        if all(map(_is_one, (*sums, *squares))) and not any(bool(constant.any()) for constant in constants):
            return Response(ended, flags)
        factors = [_ratio(square, plain) for square, plain in zip(squares, sums, strict=True)]
        counts = [_ratio(plain, factor) for plain, factor in zip(sums, factors, strict=True)]
        if any(bool(((count - count.round()).abs() > 1e-9 * count).any()) for count in counts):  # not all weights equal
            high, higher = (self._sums(node, data, power) for power in (_LARGEST, _LARGEST + 1))
            factors = [_ratio(above, below) for above, below in zip(higher, high, strict=True)]
        return Response(ended, flags, tuple(factors), tuple(constants))

    def _sums(self, node: fx.Node, data: Mapping[fx.Node, bool], power: float) -> list[Tensor]:
        """For each entry, the sum of ``|w|^power`` over the weights w of the operand's entries."""
        filled, empty = (self._run(node, data, power, fill)[0] for fill in (_FILL, 0.0))
        return [(_plain(one) - _plain(constant)) / _FILL for one, constant in zip(filled, empty, strict=True)]

    def _run(
        self, node: fx.Node, data: Mapping[fx.Node, bool], power: float, fill: float
    ) -> tuple[list[Mass | None], list[Mass]]:
        """The masses that a call returns if every entry of its activations is ``fill``, and those that end in it."""
        flow = PowerFlow(self._graph, {}, self._rule, self._cut, self._kept, exponent=power)
        flow.node, flow.real_node = node, self._values

        def operand(argument: fx.Node) -> Any:
            if argument not in data:
                value = self._values(argument)
                return mapped(value, Tensor, lambda t: replace(flow.constant(t), node=argument))

            def filled(fake: Tensor) -> Mass:
                values = torch.full(fake.shape, fill, dtype=torch.float64)
                return Mass(values, zero=fill == 0, data=True, params=data[argument], node=argument)

            return mapped(argument.meta.get("val"), Tensor, filled)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        call = Call(node.target, args, dict(kwargs), node)  # type: ignore[arg-type]
        result = flow.barrier(call) if node in self._cut else self._rule(node.target).mass(flow, call)
        found = leaves(result, object)
        return [leaf if isinstance(leaf, Mass) else None for leaf in found], flow.sinks


def _plain(mass: Mass | None) -> Tensor:
    if mass is None:
        return torch.zeros((), dtype=torch.float64)
    return ldexp_(mass.values.clone(), mass.exponent)


def _is_one(values: Tensor) -> bool:
    return bool((values == 1).all())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
