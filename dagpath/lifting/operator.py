"""The path Gram matrix as a linear operator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from tqdm.auto import tqdm

from dagpath.lifting.gram import gram_diagonal
from dagpath.lifting.repeated import used_repeatedly
from dagpath.passes.flattened import Flattened
from dagpath.passes.masses import MassFlow
from dagpath.passes.pairs import PairFlow, scaled
from dagpath.passes.sparse import without_csr_warning
from dagpath.passes.values import LARGEST_STEP, NOTHING, is_count, ldexp_
from dagpath.runtime.fetched import device_of
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_dtype, require_finite, require_traced

_MOST_DENSE = 20_000
_COLUMNS = 64
_LEAST = {torch.float64: -900, torch.float32: -90}
"""Derivatives of smaller powers of two are about to leave the range of their type."""
_NO_COMPLEX = "the path Gram matrix is real, got a complex vector: multiply its real and its imaginary part"


class GramOperator(LinearOperator):  # type: ignore[misc]
    """``G = ∂Φᵀ∂Φ`` as a :class:`scipy.sparse.linalg.LinearOperator`. Made by :func:`gram`.

    ``operator @ v`` takes a NumPy array or a torch tensor of any device, [num_parameters] or [num_parameters, columns],
    and returns the same kind, in float64. Rows and columns follow ``model.named_parameters()``, each flattened. It is G
    at the parameters' current values. A batch norm's γ and β both enter the bias edge ``β − mean·a``, and a weight that
    is shared may be met several times by one path: both are taken into account exactly.

    Attributes:
        shape: (num_parameters, num_parameters).
        dtype: float64.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(2.0), net[2].weight.fill_(3.0)
        >>> G = dagpath.gram(dagpath.trace(net, torch.zeros(1, 1)))
        >>> G.to_dense().tolist()  # the path of value 2 · 3, and the bias
        [[9.0, 6.0, 0.0], [6.0, 4.0, 0.0], [0.0, 0.0, 1.0]]
        >>> G @ torch.tensor([1.0, 1.0, 1.0])
        tensor([15., 10.,  1.], dtype=torch.float64)
        >>> G.trace(), G.eigvalsh(k=1).round(6).tolist()
        (14.0, [13.0])
        >>> round(G.condition_number(), 6)  # 13 over 1: the third is zero, along the rescaling
        13.0
    """

    def __init__(self, traced: TracedModel, dtype: torch.dtype) -> None:
        size = traced.graph.num_parameters
        super().__init__(np.dtype(np.float64), (size, size))
        self._traced = traced
        self._dtype = dtype
        self._device = device_of(traced.values)

    # -- products ------------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        return self.dot(other)

    def dot(self, x: Any) -> Any:
        """``G @ x``.

        Args:
            x: a NumPy array or a tensor, [num_parameters] or [num_parameters, columns]; real.

        Returns:
            The same kind, shape and device, in float64.

        Raises:
            ValueError: another shape.
            TypeError: a complex vector.
            OverflowError: path masses leave the range of the type of the passes.

        Cost: one forward and one backward pass, and for each column a backward pass through both.
        """
        if not isinstance(x, Tensor):
            return super().dot(x)
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[0]:
            raise ValueError(f"expected a vector or matrix of {self.shape[0]} rows, got shape {tuple(x.shape)}")
        if x.is_complex():
            raise TypeError(_NO_COMPLEX)
        product = self._products(x.detach().to(self._device, torch.float64).reshape(len(x), -1))
        return product.to(x.device).reshape(x.shape)

    def matvec(self, x: Any) -> Any:
        """``G @ x`` of one vector."""
        return self.dot(x) if isinstance(x, Tensor) else super().matvec(x)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1, 1)).reshape(x.shape)

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(x):
            raise TypeError(_NO_COMPLEX)
        columns = torch.from_numpy(np.array(x, dtype=np.float64)).to(self._device)
        return self._products(columns).cpu().numpy()

    def _adjoint(self) -> GramOperator:
        return self

    @plain_computation()
    def _products(self, columns: Tensor, progress: bool = False) -> Tensor:
        """``Σ_p ∂Φ_p(θ) · DΦ_p(θ)[v]`` for each column v: a mixed second derivative of ``Σ_p Φ_p(a) Φ_p(b)``."""
        whole = dict(self._traced.values)
        sizes = [p.numel() for p in whole.values()]
        known = [index for index, p in enumerate(whole.values()) if p.is_floating_point()]
        names = [list(whole)[index] for index in known]
        found = {name: scaled(whole[name], self._dtype) for name in names}
        log2_scales = [found[name][1] if name in found else 0 for name in whole]
        first = [found[name][0].requires_grad_() for name in names]
        second = [leaf.detach().clone().requires_grad_() for leaf in first]
        leaves = [
            {name: (leaf, found[name][1]) for name, leaf in zip(names, side, strict=True)} for side in (first, second)
        ]
        true, others = (whole | {name: _unscaled(*leaf) for name, leaf in side.items()} for side in leaves)
        options = {"others": others, "leaves": leaves, "dtype": self._dtype}
        total = self._traced.masses(PairFlow, parameters=true, **options).total()
        result = torch.zeros_like(columns)
        if not total.values.requires_grad:
            return result
        inner = torch.autograd.grad(total.values, second, create_graph=True, materialize_grads=True)
        self._check_range(names, inner)
        moves, columns = _gauged(columns, sizes, log2_scales)
        live = [index for index, gradient in enumerate(inner) if gradient.requires_grad]
        chunks = list(_chunks(columns.shape[1]))
        for chunk in tqdm(chunks, desc="Gram products", disable=not progress, leave=False, delay=2):
            seeded = columns[:, chunk].t().to(self._dtype)
            count, parts = len(seeded), torch.split(seeded, sizes, dim=1)
            seeds = [parts[index].reshape(count, *p.shape) for index, p in zip(known, first, strict=True)]
            outer = self._outer([inner[i] for i in live], first, [seeds[i] for i in live])
            rows = torch.split(result[:, chunk], sizes)
            for index, part in zip(known, outer, strict=True):
                if part is not None:
                    rows[index].copy_(part.reshape(count, sizes[index]).t())
        return ldexp_(result, total.log2_scale) if moves is None else _multiplied(result, total.log2_scale + moves)

    def _check_range(self, names: list[str], gradients: Sequence[Tensor]) -> None:
        for name, gradient in zip(names, gradients, strict=True):
            if NOTHING < MassFlow.log2_of(gradient) < _LEAST[self._dtype]:
                wider = "use dtype=torch.float64" if self._dtype == torch.float32 else "scale the layers evenly first"
                raise OverflowError(f"the path masses through {name!r} leave the range of {self._dtype}: {wider}")

    @staticmethod
    def _outer(inner: list[Tensor], first: list[Tensor], seeds: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Derivatives of ``Σ inner · seed`` by ``first``, for each of the seeds along dimension 0; None for zero."""
        one = len(seeds[0]) == 1
        given = [seed[0] for seed in seeds] if one else seeds
        return torch.autograd.grad(inner, first, given, retain_graph=True, allow_unused=True, is_grads_batched=not one)

    # -- what is known of the matrix -----------------------------------------------------------------------------------

    def diagonal(self) -> Tensor:
        """The diagonal of G, as :func:`gram_diagonal`, but exact where a path meets a parameter twice.

        Returns:
            float64 tensor [num_parameters].

        Cost: one forward and one backward pass; where a parameter is used more than once, one product for every 64 of
        its elements more.
        """
        values = gram_diagonal(self._traced)
        shared = used_repeatedly(self._traced)
        spans = Flattened({name: value.shape for name, value in values.items()}).spans
        parts = [self._diagonal_of(spans[name]) if name in shared else value.view(-1) for name, value in values.items()]
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=self._device), *parts])

    def _diagonal_of(self, elements: range) -> Tensor:
        found = []
        for chunk in _chunks(len(elements)):
            rows = torch.tensor(elements[chunk], device=self._device)
            units = torch.zeros(self.shape[0], len(rows), dtype=torch.float64, device=self._device)
            units[rows, torch.arange(len(rows), device=self._device)] = 1.0
            found.append(self._products(units)[rows].diagonal())
        return torch.cat(found)

    def trace(self) -> float:
        """The sum of the diagonal, which is that of all eigenvalues. It costs as much as :meth:`diagonal`."""
        return float(self.diagonal().sum())

    def to_dense(self, progress: bool = True) -> Tensor:
        """G as a float64 tensor [num_parameters, num_parameters], on the device of the parameters.

        Args:
            progress: show a progress bar if it takes more than two seconds.

        Raises:
            ValueError: there are more than 20,000 parameters.

        Cost: a product for every 64 columns.
        """
        if self.shape[0] > _MOST_DENSE:
            raise ValueError(
                f"a dense Gram matrix of {self.shape[0]:,} parameters is not made (at most {_MOST_DENSE:,}): use "
                "products, diagonal() and eigvalsh(k)"
            )
        return self._products(torch.eye(self.shape[0], dtype=torch.float64, device=self._device), progress)

    def to_sparse(self, device: torch.device | str | None = None) -> Tensor:
        """G as a float64 sparse CSR tensor on ``device``; for small models, as :meth:`to_dense`, which makes it.

        Args:
            device: where it goes; None for the device of the parameters.

        Raises:
            ValueError: there are more than 20,000 parameters.
        """
        with without_csr_warning():
            return self.to_dense().to(device).to_sparse_csr()

    def eigvalsh(self, k: int | None = None, which: str = "LM", **options: Any) -> np.ndarray:
        """Eigenvalues of G, ascending; they are those of the path kernel ``K = ∂Φ∂Φᵀ``, and zeros.

        Args:
            k: how many, by :func:`scipy.sparse.linalg.eigsh`; None for all, by :func:`torch.linalg.eigvalsh` on the
                dense matrix.
            which: which ones, as in ``eigsh``: ``"LM"`` the largest.
            **options: passed on to ``eigsh``.

        Returns:
            float64 NumPy array [k], or [num_parameters].

        Raises:
            ValueError: k is no integer, below 1 or not below the number of parameters, the dense matrix would be too
                large, or a parameter is not finite.
        """
        require_finite(self._traced)
        if k is None:
            dense: np.ndarray = torch.linalg.eigvalsh(self.to_dense()).cpu().numpy()
            return dense
        if not is_count(k) or k >= self.shape[0]:
            raise ValueError(f"k must be an integer of at least 1 and below the {self.shape[0]} parameters, got {k!r}")
        start = np.random.default_rng(0).standard_normal(self.shape[0])
        found: np.ndarray = eigsh(self, int(k), which=which, return_eigenvectors=False, **{"v0": start, **options})
        return np.sort(found)

    def condition_number(self) -> float:
        """The largest eigenvalue over the smallest one that is not zero; for small models, as :meth:`to_dense`.

        G is singular along every rescaling and in every dead parameter. Eigenvalues below ``p · eps`` of the largest
        count as zero, p the number of parameters. NaN if all are zero.

        Raises:
            ValueError: as :meth:`eigvalsh` without k.

        Cost: that of :meth:`to_dense`, and all eigenvalues of a dense matrix.
        """
        live = live_eigenvalues(self.eigvalsh())
        return float(live[-1] / live[0]) if len(live) else math.nan


