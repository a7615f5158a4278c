"""Sums over the paths of a graph that is given level by level as sparse rows, of any size.

Masses are ``values · 2**exponents``, entry by entry: products of many weights leave the range of float64 long before
their number does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dagpath.passes.sparse import SparseRows

_NONE = -math.inf
_EVEN = 300
"""Numbers between 2**-e and 2**e are multiplied and added as they are, which is many times faster."""


@dataclass(frozen=True)
class Masses:
    """Non-negative numbers, entry by entry.

    Attributes:
        values: float64, 0 or between 1/2 and 1.
        exponents: float64 integers, the powers of two beside them; −inf beside 0.
    """

    values: Tensor
    exponents: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> Masses:
        values, exponents = torch.frexp(numbers)
        return cls(values, torch.where(values == 0, _NONE, exponents.double()))

    @classmethod
    def powers(cls, weights: Tensor, p: float) -> Masses:
        """``|weights|^p``."""
        values, exponents = torch.frexp(weights.abs())
        if p == 1:
            found = cls(values, exponents.double())
        elif p == 2:
            found = cls(values.square(), 2.0 * exponents)
        else:
            whole = (p * exponents.double()).floor()
            logs = p * values.log2() + (p * exponents.double() - whole)
            found = cls((logs - logs.floor()).exp2(), whole + logs.floor())
        return cls(found.values.masked_fill(values == 0, 0.0), found.exponents.masked_fill(values == 0, _NONE))

    @property
    def are_even(self) -> bool:
        """Are all but zeros near one?"""
        return bool(((self.exponents.abs() <= _EVEN) | (self.values == 0)).all())

    def at(self, index: Tensor) -> Masses:
        return Masses(self.values[index], self.exponents[index])

    def times(self, other: Masses) -> Masses:
        return Masses(self.values * other.values, self.exponents + other.exponents)

    def total(self) -> Masses:
        """The sum of all, as one entry."""
        none = Masses.of(self.values.new_zeros(1))
        return none.plus(torch.zeros_like(self.values, dtype=torch.int64), self)

    def plus(self, index: Tensor, terms: Masses) -> Masses:
        """The masses with these terms added to the entries at ``index``."""
        top = self.exponents.scatter_reduce(0, index, terms.exponents, "amax")
        level = top.masked_fill(top == _NONE, 0.0)
        sums = self.values * (self.exponents - level).exp2()
        sums = sums.index_add(0, index, terms.values * (terms.exponents - level[index]).exp2())
        values, exponents = torch.frexp(sums)
        return Masses(values, torch.where(values == 0, _NONE, level + exponents))

    def numbers(self) -> Tensor:
        """float64 numbers: 0 or infinite where they leave its range."""
        return numbers_of(self.values, self.exponents)

    def logarithms(self) -> Tensor:
        """Natural logarithms."""
        return self.values.log() + (self.exponents * math.log(2)).masked_fill(self.values == 0, 0.0)

    def root(self, p: float) -> Tensor:
        """The numbers to the power 1/p."""
        if p == 1:
            return self.numbers()
        shares = self.exponents.masked_fill(self.values == 0, 0.0) / p
        whole = shares.floor()
        return Masses(self.values ** (1 / p) * (shares - whole).exp2(), whole).numbers()


def forward_masses(weights: SparseRows, spans: Sequence[tuple[int, int]], starts: Tensor, p: float) -> Masses:
    """``Σ |Π w|^p`` over all paths from a start to each node."""
    numbers = torch.zeros(len(weights), dtype=torch.float64, device=starts.device).index_fill(0, starts, 1.0)
    masses = Masses.of(numbers)
    for first, last in spans:
        if not (_are_even(weights.values[weights.span(first, last)], p) and _are_even(numbers[:first])):
            break
        numbers[first:last] = weights.tensor(first, last, lambda values: values.abs() ** p) @ numbers
    else:
        return Masses.of(numbers)
    for first, last in spans:
        span, rows = weights.span(first, last), _rows(weights, first, last)
        terms = Masses.powers(weights.values[span], p).times(masses.at(weights.columns[span]))
        found = Masses.of(masses.values.new_zeros(last - first)).plus(rows, terms)
        masses.values[first:last], masses.exponents[first:last] = found.values, found.exponents
    return masses


def backward_masses(weights: SparseRows, spans: Sequence[tuple[int, int]], ends: Tensor, p: float) -> Masses:
    """``Σ |Π w|^p`` over all paths from each node to an end."""
    numbers = torch.bincount(ends, minlength=len(weights)).double()
    masses = Masses.of(numbers)
    for first, last in reversed(spans):
        if not (_are_even(weights.values[weights.span(first, last)], p) and _are_even(numbers[first:last])):
            break
        weights.scatter_(numbers, first, last, numbers[first:last], lambda values: values.abs() ** p)
    else:
        return Masses.of(numbers)
    for first, last in reversed(spans):
        span, rows = weights.span(first, last), _rows(weights, first, last)
        terms = Masses.powers(weights.values[span], p).times(masses.at(rows + first))
        masses = masses.plus(weights.columns[span].long(), terms)
    return masses


def squares_by_element(
    weights: SparseRows, derivative: SparseRows, spans: Sequence[tuple[int, int]], forward: Masses, backward: Masses
) -> Masses:
    """``Σ (∂w/∂θ_e)² · forward(src) · backward(dst)`` over all edges, for each parameter element e."""
    result = forward.values.new_zeros(derivative.width)
    if forward.are_even and backward.are_even and _are_even(derivative.values, 2):
        arriving, leaving = forward.numbers(), backward.numbers()
        for first, last in spans:
            span = weights.span(first, last)
            left = leaving[first:last].repeat_interleave(weights.lengths(first, last))
            derivative.scatter_(result, span.start, span.stop, arriving[weights.columns[span]] * left, torch.square)
        return Masses.of(result)
    found = Masses.of(result)
    for first, last in spans:
        span, rows = weights.span(first, last), _rows(weights, first, last)
        around = forward.at(weights.columns[span]).times(backward.at(rows + first))
        entries, edges = derivative.span(span.start, span.stop), _rows(derivative, span.start, span.stop)
        terms = Masses.powers(derivative.values[entries], 2).times(around.at(edges))
        found = found.plus(derivative.columns[entries].long(), terms)
    return found


def _are_even(numbers: Tensor, p: float = 1) -> bool:
    """Are all powers but zeros so near one that products of three of them are far from the ends of the range?"""
    if not numbers.numel():
        return True
    magnitudes = numbers.abs()
    largest, least = float(magnitudes.amax()), float(magnitudes.masked_fill(magnitudes == 0, math.inf).amin())
    return largest == 0 or (math.log2(largest) * p <= _EVEN and math.log2(least) * p >= -_EVEN)


def _rows(matrix: SparseRows, first: int, last: int) -> Tensor:
    """The row of each entry of these rows, counted from ``first``."""
    rows = torch.arange(last - first, device=matrix.starts.device)
    return rows.repeat_interleave(matrix.lengths(first, last))


def product_of_each(factors: Tensor) -> Tensor:
    """The product of each row's factors, right also where products on the way leave the range of float64."""
    values, exponents = running_products(factors)
    return numbers_of(values[:, -1], exponents[:, -1])


def running_products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """The products of the first factors of each row, beginning with none of them.

    Returns:
        Values [rows, columns + 1], 0 or between 1/2 and 1 in magnitude, and the powers of two beside them.
    """
    values, exponents = torch.frexp(factors.new_ones(len(factors)))
    found = [(values, exponents)]
    for column in factors.unbind(1):
        mantissa, power = torch.frexp(column)
        values, shift = torch.frexp(values * mantissa)
        exponents = exponents + power + shift
        found.append((values, exponents))
    return torch.stack([one for one, _ in found], 1), torch.stack([power for _, power in found], 1)


def numbers_of(values: Tensor, exponents: Tensor) -> Tensor:
    """``values · 2**exponents``: 0 or infinite where that leaves the range of float64."""
    half = (exponents / 2).floor()
    return (values * half.double().exp2() * (exponents - half).double().exp2()).masked_fill(values == 0, 0.0)
