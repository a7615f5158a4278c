"""Multiplying tensors by the factors of a rescaling, in place, all or nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from dagpath.errors import BalanceError
from dagpath.passes.neurons import Ends
from dagpath.passes.values import broadcast
from dagpath.runtime.distributed import Peers, own, own_part
from dagpath.runtime.state import uninterrupted

_SMALLER = "rescale by less (a smaller bound of balance or rescale_, a smaller sigma of random_rescaling)"
_CHUNK = 1 << 18
"""Elements that are multiplied at a time, in float64: few enough to stay in the cache."""


@dataclass(frozen=True, eq=False)
class Moving:
    """A tensor that is multiplied by the factors of a parameter to a power.

    Attributes:
        parameter: the name of the parameter.
        label: what it is, for messages.
        tensor: of the parameter's shape.
        power: of the factors.
        exact: must the products be exact?
        kept: may rounding below the normal range of the type lose no more than :func:`multiply_` says?
    """

    parameter: str
    label: str
    tensor: Tensor
    power: float
    exact: bool = False
    kept: bool = True


@torch.no_grad()
def multiply_(moving: Iterable[Moving], ends: Mapping[str, Ends], scales: Tensor, peers: Peers) -> None:
    """Multiply each tensor once, element by element, by ``(scales[dst] / scales[src]) ** power``.

    A tensor is written when all its products are there and found good, so that whoever reads it meanwhile sees, element
    by element, what was there before or what will be there.

    Products below the normal range of a type are rounded to fewer digits, or to zero. Where a tensor is ``kept``, that
    may change no element by more than eps (of the type) times the largest one into the same destination or, if that is
    smaller, from the same source, sizes taken before the multiplication.

    Args:
        moving: what to multiply; a tensor that is named twice is multiplied once.
        ends: parameter name -> groups at both ends of its elements.
        scales: float64, λ of every group, the fixed group in front.
        peers: the processes that do the same; each multiplies what it holds.

    Raises:
        BalanceError: a product leaves the range of its type, loses more than it may, or should be exact and is not.
            Nothing is changed.
    """
    once = [
        item for item in {id(item.tensor): item for item in moving}.values() if _moves(ends[item.parameter], scales)
    ]
    with transaction(item.tensor for item in once), peers.together():
        for item in once:
            multiply_one_(item, ends[item.parameter], scales)
    parametrize._cache.clear()  # weights that were made of the old parameters, inside of parametrize.cached()


def _moves(ends: Ends, scales: Tensor) -> bool:
    """Is any element multiplied by something else than one?"""
    return not torch.equal(*broadcast(scales[ends.dst], scales[ends.src]))


class transaction:  # noqa: N801 (a context manager, used like a function)
    """Keep copies of tensors; put them back, bitwise, if the block raises or is interrupted."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._saved = [(own(tensor.detach()), own(tensor.detach()).clone()) for tensor in tensors]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            with uninterrupted(), torch.no_grad():
                for tensor, saved in self._saved:
                    tensor.copy_(saved)


@torch.no_grad()
def multiply_one_(moving: Moving, ends: Ends, scales: Tensor) -> None:
    """The same for one tensor, which is left half multiplied if it fails."""
    name, tensor = moving.label, own(moving.tensor.detach())
    scales = scales**moving.power
    dst, src = (own_part(scales[end], moving.tensor).to(tensor.device) for end in (ends.dst, ends.src))
    if not tensor.numel():
        return
    if bool((dst == 1).all()) and bool((src == 1).all()):
        return
    products = torch.empty_like(tensor)
    negligible = functools.cache(lambda: _negligible(tensor, dst, src))
    for rows in _row_chunks(tensor):
        ratio, product, stored = _multiplied(tensor, rows, dst, src)
        if not bool(torch.isfinite(stored).all()) and not bool(torch.isfinite(tensor[rows]).all()):
            raise BalanceError(f"{name} holds values that are not finite; nothing was changed")
        if moving.exact and not torch.equal(stored.double(), product):
            raise BalanceError(
                f"{name}: multiplied by powers of two between {float(dst.min() / src.max()):.3g} and "
                f"{float(dst.max() / src.min()):.3g}, values leave the range in which {tensor.dtype} is exact; "
                f"{_SMALLER}, with power_of_two=False, or in a wider type; nothing was changed"
            )
        if not bool(torch.isfinite(stored).all()):
            raise BalanceError(
                f"{name}: rescaled by up to {float(dst.max() / src.min()):.3g}, values leave the range of "
                f"{tensor.dtype}; {_SMALLER}, or convert the model to a wider type first; nothing was changed"
            )
        if moving.kept and bool(_lost(stored, tensor, rows, ratio, negligible).any()):
            raise BalanceError(
                f"{name}: rescaled by down to {float(dst.min() / src.max()):.3g}, values fall below the normal "
                f"range of {tensor.dtype} and lose digits that count beside their neighbours; {_SMALLER}, convert "
                "the model to a wider type first, or set to zero what is as good as zero; nothing was changed"
            )
        products[rows] = stored
    tensor.copy_(products)