def live_eigenvalues(values: np.ndarray) -> np.ndarray:
    """Those above ``len(values) · eps`` of the largest: the others are zero but for rounding."""
    live: np.ndarray = values[values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps]
    return live


def _unscaled(leaf: Tensor, log2_scale: int) -> Tensor:
    return MassFlow.shifted(leaf.double(), log2_scale) if log2_scale else leaf


def _gauged(columns: Tensor, sizes: list[int], log2_scales: list[int]) -> tuple[Tensor | None, Tensor]:
    """Where parameters were divided by powers of two: what the entries of the products are to be multiplied by for it,
    as powers of two, and the columns that go in.
    """
    if not any(log2_scales):
        return None, columns
    device = columns.device
    rows = torch.repeat_interleave(torch.tensor(log2_scales, device=device), torch.tensor(sizes, device=device))[
        :, None
    ]
    there = torch.frexp(columns).exponent - rows
    tops = there.masked_fill(columns == 0, NOTHING).amax(0)
    tops = torch.where(tops == NOTHING, 0, tops)
    return tops - rows, _multiplied(columns, -rows - tops)


def _multiplied(values: Tensor, log2_scales: Tensor) -> Tensor:
    """``values · 2**log2_scales``, entry by entry."""
    step = LARGEST_STEP[values.dtype]
    for _ in range(3):
        now = log2_scales.clamp(-step, step)
        values = values * torch.pow(2.0, now.to(values.dtype))
        log2_scales = log2_scales - now
    return values


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _COLUMNS):
        yield slice(start, min(start + _COLUMNS, count))


