"""How many paths there are, and how long they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from dagpath.lifting.lengths import LengthFlow
from dagpath.passes.masses import MassFlow
from dagpath.passes.paths import Terms
from dagpath.passes.powers import checked_power
from dagpath.passes.values import Mass, broadcast
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced

_EXACT = 2.0**48
"""Integers up to here survive a few roundings of float64 (a mean that is multiplied by its number of entries)."""


class CountFlow(MassFlow):
    """The number of paths. A parameter is an edge whatever its value, a constant where it is not zero.

    Args:
        graph, parameters, rule, cut, kept, dtype: see :class:`~dagpath.passes.masses.MassFlow`.
        modulus: count modulo this prime, exactly; None for floating-point numbers.
        step: the factor of a path for each parametrized linear layer that it crosses.
    """

    def __init__(self, *graph: Any, modulus: int | None = None, step: int = 1, **options: Any) -> None:
        super().__init__(*graph, **options)
        self._modulus = modulus
        self._step = step

    def parameter(self, name: str) -> Mass:
        shape = self.parameters[name].shape
        return Mass(torch.ones((), dtype=self.dtype, device=self.device).expand(shape), zero=not shape.numel())

    def fixed(self, weights: Tensor) -> Mass:
        edges = weights != 0
        return Mass(edges.to(self.device, self.dtype), zero=not bool(edges.any()))

    def edge(self, parts: Terms) -> Mass:
        edges = [self.fixed(coefficient(self.real)).values for coefficient, _ in parts]
        weight = parts[0][1]
        if len(parts) == 1 and weight is not None:
            return Mass(edges[0] * weight.values, weight.log2_scale)
        return Mass(torch.stack(broadcast(*edges)).amax(0))

    def layer(self, values: Tensor) -> Tensor:
        return values * self._step

    def total(self) -> Mass:
        whole = super().total()
        return whole if self._modulus is None else replace(whole, values=self.settled(whole.values)[0])

    def settled(self, values: Tensor) -> tuple[Tensor, int | None]:
        if self._modulus is None:
            return super().settled(values)
        if values.numel() and float(values.amax()) >= _EXACT:
            raise _TooLargeError
        return values.round().remainder(self._modulus), 0


class _TooLargeError(Exception):
    """Sums of numbers below this modulus are not exact in float64."""


@overload
def path_count(traced: TracedModel, progress: bool = True, log: Literal[False] = False) -> int: ...
@overload
def path_count(traced: TracedModel, progress: bool = True, *, log: Literal[True]) -> float: ...
@plain_computation()
def path_count(traced: TracedModel, progress: bool = True, log: bool = False) -> int | float:
    """The number of paths of the network, exactly, or its logarithm.

    Every scalar activation is a neuron (each position of a channel counts), every parameter an edge whatever its value,
    and a constant an edge where it is not zero. An operation that is not positively homogeneous cuts paths: what enters
    it counts as an output, what leaves it as an input.

    Args:
        traced: the traced model.
        progress: show a bar if it takes more than two seconds.
        log: return the natural logarithm, a float up to rounding; -inf where there is no path.

    Returns:
        The number, a Python int of any size, or its logarithm.

    Cost: one float64 forward pass at batch 1 for about every 30 binary digits of the number; one for the logarithm.
    Source: Gonon et al., ICLR
    2024, for the paths.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> traced = dagpath.trace(net, torch.zeros(1, 2))
        >>> dagpath.path_count(traced)  # 2·3·1 from inputs, 3·1 and 1 from biases
        10
        >>> round(dagpath.path_count(traced, log=True), 6)
        2.302585
    """
    require_traced(traced)
    if log:
        total = traced.masses(CountFlow).total()
        count = float(total.values)
        return math.log(count) + total.log2_scale * math.log(2) if count > 0 else -math.inf
    return _exact_sums(traced, [1], progress)[0]


@plain_computation()
def path_length_profile(traced: TracedModel, p: float | None = None, progress: bool = True) -> dict[int, int | float]:
    """How many paths of each length there are, or how much of the path-norm they carry.

    The length of a path is the number of parametrized linear layers on it: convolutions, matrix products, embeddings. A
    normalization acts on each channel alone and does not count; its bias starts paths. A product of parameters is one
    weight, and no layer of its own.

    Args:
        traced: the traced model.
        p: None to count paths; a number of at least 1 for the share of ``Σ |Φ|^p`` that paths of each length have.
        progress: show a bar if it takes more than two seconds.

    Returns:
        length -> exact number of paths, or share of the sum (all shares add up to 1; of a sum of zero all are zero). In
        ascending order; lengths without paths are left out.

    Raises:
        ValueError: p is below 1 or not finite.

    Cost: shares, two forward passes in float64 for about every second length; counts, for every length and every 30
    binary digits of the number of paths one.

    Source: Gonon et al., ICLR 2024, for the paths.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> dagpath.path_length_profile(dagpath.trace(net, torch.zeros(1, 2)))  # the last bias; all other paths
        {1: 1, 2: 9}
    """
    require_traced(traced)
    if p is not None:
        return dict(traced.masses(LengthFlow, power=checked_power(p), progress=progress).shares())
    flow = traced.masses(CountFlow)
    flow.total()
    longest = _longest_chain(traced.fx, flow.layers)
    points = list(range(longest + 1))
    numbers = _exact_sums(traced, points, progress)
    return {length: count for length, count in enumerate(numbers) if count}


def _longest_chain(module: fx.GraphModule, layers: set[fx.Node]) -> int:
    """The largest number of layers on one way through the graph."""
    depth: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        depth[node] = max((depth[parent] for parent in node.all_input_nodes), default=0) + (node in layers)
    return max(depth.values(), default=0)


def _exact_sums(traced: TracedModel, steps: Sequence[int], progress: bool) -> list[int]:
    """The coefficients of the polynomial ``Σ_paths t^length``, given points t, as many as it has coefficients.

    Its values modulo primes determine the coefficients modulo those, and these, by the Chinese remainder theorem, the
    coefficients. One point, 1, gives their sum.
    """
    estimate = traced.masses(CountFlow).total()
    if estimate.zero:
        return [0] * len(steps)
    bits = math.log2(float(estimate.values)) + estimate.log2_scale + 1
    for size in (30, 26, 22, 18, 14, 10):
        rounds = math.ceil(bits / (size - 1))
        found, modulus = [0] * len(steps), 1
        try:
            work = rounds * len(steps)
            with tqdm(total=work, desc="counting paths", disable=not progress, leave=False, delay=2) as bar:
                for prime, _ in zip(_primes_below(2**size), range(rounds), strict=False):
                    values = []
                    for step in steps:
                        values.append(int(traced.masses(CountFlow, modulus=prime, step=step).total().values))
                        bar.update()
                    residues = _interpolated(values, steps, prime)
                    inverse = pow(modulus, -1, prime)
                    found = [
                        number + modulus * ((residue - number) * inverse % prime)
                        for number, residue in zip(found, residues, strict=True)
                    ]
                    modulus *= prime
        except _TooLargeError:
            continue
        if modulus.bit_length() > bits:
            return found
    raise OverflowError("the sums of this network are too large to be counted exactly in float64")


def _primes_below(limit: int) -> Iterator[int]:
    """Primes in descending order, by the Miller-Rabin test, which these bases make exact below 3e9."""
    for number in range(limit - 1, 1, -2):
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        if all(
            pow(base, odd, number) == 1 or any(pow(base, odd << k, number) == number - 1 for k in range(twos))
            for base in (2, 3, 5, 7)
            if base % number
        ):
            yield number


def _interpolated(values: Sequence[int], points: Sequence[int], prime: int) -> list[int]:
    """The coefficients, modulo a prime, of the polynomial that has these values: Newton's divided differences."""
    divided = list(values)
    for order in range(1, len(points)):
        for index in range(len(points) - 1, order - 1, -1):
            slope = divided[index] - divided[index - 1]
            divided[index] = slope * pow(points[index] - points[index - order], -1, prime) % prime
    coefficients = [0] * len(points)
    for index in range(len(points) - 1, -1, -1):
        shifted = [0, *coefficients[:-1]]
        coefficients = [(up - points[index] * same) % prime for up, same in zip(shifted, coefficients, strict=True)]
        coefficients[0] = (coefficients[0] + divided[index]) % prime
    return coefficients
