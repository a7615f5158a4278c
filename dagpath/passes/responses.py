"""What an operation multiplies its input by: its rule of masses, run on equal entries."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dagpath.capture.graph import CapturedGraph
from dagpath.passes.constants import Constants
from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import Call, Mass, ldexp_, leaves, mapped
from dagpath.passes.weights import Magnitudes, WeightMasses

_LARGEST = 32
"""Sums of this power are as good as the maximum for the weights of an interpolation: (1/3)^32 is 5e-16."""


_EQUAL = 1e-9
"""Weights are equal if the powers of their sums say so up to rounding."""

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
        sums: for each, the sum of the constants that entries of the operand are multiplied by; empty where paths
            end, and where several activations enter.
        is_even: are the constants that the entries of the operand are multiplied by the same wherever several meet?
    """

    ended: tuple[fx.Node, ...]
    data: tuple[bool, ...]
    factors: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()
    sums: tuple[Tensor, ...] = ()
    is_even: bool = True


class Responses:
    """Measures calls of a captured graph at the current values of parameters and buffers.

    Args:
        graph: the eval graph of a model.
        values: the true values of what does not depend on the input.
        masses: what weights carry.
        rule: finds the rule of a call's target.
        cut: calls through which no path goes.
        kept: which factor paths go through, for calls that multiply two activations.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        values: Constants,
        masses: WeightMasses,
        rule: Callable[[Any], Any],
        cut: Container[fx.Node],
        kept: Mapping[fx.Node, int],
    ) -> None:
        self._graph = graph
        self._values = values
        self._masses = masses
        self._rule = rule
        self._cut = cut
        self._kept = kept
        self._weights = True

    def __call__(self, node: fx.Node, data: Mapping[fx.Node, bool], weights: bool = True) -> Response:
        """The response of a call.

        Args:
            node: the call.
            data: those of its operands that are activations -> do they depend on a parameter?
            weights: with the values of its weights? Else these are zero.
        """
        self._weights = weights
        filled, sinks = self._run(node, data, 1, _FILL)
        ended = tuple(mass.node for mass in sinks if mass.node is not None)
        flags = tuple(mass is not None and mass.data for mass in filled)
        if ended or len(data) != 1 or not any(flags):
            return Response(ended, flags)
        constants = [_plain(mass) for mass in self._run(node, data, 1, 0.0)[0]]
        sums = [(_plain(mass) - constant) / _FILL for mass, constant in zip(filled, constants, strict=True)]
        squares = self._sums(node, data, 2)
        if all(map(_is_one, (*sums, *squares))) and not any(bool(constant.any()) for constant in constants):
            return Response(ended, flags, sums=tuple(sums))
        factors = [_ratio(square, plain) for square, plain in zip(squares, sums, strict=True)]
        cubes = self._sums(node, data, 3)
        even = all(  # Cauchy and Schwarz: equal only where all weights are
            bool(((cube * plain - square.square()).abs() <= _EQUAL * square.square()).all())
            for plain, square, cube in zip(sums, squares, cubes, strict=True)
        )
        if not even:
            high, higher = (self._sums(node, data, power) for power in (_LARGEST, _LARGEST + 1))
            factors = [_ratio(above, below) for above, below in zip(higher, high, strict=True)]
        return Response(ended, flags, tuple(factors), tuple(constants), tuple(sums), even)

    def constants(self, node: fx.Node, data: Mapping[fx.Node, bool]) -> Magnitudes:
        """What constants and weights alone contribute to each entry of the first tensor that a call returns."""
        self._weights = True
        first, second = (_plain(self._run(node, data, power, 0.0)[0][0]) for power in (1, 2))
        return Magnitudes((first, second))

    def adds(self, node: fx.Node, data: Mapping[fx.Node, bool]) -> bool:
        """Does a call return the sum of what it makes of its operands one by one?"""
        whole, nothing = (self._run(node, data, 1, fill)[0] for fill in (1.0, 0.0))
        parts = [self._run(node, data, 1, {used: float(used is one) for used in data})[0] for one in data]
        for index, mass in enumerate(whole):
            left = _plain(nothing[index])
            total = sum((_plain(part[index]) - left for part in parts), start=left)
            if not torch.allclose(_plain(mass), total, rtol=1e-9, atol=0):
                return False
        return True

    def of_entries(self, node: fx.Node, operand: fx.Node, values: Tensor) -> Tensor:
        """What a call makes of these masses of its only operand, without what constants contribute."""
        filled, empty = (
            _plain(self._run(node, {operand: True}, 1, {operand: fill})[0][0]) for fill in (values * _FILL, 0.0)
        )
        return (filled - empty) / _FILL

    def rows(self, node: fx.Node, operand: fx.Node, there: Tensor) -> Tensor:
        """What each of some entries of the only operand is multiplied by on its way to each entry of the output.

        Args:
            node: the call.
            operand: the operand.
            there: which entries, a boolean tensor of its shape.

        Returns:
            float64 tensor [entries, *shape of the output].
        """
        found = []
        for place in torch.nonzero(there.reshape(-1))[:, 0]:
            unit = torch.zeros(there.numel(), dtype=torch.float64).index_fill_(0, place, 1.0).view(there.shape)
            found.append(self.of_entries(node, operand, unit))
        return torch.stack(found)

    def _sums(self, node: fx.Node, data: Mapping[fx.Node, bool], power: float) -> list[Tensor]:
        """For each entry, the sum of ``|w|^power`` over the weights w of the operand's entries."""
        filled, empty = (self._run(node, data, power, fill)[0] for fill in (_FILL, 0.0))
        return [(_plain(one) - _plain(constant)) / _FILL for one, constant in zip(filled, empty, strict=True)]

    def _run(
        self,
        node: fx.Node,
        data: Mapping[fx.Node, bool],
        power: float,
        fill: float | Mapping[fx.Node, float | Tensor],
    ) -> tuple[list[Mass | None], list[Mass]]:
        """The masses that a call returns if every entry of its activations is ``fill``, and those that end in it."""
        flow = PowerFlow(self._graph, {}, self._rule, self._cut, self._kept, power=power)
        flow.node, flow.real_node = node, self._values
        activations = {used for used in data if not self._masses.is_inputless(used)} or set(data)

        def operand(argument: fx.Node) -> Any:
            if argument not in data:
                mass = self._masses.mass(argument, power)
                if mass is not None:
                    values = mass.values.detach()
                    return replace(mass, values=values if self._weights else torch.zeros_like(values), node=argument)
                value = self._values(argument)
                return mapped(value, Tensor, lambda t: replace(flow.constant(t), node=argument))

            given = fill[argument] if isinstance(fill, Mapping) else fill

            def filled(fake: Tensor) -> Mass:
                values = torch.as_tensor(given, dtype=torch.float64).expand(fake.shape).clone()
                return Mass(values, zero=not bool(values.any()), data=argument in activations, params=data[argument])

            return mapped(argument.meta.get("val"), Tensor, lambda fake: replace(filled(fake), node=argument))

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        call = Call(node.target, args, dict(kwargs), node)  # type: ignore[arg-type]
        result = flow.barrier(call) if node in self._cut else self._rule(node.target).paths(flow, call)
        found = leaves(result, object)
        return [leaf if isinstance(leaf, Mass) else None for leaf in found], flow.sinks


def _plain(mass: Mass | None) -> Tensor:
    if mass is None:
        return torch.zeros((), dtype=torch.float64)
    return ldexp_(mass.values.clone(), mass.log2_scale)


def _is_one(values: Tensor) -> bool:
    return bool((values == 1).all())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
