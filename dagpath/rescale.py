"""The main job: trace, balance, apply, verify."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dagpath.apply.multiply import transaction
from dagpath.apply.rescaling import Rescaling
from dagpath.apply.verify import Verification
from dagpath.balance import BalanceOptions, balance
from dagpath.criteria import Criterion
from dagpath.runtime.distributed import Peers, reshard
from dagpath.runtime.state import unwrap
from dagpath.trace import inputs_of, trace

_BALANCE_OPTIONS = [name for name in inspect.signature(balance).parameters if name not in ("traced", "criterion")]


def rescale_(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    criterion: str | Criterion = "pathcond",
    verify: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Tensor | tuple[Any, ...] | Mapping[str, Any]] = (),
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
        verify: run the model before and after, and compare its outputs channel by channel: on the example inputs in
            eval mode, in train mode too where that computes something else than eval mode with the flags of its batch
            norms and dropouts set, and once more on inputs of another size where the model takes one.
        kwargs: keyword arguments of ``model.forward``.
        more_examples: further example inputs; see :func:`dagpath.trace`.
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
            f"rescale_() got an unexpected option {unknown[0]!r}; there are criterion, verify, kwargs, more_examples, "
            f"{', '.join(_BALANCE_OPTIONS)}"
        )
    start = time.perf_counter()
    unwrap(model)  # which refuses what no processes are asked about
    with Peers.of(model).together():
        options = BalanceOptions(criterion, **balance_options)
    traced = trace(model, example_inputs, kwargs, more_examples)
    traced.peers.require_same("the arguments of rescale_", f"verify={bool(verify)}")
    rescaling = options.minimize(traced)
    if not rescaling.converged:
        warnings.warn(options.shortfall(rescaling), stacklevel=2)
    given, *more = (inputs_of(example, kwargs or {}) for example in (example_inputs, *more_examples))
    verification = Verification(traced, given, more) if verify else None
    balanced = time.perf_counter()
    reshard(traced.model)
    difference = None
    with transaction(traced.model.parameters()):
        if verification is not None:
            verification.start()
        applying = time.perf_counter()
        rescaling.apply_()
        applied = time.perf_counter()
        if verification is not None:
            difference = verification.finish(rescaling)
    if verification is not None:
        verification.warn_of_undefined()
    end = time.perf_counter()
    stages = {
        "trace": traced.seconds,
        **rescaling.stages,
        "apply": applied - applying,
        "verify": end - balanced - (applied - applying),
    }
    return replace(rescaling, seconds=end - start, stages=stages, difference=difference)
