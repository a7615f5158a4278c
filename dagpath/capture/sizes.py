"""Example inputs in other sizes: other numbers of examples, other lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Dim = tuple[int, int]
"""A dimension of an input: the number of the tensor among the leaves, and the dimension."""


def common_batch(given: Any) -> int | None:
    """The size that dimension 0 has in all tensors among the inputs; None where they differ, or where there is none."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def with_batch(given: Any, size: int | None) -> Any:
    """Inputs with ``size`` examples in their batch: the first ones, over and over again where there are fewer.

    The inputs themselves where they have no common batch size, or where ``size`` is None.
    """
    if size is None or common_batch(given) in (None, size):
        return given
    return resized(given, batch_sizes(given, size))


def batch_sizes(given: Any, size: int) -> dict[Dim, int]:
    """The size as that of dimension 0 of all tensors among the inputs; empty where they have no common one."""
    leaves = enumerate(pytree.tree_leaves(given))
    if common_batch(given) is None:
        return {}
    return {(position, 0): size for position, leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}


def resized(given: Any, sizes: Mapping[Dim, int]) -> Any:
    """Inputs some dimensions of which have other sizes: the first entries, over and over again."""
    leaves, structure = pytree.tree_flatten(given)
    for (position, dim), size in sizes.items():
        leaf = leaves[position]
        if not leaf.shape[dim]:
            leaves[position] = leaf.new_zeros((*leaf.shape[:dim], size, *leaf.shape[dim + 1 :]))
        else:
            places = torch.arange(size, device=leaf.device) % leaf.shape[dim]
            leaves[position] = leaf.index_select(dim, places)
    return pytree.tree_unflatten(leaves, structure)


def without_values(given: Any, sizes: Mapping[Dim, int]) -> Any:
    """As :func:`resized`, on the meta device: inputs of any size cost no memory."""
    leaves, structure = pytree.tree_flatten(given)
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            shape = [sizes.get((position, dim), size) for dim, size in enumerate(leaf.shape)]
            leaves[position] = torch.empty(shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)
    return pytree.tree_unflatten(leaves, structure)


def shapes_text(inputs: Any, any_batch: bool = False) -> str:
    """The shapes of inputs; with n for their number of examples, if it may be any."""
    batch = set(batch_sizes(inputs, 1)) if any_batch else set()
    shapes = [
        ["n" if (position, dim) in batch else str(size) for dim, size in enumerate(leaf.shape)]
        for position, leaf in enumerate(pytree.tree_leaves(inputs))
        if isinstance(leaf, Tensor)
    ]
    return ", ".join(f"[{', '.join(shape)}]" for shape in shapes)


def num_entries(inputs: Any) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def copies(inputs: Any) -> Any:
    """Copies of the tensors among inputs, since a model may write to them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)


def larger(size: int) -> list[int]:
    """Sizes to try in place of one, those that tell most first: many models take multiples of a power of two alone."""
    return [n for n in dict.fromkeys([2 * size + 1, 3 * size // 2, 2 * size, size + 32, size + 1]) if n > size]


def neighbours(size: int) -> list[int]:
    """Sizes next to one: odd where it is even."""
    return [other for other in (size + 1, size - 1) if other]


def smaller(size: int) -> list[int]:
    """Smaller sizes to try in place of one."""
    return [
        other for other in dict.fromkeys([size // 2 - 1, size // 2, 3 * size // 4, size - 1, 1]) if 0 < other < size
    ]


def other_lengths(
    given: Any, candidates: Callable[[int], Sequence[int]], takes: Callable[[Any], bool]
) -> dict[Dim, int]:
    """Other sizes of the dimensions of inputs that a model takes.

    Dimensions of one size are likely one length (of a sequence and of its mask) or two that may differ (height and
    width): they are tried together, with sizes that differ within a tensor, then with equal ones, then one by one.

    Args:
        given: the inputs.
        candidates: other sizes to try for one.
        takes: does the model take these inputs?
    """
    batch = common_batch(given)
    found: dict[Dim, int] = {}
    for dims, size in _by_size(given, skip=batch is not None):
        for trial in _trials(dims, candidates(size)):
            if size not in trial.values() and takes(resized(given, trial)):
                found.update(trial)
                break
    if found and not takes(resized(given, found)):  # each alone, not all together
        found = dict([next(iter(found.items()))])
        if not takes(resized(given, found)):
            return {}
    return found


def _by_size(given: Any, skip: bool) -> list[tuple[list[Dim], int]]:
    """The dimensions of the inputs (but for the first ones, if they are the batch) by their size."""
    found: dict[int, list[Dim]] = {}
    for position, leaf in enumerate(pytree.tree_leaves(given)):
        if isinstance(leaf, Tensor):
            for dim in range(int(skip), leaf.ndim):
                found.setdefault(leaf.shape[dim], []).append((position, dim))
    return [(dims, size) for size, dims in found.items()]


def _trials(dims: list[Dim], sizes: Sequence[int]) -> Iterator[dict[Dim, int]]:
    """What to try for dimensions of one size."""
    seen: dict[int, int] = {}
    order = {dim: seen.setdefault(dim[0], -1) for dim in dims}
    for dim in dims:
        seen[dim[0]] += 1
        order[dim] = seen[dim[0]]
    repeated = any(order.values())
    if repeated:
        for size in sizes:
            yield {dim: size + 2 * order[dim] for dim in dims}  # so that each of them is odd once, and even once
    for size in sizes:
        yield dict.fromkeys(dims, size)
    if repeated:
        for which in range(max(order.values()) + 1):
            for size in sizes[:2]:
                yield {dim: size for dim in dims if order[dim] == which}
