"""The main job: trace, balance, apply, verify."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagpath.balance import BalanceOptions, balance
from dagpath.capture import run, with_batch
from dagpath.criteria import Criterion
from dagpath.distributed import Peers, computed_types, reshard
from dagpath.errors import VerificationError
from dagpath.multiply import transaction
from dagpath.rescaling import Rescaling
from dagpath.state import unwrap
from dagpath.trace import TracedModel, trace
from dagpath.words import counted

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest relative difference of outputs, by the narrowest type among parameters, activations and outputs."""
_BALANCE_OPTIONS = [name for name in inspect.signature(balance).parameters if name not in ("traced", "criterion")]


def rescale_(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    criterion: str | Criterion = "pathcond",
    verify: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    **balance_options: Any,
) -> Rescaling:
    """Rescale a model in place, to the minimum of a criterion, and be certain that its function is the same.

    Traces the model, balances it, multiplies its parameters, and compares its outputs on the example inputs before and
    after. All or nothing: if anything fails or is interrupted, every parameter is bitwise what it was.

    Several threads may rescale models of their own. A model that other threads run should be traced before they do;
    ``dagpath.balance(traced).apply_()`` is safe at any time then.

    Args:
        model: any module; see :func:`dagpath.trace`.
        example_inputs: a tensor, or the tuple of positional arguments of ``model.forward``.
        criterion: ``"pathcond"`` or an object such as :class:`dagpath.PathConditioning`.
        verify: run the model before and after, in eval mode (in train mode too, where that computes something else
            than eval mode with the flags of its batch norms and dropouts set), and compare.
        kwargs: keyword arguments of ``model.forward``.
        **balance_options: options of :func:`dagpath.balance`, such as ``power_of_two=True``.

    Returns:
        The :class:`Rescaling` that was applied; ``inverse().apply_()`` takes it back, up to rounding.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an unknown criterion or solver, or an option out of its range.
        CaptureError: the model cannot be captured, or its forward raises on the example inputs.
        BalanceError: a weight is not finite.
        VerificationError: the outputs differ by more than rounding explains; the message has the difference.

    Warns:
        UserWarning: outputs on the example inputs are NaN, or none is finite, or there is none: those say nothing. With
            nothing to compare, ``difference`` is None.

    Cost: for a ResNet-50 about as much as 10 forward and backward passes in float32 at batch 1, and six times the
    memory of the parameters beside the model (``benchmarks/results/rescale.json``).

    Source: Lebeurrier, Vayer, Gribonval 2026, for the default criterion.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> before = net(x)
        >>> rescaling = dagpath.rescale_(net, x)
        >>> torch.allclose(net(x), before, atol=1e-5)
        True
    """
    unknown = [option for option in balance_options if option not in _BALANCE_OPTIONS]
    if unknown:
        raise TypeError(
            f"rescale_() got an unexpected option {unknown[0]!r}; there are criterion, verify, kwargs, "
            f"{', '.join(_BALANCE_OPTIONS)}"
        )
    start = time.perf_counter()
    unwrap(model)  # which refuses what no processes are asked about
    with Peers.of(model).together():
        options = BalanceOptions(criterion, **balance_options)
    traced = trace(model, example_inputs, kwargs)
    traced.peers.require_same("the arguments of rescale_", f"verify={bool(verify)}")
    rescaling = options.minimize(traced)
    if not rescaling.converged:
        warnings.warn(options.shortfall(rescaling), stacklevel=2)
    model = traced.model
    given = ((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs, dict(kwargs or {}))
    checks = _modes_to_check(traced, given) if verify else []
    balanced = time.perf_counter()
    reshard(model)
    with transaction(model.parameters()):
        with traced.peers.together(gathers=True):
            before = [run(model, inputs, training) for training, inputs in checks]
        applying = time.perf_counter()
        rescaling.apply_()
        applied = time.perf_counter()
        with traced.peers.together(gathers=True):
            after = [run(model, inputs, training) for training, inputs in checks]
        difference = None
        for (training, _), reference, outputs in zip(checks, before, after, strict=True):
            worst = traced.peers.largest(_compare(reference, outputs))
            _check(worst, 0.0 if rescaling.power_of_two else _tolerance(traced, reference), training, rescaling)
            if traced.peers.largest(float(any(bool(torch.isfinite(output).any()) for output in reference))):
                difference = max(worst, difference or 0.0)
    for (training, _), reference in zip(checks, before, strict=True):
        _warn_of_undefined(reference, training)
    end = time.perf_counter()
    stages = {
        "trace": traced.seconds,
        **rescaling.stages,
        "apply": applied - applying,
        "verify": end - balanced - (applied - applying),
    }
    return replace(rescaling, seconds=end - start, stages=stages, difference=difference)


def _modes_to_check(traced: TracedModel, given: Any) -> list[tuple[bool, Any]]:
    """(training, inputs) for eval mode, and for train mode where its graph is another."""
    trained = traced.captured.train
    checks = [(False, given)]
    if trained is not None:
        checks.append((True, with_batch(given, trained.batch)))
    return checks


def _warn_of_undefined(outputs: list[Tensor], training: bool) -> None:
    """Warn where outputs are NaN, or none is finite: nothing can be told from those."""
    total = sum(output.numel() for output in outputs)
    finite, undefined = (sum(int(test(output).sum()) for output in outputs) for test in (torch.isfinite, torch.isnan))
    if undefined or not finite:
        warnings.warn(
            f"of {counted(total, 'output')} in {'train' if training else 'eval'} mode on the example inputs "
            f"{undefined} are NaN and {finite} finite, before and after rescaling: "
            f"{'the others were' if finite else 'nothing was'} compared; pass example inputs on which the outputs are "
            "finite",
            stacklevel=3,
        )


def _compare(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference of any output, relative to the largest entry of that output."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if not a.numel():
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).abs())
        size = torch.where(torch.isfinite(a), a.abs(), 0.0).max()
        ratio = float(error.max() / size) if float(size) > 0 else float(error.max())
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _tolerance(traced: TracedModel, outputs: list[Tensor]) -> float:
    inside = pytree.tree_leaves([node.meta.get("val") for node in traced.fx.graph.nodes])
    tensors = [*outputs, *traced.model.parameters(), *(leaf for leaf in inside if isinstance(leaf, Tensor))]
    types = {tensor.dtype for tensor in tensors} | computed_types(traced.model)
    return max((_TOLERANCES.get(dtype, 0.0) for dtype in types), default=1e-10)


def _check(difference: float, tolerance: float, training: bool, rescaling: Rescaling) -> None:
    if difference <= tolerance:
        return
    if rescaling.power_of_two:
        remark = "Factors that are powers of two should leave them bitwise equal."
    else:
        remark = "If the model merely amplifies rounding errors, power_of_two=True is exact."
    raise VerificationError(
        f"after rescaling, the outputs in {'train' if training else 'eval'} mode differ by {difference:.2e} relative "
        f"(allowed: {tolerance:.0e}); all parameters are restored. {remark} Otherwise an operation of this model has a "
        "wrong rule: traced.explain() lists what was assumed.",
        difference,
        tolerance,
    )