@torch.no_grad()
def beyond(tensor: Tensor, ends: Ends, scales: Tensor, exact: bool) -> Tensor:
    """The groups whose factors make of an element what its type does not hold: where :func:`multiply_` would raise.

    Args:
        tensor: a parameter, which is not changed; all its values are finite.
        ends: the groups at both ends of its elements.
        scales: float64, λ of every group, the fixed group in front.
        exact: should the products be exact?

    Returns:
        int64 [elements], group numbers: of the ends of each such element the one whose factor is further from 1.
    """
    dst, src = (scales[end].to(tensor.device) for end in (ends.dst, ends.src))
    found = [torch.zeros(0, dtype=torch.long)]
    negligible = functools.cache(lambda: _negligible(tensor, dst, src))
    for rows in _row_chunks(tensor) if tensor.numel() else ():
        ratio, product, stored = _multiplied(tensor, rows, dst, src)
        bad = ~torch.isfinite(stored)
        if exact:
            bad |= stored.double() != product
        else:
            bad |= _lost(stored, tensor, rows, ratio, negligible)
        if bool(bad.any()):
            bad = bad.cpu()
            to, start = (_rows_of(end, rows, tensor).cpu().expand(bad.shape)[bad] for end in (ends.dst, ends.src))
            further = scales[to].log().abs() >= scales[start].log().abs()
            found.append(torch.where(further, to, start))
    return torch.cat(found)


def _multiplied(tensor: Tensor, rows: slice | tuple[()], dst: Tensor, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of some rows, the products in float64, and these in the tensor's type."""
    ratio = _rows_of(dst, rows, tensor) / _rows_of(src, rows, tensor)
    product = tensor[rows].double() * ratio
    return ratio, product, product.to(tensor.dtype)


def _lost(
    stored: Tensor, tensor: Tensor, rows: slice | tuple[()], ratio: Tensor, negligible: Callable[[], Tensor]
) -> Tensor:
    """Where rounding below the normal range changes a value by more than what is negligible."""
    values = tensor[rows]
    small = (stored.abs() < torch.finfo(stored.dtype).tiny) & (values != 0)
    if not bool(small.any()):
        return small
    return (stored.double() / ratio - values.double()).abs() > _rows_of(negligible(), rows, tensor)


def _negligible(tensor: Tensor, dst: Tensor, src: Tensor) -> Tensor:
    """What rounding may change: eps of the largest of all elements with the same destination, or with the same source.

    An element that is alone at an end is compared with those at its other end; with all, if it is alone at both.
    """
    ends = (end.reshape((1,) * (tensor.ndim - end.ndim) + tuple(end.shape)) for end in (dst, src))
    shared = ([dim for dim, size in enumerate(end.shape) if size == 1] for end in ends)
    meeting = [dims for dims in shared if math.prod(tensor.shape[dim] for dim in dims) > 1]
    everywhere = list(range(tensor.ndim))
    largest = (torch.linalg.vector_norm(tensor, math.inf, dims, keepdim=True) for dims in meeting or [everywhere])
    bound: Tensor = functools.reduce(torch.minimum, (sizes.double() for sizes in largest))
    return torch.finfo(tensor.dtype).eps * bound


def _row_chunks(tensor: Tensor) -> Iterator[slice | tuple[()]]:
    """Slices of the first dimension that hold about ``_CHUNK`` elements each."""
    if tensor.ndim == 0:
        yield ()
        return
    step = max(1, _CHUNK * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)


def _rows_of(end: Tensor, rows: slice | tuple[()], tensor: Tensor) -> Tensor:
    """The part of a broadcastable tensor that meets ``tensor[rows]``."""
    return end[rows] if end.ndim == tensor.ndim and end.ndim and end.shape[0] > 1 else end
