"""Products of two tensors that could both be rescaled: one of them has to keep its scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from dagpath.passes.values import FIXED, compact


@dataclass(frozen=True)
class Product:
    """A product of two tensors of neurons. One factor is fixed, a gate; the result has the scale of the other.

    Attributes:
        node: the call.
        factors: the numbers of both factors.
        results: the numbers that the result must have if the first, or the second, factor stays free.
        result: the numbers that stand for the result until it is decided.
    """

    node: fx.Node
    factors: tuple[Tensor, Tensor]
    results: tuple[Tensor, Tensor]
    result: Tensor


def settle(products: Sequence[Product], groups: Callable[[], np.ndarray], keep: Callable[[Product, int], None]) -> None:
    """Decide for each product which factor stays free: the one with more free groups, of equals the second.

    A decision fixes neurons, which may decide other products. So those of which one factor is fixed anyway come first,
    then the others one by one.

    Args:
        products: the products, in the order of the graph.
        groups: the group of every number, given all ties so far; 0 is fixed.
        keep: carries out the decision that the factor of this index stays free.
    """
    waiting = list(products)
    while waiting:
        group_of = groups()
        free = [[_num_free(group_of, factor) for factor in product.factors] for product in waiting]
        decided = [index for index, numbers in enumerate(free) if 0 in numbers] or [0]
        for index in decided:
            first, second = free[index]
            keep(waiting[index], int(second >= first))
        waiting = [product for index, product in enumerate(waiting) if index not in decided]


def _num_free(group_of: np.ndarray, numbers: Tensor) -> int:
    return len(np.setdiff1d(group_of[compact(numbers).clamp(min=FIXED).numpy()], [0]))
