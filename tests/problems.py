"""Random balancing problems, as numbers: elements of any graph, and problems of overlapping blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dagpath.solver import Block, GroupMatrix, LogOuter, MassAggregator, Outer, Problem


@dataclass(frozen=True)
class Elements:
    """Masses of elements with the groups that they enter and leave, which broadcast to their shape; several such."""

    num_groups: int
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masses, groups entered and groups left, one element after the other."""
        parts = [np.broadcast_arrays(*part) for part in self.parts]
        masses, dst, src = (np.concatenate([array.ravel() for array in arrays]) for arrays in zip(*parts, strict=True))
        return masses, dst, src

    def collected(self, largest: bool = False) -> MassAggregator:
        aggregator = MassAggregator(self.num_groups, largest=largest)
        for part in self.parts:
            aggregator.add(*(torch.from_numpy(np.asarray(array)) for array in part))
        return aggregator

    def path_conditioning(self, **options: float) -> Problem:
        return Problem.path_conditioning(self.collected(), **options)


def in_and_out(rng: np.random.Generator, groups: int, extra: int, decades: float) -> Elements:
    """An element into every group and one out of it, and some anywhere; masses ``10**uniform(-decades, decades)``."""
    every, fixed, anywhere = np.arange(1, groups + 1), np.zeros(groups, int), rng.integers(0, groups + 1, (2, extra))
    dst, src = np.concatenate([every, fixed, anywhere[0]]), np.concatenate([fixed, every, anywhere[1]])
    return Elements(groups, [(10.0 ** rng.uniform(-decades, decades, len(dst)), dst, src)])


@dataclass(frozen=True)
class HandBuilt:
    """A problem built from blocks and single entries, and the same masses as a dense matrix [size, size]."""

    problem: Problem
    dense: Tensor

    def objective(self, z: Tensor) -> Tensor:
        """F as it is defined, for autograd."""
        padded = torch.cat([z.new_zeros(1), z])
        total = (self.dense * (self.problem.kappa * (padded[:, None] - padded[None, :])).exp()).sum()
        outer = self.problem.outer
        return (outer.p * total.log() if isinstance(outer, LogOuter) else total) + self.problem.linear @ z


def hand_built(
    seed: int, outer: Outer, kappa: float, bound: float, groups: int | None = None, pull: float = 1.0
) -> HandBuilt:
    """A random problem in which blocks overlap each other and themselves; every group has an entry in and one out.

    Args:
        seed: of everything random.
        outer: ψ.
        kappa: κ.
        bound: largest ``|z|``.
        groups: number of free groups; None for 2 to 8.
        pull: standard deviation of the linear term.
    """
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(2, 9)) if groups is None else groups
    size = groups + 1

    def some() -> np.ndarray:
        return rng.permutation(size)[: rng.integers(1, size + 1)]

    def masses(*shape: int) -> Tensor:
        return torch.from_numpy(np.exp(rng.normal(0, 1, shape)) * (rng.random(shape) < 0.8))

    loop = some()  # a residual stream: what a block reads is what it writes
    ends = [(some(), some()), (rng.permutation(loop), loop), (some(), some())][: rng.integers(1, 4)]
    blocks = [Block(masses(len(dst), len(src)), torch.from_numpy(dst), torch.from_numpy(src)) for dst, src in ends]
    every, fixed, within = np.arange(1, size), np.zeros(groups, int), some()
    dst, src = np.concatenate([every, fixed, within]), np.concatenate([fixed, every, within])
    entries = torch.from_numpy(np.exp(rng.normal(0, 1, len(dst))))

    dense = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        dense[block.dst[:, None], block.src[None, :]] += block.masses
    dense[dst, src] += entries
    _, first = np.unique(dst * size + src, return_index=True)
    assert len(first) == len(dst)
    matrix = GroupMatrix.of(size, blocks, torch.from_numpy(dst), torch.from_numpy(src), entries)
    linear = torch.from_numpy(rng.normal(0, pull, groups))
    return HandBuilt(Problem(matrix, outer, kappa, linear, 1.0, bound), dense)
