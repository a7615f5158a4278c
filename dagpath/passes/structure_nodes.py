"""Nodes of a network's structure: what ties two neurons into one scale makes a node here, a join that reads both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.structure import CONSTANT, Links, Segment
from dagpath.passes.values import FIXED, ZERO, Weight, broadcast, compact, leaves

OFFSET = 2
"""Node n has number n + 2, or minus that: smaller numbers say fixed, always zero and not used."""


class NoEdgesError(Exception):
    """Paths go through a call in a way that no edges of the neuron graph have.

    Args:
        node: the call.
        reason: completes a sentence that begins with the call.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason  # the interpreter adds to what the exception says


class NodeFlow(NeuronFlow):
    """Runs rules on numbers of nodes; collects nodes, and links between them.

    A node's number is positive where it carries a scale and negative where it does not (inputs, results of barriers),
    so that every rule decides as it does in the flow of neurons.

    Args:
        model, rule, unknown: see :class:`~dagpath.passes.neurons.NeuronFlow`.
        kept: which factor paths go through, for calls that multiply two activations.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Callable[[Any], Any],
        unknown: Callable[[str], Any],
        kept: Mapping[fx.Node, int],
    ) -> None:
        super().__init__(model, rule, unknown)
        self._known_kept = kept
        self._recording = True
        self.num_numbers = OFFSET
        self._segments = [Segment("constant", None, CONSTANT, 1)]
        self._links: list[Links] = []
        self._num_records = 0
        self._start_call()

    def _start_call(self) -> None:
        """Forget what concerned the last call."""
        self._operands: dict[fx.Node, Any] = {}
        self._first_number = self.num_numbers + 1
        self._moved: dict[int, int] = {}
        self._biased: Tensor | None = None
        self._mixed = False
        self._only_added = True

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _new_numbers(self, count: int, maker: fx.Node | None) -> Tensor:
        return self._allocate("join" if maker is None else "hidden", count)

    def _allocate(self, role: str, count: int, again: int | None = None) -> Tensor:
        """Numbers of new nodes; ``again``, the first number of those whose neurons they are once more."""
        start = self.num_numbers + 1
        self.num_numbers += count
        if count:
            first = None if again is None else again - OFFSET
            self._segments.append(Segment(role, self.node, start - OFFSET, count, first))
        return torch.arange(start, start + count)

    def _replaced(self, numbers: Tensor) -> Tensor:
        """``numbers`` with those that got a bias replaced by the joins that have it."""
        table = torch.arange(self.num_numbers + 1)
        table[list(self._moved)] = torch.tensor(list(self._moved.values()))
        small = compact(numbers)
        return torch.where(small > FIXED, table[small.clamp(min=0)], small).expand(numbers.shape)

    def _next(self) -> float:
        self._num_records += 1
        return self._num_records

    def _link(self, dst: Tensor, src: Tensor, factor: Tensor | float = 1.0) -> None:
        dst, src, factors = broadcast(dst, src, torch.as_tensor(factor, dtype=torch.float64))
        known = (src != ZERO) & (factors > 0)
        if known.any():
            self._links.append(Links(self._next(), nodes_of(dst[known]), nodes_of(src[known]), factors[known]))

    def _joins(self, keys: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """A new join for each distinct row of ``keys``; returns the numbers of the rows, and one row of each join."""
        unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
        first = torch.full((len(unique),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
        numbers = self._allocate("join", len(unique))
        return (numbers * signs[first])[inverse], first

    def join(self, a: Tensor, b: Tensor, reason: str, scale: float = 1.0) -> Tensor:
        if not self._recording:
            return super().join(a, b, reason)
        if self._biased is not None and (a is self._biased or b is self._biased):
            return self._biased
        a, b = (self._replaced(value) if self._moved else value for value in (a, b))
        a, b = broadcast(compact(a), compact(b))
        result = torch.where((a == ZERO) | ((a == FIXED) & (b < ZERO)), b, a)
        differ = (a != b) & (a != ZERO) & (b != ZERO) & ((a > FIXED) | (a < ZERO)) & ((b > FIXED) | (b < ZERO))
        hidden = (a == FIXED) & (b > FIXED)
        both = has_nodes(a) and has_nodes(b)  # else the rule of masses tells the factor of the only one
        for chosen, factor in ((differ, 1.0), (hidden, 0.0)):
            if not chosen.any():
                continue
            signs = torch.where(a[chosen] > FIXED, 1, -1)
            numbers, first = self._joins(torch.stack([a[chosen], b[chosen]], 1), signs)
            self._link(numbers[first], a[chosen][first], factor)
            self._link(numbers[first], b[chosen][first], abs(scale) if both else 1.0)
            result = result.masked_scatter(chosen, numbers)
        return result

    def mix(self, numbers: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        dims = list(dims)
        if not self._recording:
            return super().mix(numbers, dims, reason)
        numbers = compact(numbers, dims)
        dims = [dim for dim in dims if numbers.shape[dim] > 1]
        if not dims or not numbers.numel():
            return numbers
        kept = [dim for dim in range(numbers.ndim) if dim not in dims]
        shape = [1 if dim in dims else size for dim, size in enumerate(numbers.shape)]
        narrow = compact(numbers, kept)
        narrow_shape = [1 if dim in dims else size for dim, size in enumerate(narrow.shape)]
        rows = narrow.permute(*kept, *dims).reshape(-1, math.prod(narrow.shape[dim] for dim in dims))
        is_node = rows.abs() > OFFSET
        most, least = (rows.masked_fill(~is_node, fill) for fill in (-self.num_numbers - 1, self.num_numbers + 1))
        most, least = most.amax(1), least.amin(1)
        result = torch.where(is_node.any(1), most, rows.amax(1))
        several = most > least
        if several.any():
            joins = self._allocate("join", int(several.sum()))
            chosen = rows[several]
            row, column = torch.nonzero(is_node[several], as_tuple=True)
            pairs = torch.unique(torch.stack([joins[row], chosen[row, column]], 1), dim=0)
            self._link(pairs[:, 0], pairs[:, 1])
            result[several] = torch.where(most[several] > FIXED, joins, -joins)
            self._mixed = True
        return result.view(narrow_shape).expand(shape)

    def _multiplied(self, numbers: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
        """Numbers of nodes that read these times a factor, plus a constant; entries with 1 and 0 stay as they are."""
        small = compact(numbers)
        factor, constant = (largest(value, numbers.shape, small.shape) for value in (factor, constant))
        is_node = small.abs() > OFFSET
        factor = torch.where(is_node, factor, 0.0)
        chosen = (is_node & (factor != 1)) | (constant > 0)
        if not chosen.any():
            return numbers
        keys = torch.stack([small[chosen].double(), factor[chosen], constant[chosen]], 1)
        made, first = self._joins(keys, torch.where(small[chosen] > FIXED, 1, -1))
        self._link(made[first], small[chosen][first], factor[chosen][first])
        self._link(made[first], torch.tensor(FIXED), constant[chosen][first])
        return small.masked_scatter(chosen, made).expand(numbers.shape)

    def enters(self, x: Tensor) -> bool:
        return has_nodes(x)  # a path goes on from an input too

    def product(self, factors: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor]) -> Tensor:
        may_be_free = [bool((compact(factor) > FIXED).any()) for factor in factors]
        index = self._known_kept.get(self.node, int(may_be_free[1]))
        if has_nodes(factors[0]) != has_nodes(factors[1]):  # the other is a constant to paths
            index = int(has_nodes(factors[1]))
        kept, other = (compact(results[i]) for i in (index, 1 - index))
        shape = torch.broadcast_shapes(*(result.shape for result in results))  # type: ignore[no-untyped-call]
        if all(may_be_free):
            kept = torch.where(other == ZERO, ZERO, kept)
        return kept.expand(shape)

    # -- ties, which are of no interest here -------------------------------------------------------------------------

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        return

    def fix(self, numbers: Tensor, reason: str) -> None:
        return

    def pin(self, weight: Weight, reason: str = "") -> None:
        return


def nodes_of(numbers: Tensor) -> Tensor:
    """Node of each number; -1 where there is none."""
    nodes = numbers.abs() - OFFSET
    return torch.where(numbers == FIXED, CONSTANT, torch.where(nodes > 0, nodes, ZERO))


def has_nodes(value: Any) -> bool:
    return any(bool((compact(leaf).abs() > OFFSET).any()) for leaf in leaves(value, Tensor))


def largest(value: Tensor, shape: torch.Size, narrow: Sequence[int]) -> Tensor:
    """The largest entries of what broadcasts to ``shape``, along the dimensions that are of size 1 in ``narrow``."""
    dims = [dim for dim, size in enumerate(narrow) if size == 1 and shape[dim] > 1]
    whole = value.expand(shape).to(torch.float64)
    return whole.amax(dims, keepdim=True) if dims else whole
