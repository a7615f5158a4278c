"""Sparse matrices by rows, of which single rows and ranges of rows can be taken without a copy."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy import sparse
from torch import Tensor


@dataclass(frozen=True)
class SparseRows:
    """A matrix in the compressed sparse row format.

    Attributes:
        starts: where the entries of each row start, and where the last ends, [rows + 1]; int32 or int64.
        columns: increasing within each row, [entries]; of the same type.
        values: [entries].
        width: number of columns.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def span(self, first: int, last: int) -> slice:
        """The entries of the rows from ``first`` up to ``last``."""
        return slice(int(self.starts[first]), int(self.starts[last]))

    def lengths(self, first: int, last: int) -> Tensor:
        """Entries in each of these rows."""
        return self.starts[first : last + 1].diff()

    def tensor(self, first: int, last: int, convert: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
        """These rows as a sparse CSR tensor that shares memory with this one; ``convert`` changes its values."""
        span = self.span(first, last)
        starts = self.starts[first : last + 1] - self.starts[first]
        return _csr(starts, self.columns[span], convert(self.values[span]), (last - first, self.width))

    def scatter_(
        self,
        result: Tensor,
        first: int,
        last: int,
        vector: Tensor,
        convert: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """Add the product of these rows' transpose and a vector to ``result``.

        Eight times faster than the product with a transposed CSR tensor, which PyTorch converts first.
        """
        span = self.span(first, last)
        terms = convert(self.values[span]) * vector.repeat_interleave(self.lengths(first, last))
        result.index_add_(0, self.columns[span], terms)

    def to_scipy(self) -> sparse.csr_array:
        parts = (part.cpu().numpy() for part in (self.values, self.columns, self.starts))
        return sparse.csr_array(tuple(parts), shape=(len(self), self.width))

    def to(self, device: torch.device | str | None) -> SparseRows:
        starts, columns, values = (part.to(device) for part in (self.starts, self.columns, self.values))
        return SparseRows(starts, columns, values, self.width)


def csr_tensor(array: sparse.csr_array, device: torch.device | str | None = None) -> Tensor:
    """A SciPy array as a sparse CSR tensor."""
    array.sort_indices()
    starts, columns, values = (torch.from_numpy(p).to(device) for p in (array.indptr, array.indices, array.data))
    return _csr(starts, columns, values, array.shape)


@contextlib.contextmanager
def without_csr_warning() -> Iterator[None]:
    """Without PyTorch's warning that CSR tensors are in beta: whoever asks for one knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        yield


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with without_csr_warning():
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)  # unasked, it warns
