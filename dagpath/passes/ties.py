"""Which neurons share a scale: pairs that are tied, and the groups that they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csgraph, csr_array
from torch import Tensor, fx

from dagpath.passes.values import FIXED


@dataclass(frozen=True)
class Tie:
    """Neurons that must share a scale: ``left[i]`` and ``right[i]``; where ``right`` is None, ``left`` is fixed.

    ``reason`` completes the sentence "tied by ..." or, where ``right`` is None, "fixed: ...". ``fixed`` are the
    arguments of the call at ``node`` of which no entry can be rescaled.
    """

    left: Tensor
    right: Tensor | None
    node: fx.Node
    reason: str
    fixed: tuple[fx.Node, ...] = ()


class Links:
    """All ties of a network as one graph over neuron numbers, in which number 0 stands for everything fixed.

    Args:
        ties: the ties.
        size: how many neuron numbers there are, 0 among them.
    """

    def __init__(self, ties: Sequence[Tie], size: int) -> None:
        nothing = np.zeros(0, np.int64)
        self._left = np.concatenate([nothing, *(tie.left.numpy() for tie in ties)])
        rights = (np.full(len(t.left), FIXED) if t.right is None else t.right.numpy() for t in ties)
        self._right = np.concatenate([nothing, *rights])
        self._tie_of = np.repeat(np.arange(len(ties)), [len(tie.left) for tie in ties])
        self._graph = csr_array((np.ones(len(self._left), np.int8), (self._left, self._right)), shape=(size, size))

    def groups(self) -> np.ndarray:
        """The group of each number: 0 for all that is tied to number 0, the others in the order they appear."""
        _, component = csgraph.connected_components(self._graph, directed=False)
        _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse]

    def ways_to_zero(self) -> tuple[np.ndarray, np.ndarray]:
        """For each number the tie on its shortest way to 0, and what that ties it to; -1 for free ones and for 0."""
        size = self._graph.shape[0]
        order, parent = csgraph.breadth_first_order(self._graph, 0, directed=False, return_predecessors=True)
        result = np.full(size, -1)
        reached = order[1:]
        if len(reached):
            low, high = np.minimum(self._left, self._right), np.maximum(self._left, self._right)
            keys, first = np.unique(low * size + high, return_index=True)
            wanted = np.minimum(reached, parent[reached]) * size + np.maximum(reached, parent[reached])
            result[reached] = self._tie_of[first[np.searchsorted(keys, wanted)]]
        return result, np.where(result >= 0, parent, -1)