def gram(traced: TracedModel, dtype: torch.dtype = torch.float64) -> GramOperator:
    """The path Gram matrix ``G = ∂Φᵀ∂Φ`` [num_parameters, num_parameters] as a linear operator.

    Nothing is materialized. The nonzero eigenvalues of G are those of the path kernel ``K = ∂Φ∂Φᵀ``, whose conditioning
    the rescaling improves. With ``S(a, b) = Σ_p Φ_p(a) Φ_p(b)``, a forward pass with the products of two networks'
    weights, ``G = ∂²S/∂a∂b`` at ``a = b = θ``.

    Args:
        traced: the traced model.
        dtype: of the passes; results are float64.

    Raises:
        OverflowError: of a product, if masses leave the range of the type beside those that they are added to.

    Cost: a product is one forward pass and two backward passes, one of which goes through both. Source: Lebeurrier,
    Vayer, Gribonval 2026.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> traced = dagpath.trace(net, torch.zeros(1, 2))
        >>> G = dagpath.gram(traced)
        >>> v = torch.randn(13, dtype=torch.float64)
        >>> torch.allclose(G @ v, G.to_dense() @ v)
        True
        >>> int((G.eigvalsh() > 1e-9 * G.trace()).sum())  # 13 parameters less 3 rescalings
        10
    """
    require_traced(traced)
    require_dtype(dtype)
    return GramOperator(traced, dtype)
