"""The distance of two networks in path space."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dagpath.capture.site import describe
from dagpath.passes.differences import DifferenceFlow, GapFlow
from dagpath.passes.pairs import PairFlow
from dagpath.passes.powers import PowerFlow
from dagpath.passes.values import NOTHING, Call, Mass, leaves
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced

_PLAIN = 1e-2
"""Differences above this share of what they are the difference of keep 13 digits and more."""
_MOST_PLACES = 6
_SETTLED = 1e-13
_HOPELESS = 1e-3
"""Logarithms of an integral by two and three places that differ by more are those of networks far apart."""


@plain_computation()
def path_metric(traced_a: TracedModel, traced_b: TracedModel, p: float = 2, log: bool = False) -> float:
    """The distance ``‖Φ(θ) − Φ(θ')‖_p`` of two networks of one architecture, unchanged by rescaling either.

    For p = 2 it is the root of ``Σ Φ(θ)² + Σ Φ(θ')² − 2 Σ Φ(θ) Φ(θ')``, signs included. For p = 1 it is ``‖Φ(θ)‖₁ −
    ‖Φ(θ')‖₁`` where signs agree and the edges of one network, parameters and constants, are nowhere larger than the
    other's in absolute value. Other pairs have two upper bounds: the same difference for networks of the edges
    ``max(|w|, |w'|)`` and ``min(|w|, |w'|)``, where signs agree, and ``‖Φ(θ)‖₁ + ‖Φ(θ')‖₁``. The smaller is returned,
    with a warning. :class:`PathLifting` has the exact value for small networks.

    The distance of a network to itself is 0, and that of networks whose parameters are near each other is right to
    rounding: where the difference of the sums has lost digits, it is computed as the integral of its derivative along
    the straight line from one network to the other.

    Args:
        traced_a: one network.
        traced_b: the other; the same architecture, with other values of parameters and buffers.
        p: 2 or 1.
        log: return the natural logarithm, which is finite where the distance itself leaves float64.

    Raises:
        ValueError: another p, or the architectures differ: operations, their numbers (a constant factor, a kernel
            size), or shapes, those of the example inputs among them. The message names the first difference.

    Warns:
        UserWarning: p is 1 and the result is an upper bound.

    Cost: three forward passes in float64 for p = 2, four for p = 1; for networks near each other a few more, with
    backward passes. For p = 2, distances below 1e-7 of the norms are lost in rounding where the parameters are far
    apart nevertheless, as those of a network and its rescaled copy. Source: Gonon et al., ICML 2025.

    Example:
        >>> import copy, torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> other = copy.deepcopy(net)
        >>> with torch.no_grad():
        ...     _ = other[2].bias.add_(3.0)
        >>> a, b = (dagpath.trace(model, torch.zeros(1, 2)) for model in (net, other))
        >>> round(dagpath.path_metric(a, b), 6)
        3.0
    """
    for traced in (traced_a, traced_b):
        require_traced(traced)
    _check_alike(traced_a, traced_b)
    if p not in (1, 2):
        raise ValueError(f"the path metric is known for p = 1 and p = 2, got {p!r}")
    logarithm = _euclidean(traced_a, traced_b) if p == 2 else _taxicab(traced_a, traced_b)
    return logarithm if log else float(torch.tensor(logarithm, dtype=torch.float64).exp())


def _check_alike(a: TracedModel, b: TracedModel) -> None:
    """Raise ValueError unless two models have the same parameters, and the same calls on tensors of the same shapes."""
    differ = "the two models have different architectures: "
    for name in a.graph.shapes | b.graph.shapes:
        one, other = (t.graph.shapes.get(name) for t in (a, b))
        if one != other:
            texts = ("is absent" if shape is None else f"has shape {tuple(shape)}" for shape in (one, other))
            raise ValueError(f"{differ}{name!r} {' in the first and '.join(texts)} in the second")
    for first, second in itertools.zip_longest(a.fx.graph.nodes, b.fx.graph.nodes):
        if first is None or second is None or _facts(first) != _facts(second):
            texts = ("nothing" if node is None else f"{describe(node)} {_facts(node)[1:]}" for node in (first, second))
            raise ValueError(f"{differ}{' in the first, '.join(texts)} in the second")


def _facts(node: fx.Node) -> tuple[Any, ...]:
    """What a call does: operation, operands and numbers, and the shapes of what it returns."""
    arguments: dict[str, Any] = {"": (node.args, node.kwargs)}
    if hasattr(node.target, "_schema"):
        arguments = dict(Call(node.target, node.args, dict(node.kwargs), node).arguments)  # type: ignore[arg-type]
        for name in ("momentum", "p") if "dropout" in str(node.target) else ("momentum",):  # eval mode has no use
            arguments.pop(name, None)
    found = pytree.tree_leaves(list(arguments.values()))
    operands = tuple(str(leaf) for leaf in found if isinstance(leaf, (fx.Node, int, float, str)))
    returned = leaves(node.meta.get("val"), Tensor)
    return node.op, str(node.target), operands, tuple(tuple(leaf.shape) for leaf in returned)


def _euclidean(a: TracedModel, b: TracedModel) -> float:
    options = {"others": dict(b.values), "other_graph": b.captured.eval}
    both = a.masses(PairFlow, **options).total()
    squares = [traced.masses(PowerFlow, power=2).total() for traced in (a, b)]
    plain = _log_sum([*squares, both], [1.0, 1.0, -2.0])

    def integral(places: Sequence[float], weights: Sequence[float]) -> float:
        found, factors = [], []
        for i, j in itertools.combinations_with_replacement(range(len(places)), 2):
            flow = a.masses(DifferenceFlow, places=(places[i], places[j]), **options)
            found.append(flow.derivative())
            factors.append(weights[i] * weights[j] * (1.0 if i == j else 2.0))
        return _log_sum(found, factors)

    return _without_cancellation(plain, _log_sum(squares, [1.0, 1.0]), integral) / 2


def _taxicab(a: TracedModel, b: TracedModel) -> float:
    options = {"others": dict(b.values), "other_graph": b.captured.eval}
    totals = [traced.masses(PowerFlow, power=1).total() for traced in (a, b)]
    bounds = [_log_sum(totals, [1.0, 1.0])]
    low, high = (a.masses(GapFlow, place=place, **options) for place in (0.0, 1.0))
    ends = [flow.total() for flow in (high, low)]
    if low.signs_agree:

        def integral(places: Sequence[float], weights: Sequence[float]) -> float:
            found = [a.masses(GapFlow, place=place, **options).derivative() for place in places]
            return _log_sum(found, weights)

        plain = _log_sum(ends, [1.0, -1.0])
        gap = _without_cancellation(plain, _log_sum(ends[:1], [1.0]), integral)
        if low.first_is_above or low.second_is_above:
            return gap
        bounds.append(gap)
    warnings.warn(
        "the distance in the 1-norm is known exactly where no edge changes its sign and one network dominates the "
        "other; this is an upper bound",
        stacklevel=4,
    )
    return min(bounds)


def _without_cancellation(
    plain: float, scale: float, integral: Callable[[Sequence[float], Sequence[float]], float]
) -> float:
    """The logarithm of a difference: ``plain``, or its integral where ``plain`` has lost digits to a far larger scale.

    The integrand is a polynomial, of low degree but for terms that vanish with powers of the difference: Gauss and
    Legendre's rule settles after a few places. Where it does not, the networks are far apart as parameters go.
    """
    if math.isnan(plain) or plain > scale + math.log(_PLAIN):
        return plain
    last = math.nan
    for count in range(1, _MOST_PLACES + 1):
        places, weights = np.polynomial.legendre.leggauss(count)
        try:
            found = integral(((places + 1) / 2).tolist(), (weights / 2).tolist())
        except OverflowError:
            return plain
        change = 0.0 if found == last else abs(found - last)
        if change < _SETTLED:
            return found
        if (count == 2 and change > 1) or (count > 2 and change > _HOPELESS):
            return plain
        last = found
    return plain


def _log_sum(masses: Sequence[Mass], signs: Sequence[float]) -> float:
    """``log Σ sign · mass``; a sum below zero by rounding counts as zero, and NaN stays NaN."""
    top = max(mass.magnitude for mass in masses)
    if top == NOTHING:
        return -math.inf
    known = [(mass, sign) for mass, sign in zip(masses, signs, strict=True) if not mass.zero]
    terms = [sign * float(mass.values.detach()) * 2.0 ** (mass.log2_scale - top) for mass, sign in known]
    total = math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan
    return math.log(total) + top * math.log(2) if not total <= 0 else -math.inf
