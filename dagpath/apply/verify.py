"""Is the function of a model the same after rescaling? Its outputs before and after, channel by channel."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dagpath.apply.rescaling import Rescaling
from dagpath.capture.calls import has_unchecked
from dagpath.capture.graph import CapturedGraph
from dagpath.capture.running import mode_text, run
from dagpath.capture.sizes import common_batch, num_entries, resized, with_batch
from dagpath.errors import CaptureError, VerificationError
from dagpath.runtime.distributed import computed_types, has_all_values
from dagpath.runtime.state import has_mixed_modes, parameters_kept
from dagpath.trace import TracedModel
from dagpath.words import counted

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest difference in a channel relative to its largest entry, by the narrowest type on the way to the output."""

_NOISE_RUNS = 30
"""At most: a channel that rounding happens to leave alone in one run may differ in the next."""

_NOISE = 20.0
"""A channel may differ by as many times what it differs by if every parameter is rounded up or down at random: sums of
terms that cancel amplify rounding, and so do normalizations over few examples."""


@dataclass
class Check:
    """One call whose outputs are compared.

    Attributes:
        inputs: its inputs.
        training: in train mode? None for the modes that its modules are in.
        optional: may it be left out if the model does not take the inputs?
        before: the outputs before; None where it is left out.
    """

    inputs: Any
    training: bool | None
    optional: bool = False
    before: list[Tensor] | None = field(default=None, repr=False)


class Verification:
    """The calls to compare: on the example inputs in eval mode, in train mode where that makes other calls, and on
    inputs of other sizes that the model takes.

    Args:
        traced: the model.
        given: its example inputs.
        more: further example inputs.
    """

    def __init__(self, traced: TracedModel, given: Any, more: Sequence[Any]) -> None:
        self._traced = traced
        self._peers = traced.peers
        self._model = traced.model
        with traced.peers.together():
            self._checks = self._calls(given, more)
        kinds = [(check.training, check.optional) for check in self._checks]
        traced.peers.require_same("the calls to compare", str(kinds))

    def _calls(self, given: Any, more: Sequence[Any]) -> list[Check]:
        captured = self._traced.captured
        checks = [Check(inputs, False) for inputs in (given, *more)]
        if captured.train is not None or captured.train_failure:
            trained = given if common_batch(given) != 1 else with_batch(given, 2)
            checks.append(Check(trained, True, optional=bool(captured.train_failure)))
        if has_mixed_modes(self._model):
            checks.append(Check(given, None, optional=True))
        if captured.sizes and not has_unchecked(captured.eval):  # such an operation may end the process
            smallest = min((resized(given, sizes) for sizes in captured.sizes), key=num_entries)
            checks.append(Check(smallest, False, optional=True))
        return checks

    def _run(self, check: Check) -> list[Tensor]:
        written = self._traced.captured.written
        with parameters_kept(self._model) if written else contextlib.nullcontext():
            return run(self._model, check.inputs, check.training)

    def start(self) -> None:
        """Compute the outputs before."""
        for check in self._checks:
            with self._peers.together(gathers=True):
                try:
                    check.before = self._run(check)
                except CaptureError:
                    if not check.optional:
                        raise
            if self._peers.largest(float(check.before is None)):
                check.before = None

    def finish(self, rescaling: Rescaling) -> float | None:
        """Compute the outputs after and compare them.

        Returns:
            The largest difference of any entry, relative to the largest one of its channel. None where there is
            nothing to compare.

        Raises:
            VerificationError: a channel differs by more than rounding explains.
        """
        worst = None
        for check in self._checks:
            if check.before is None:
                continue
            with self._peers.together(gathers=True):
                after = self._run(check)
                found = [_Difference(a, b) for a, b in zip(check.before, after, strict=True)]
                tolerances = self._tolerances(check) if not rescaling.power_of_two else [0.0] * len(found)
                excess = [diff.excess(limit) for diff, limit in zip(found, tolerances, strict=True)]
            is_wrong = bool(self._peers.largest(float(any(excess))))
            if is_wrong and (rescaling.power_of_two or not self._is_noise(check, after, found, tolerances)):
                raise self._error(check, found, tolerances, rescaling)
            difference = self._peers.largest(max((diff.relative for diff in found), default=0.0))
            compared = any(diff.is_finite for diff in found) and not check.optional
            if self._peers.largest(float(compared)):
                worst = max(difference, worst or 0.0)
        return worst

    def warn_of_undefined(self) -> None:
        """Warn where outputs are NaN, or none is finite: nothing can be told from those."""
        for check in self._checks:
            outputs = check.before or []
            total = sum(output.numel() for output in outputs)
            finite, undefined = (sum(int(t(o).sum()) for o in outputs) for t in (torch.isfinite, torch.isnan))
            if check.before is not None and not check.optional and (undefined or not finite):
                where = f"{mode_text(check.training)} on the example inputs"
                warnings.warn(
                    f"of {counted(total, 'output')} in {where} {undefined} are NaN and {finite} finite, before and "
                    f"after rescaling: {'the others were' if finite else 'nothing was'} compared; pass example inputs "
                    "on which the outputs are finite",
                    stacklevel=3,
                )

    def _tolerances(self, check: Check) -> list[float]:
        """For each output, by the types of what it is computed from."""
        assert check.before is not None
        captured = self._traced.captured
        graph = captured.train if check.training and captured.train is not None else captured.eval
        types = _types_of_outputs(graph)
        if len(types) != len(check.before):
            types = [set.union(set(), *types)] * len(check.before)
        chosen = computed_types(self._model)  # which no graph shows
        everywhere = {parameter.dtype for parameter in self._model.parameters()}
        return [
            max(_TOLERANCES.get(dtype, 0.0) for dtype in {output.dtype, *chosen, *(found or everywhere)})
            if output.is_floating_point() or output.is_complex()
            else 0.0  # indices, say
            for output, found in zip(check.before, types, strict=True)
        ]

    def _is_noise(self, check: Check, after: list[Tensor], found: list[_Difference], tolerances: list[float]) -> bool:
        """Do channels differ by no more than a few times what rounding every parameter makes of them?"""
        if not has_all_values(self._model):
            return False
        noise = [torch.zeros_like(diff.error) for diff in found]
        generator = torch.Generator().manual_seed(0)
        for _ in range(_NOISE_RUNS):
            with self._peers.together():
                rounded = run(_Rounded(self._model, generator), check.inputs, check.training)
                for total, one, other in zip(noise, after, rounded, strict=True):
                    total.copy_(torch.maximum(total, _Difference(one, other).error))
                explained = zip(found, tolerances, noise, strict=True)
                excess = any(difference.excess(limit, _NOISE * most) for difference, limit, most in explained)
            if not self._peers.largest(float(excess)):
                return True
        return False

    def _error(
        self, check: Check, found: list[_Difference], tolerances: list[float], rescaling: Rescaling
    ) -> VerificationError:
        worst, tolerance = max(((diff.relative, limit) for diff, limit in zip(found, tolerances, strict=True)))
        if rescaling.power_of_two:
            remark = "Factors that are powers of two should leave them bitwise equal."
        else:
            remark = "If the model merely amplifies rounding errors, power_of_two=True is exact."
        shapes = ", ".join(str(list(t.shape)) for t in pytree.tree_leaves(check.inputs) if isinstance(t, Tensor))
        where = f"{mode_text(check.training)} on inputs of shape {shapes}"
        return VerificationError(
            f"after rescaling, the outputs in {where} differ by {worst:.2e} relative to the largest entry of a channel "
            f"(allowed: {tolerance:.0e}); all parameters are restored. {remark} Otherwise an operation of this model "
            "has a wrong rule: traced.explain() lists what was assumed.",
            worst,
            tolerance,
        )


class _Difference:
    """Two outputs, compared channel by channel: dimension 1, of a vector each entry.

    Attributes:
        error: the largest difference in each channel.
        size: the largest finite entry of each channel before.
        relative: the largest ratio of the two.
        is_finite: is any entry finite?
    """

    def __init__(self, before: Tensor, after: Tensor) -> None:
        wide = torch.complex128 if before.is_complex() else torch.float64
        a, b = before.detach().to(wide), after.detach().to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)
        size = torch.where(torch.isfinite(a), a.abs(), 0.0)
        self.is_finite = bool(torch.isfinite(a).any())
        self.error, self.size = _by_channel(error), _by_channel(size)
        ratios = torch.where(self.size > 0, self.error / self.size, self.error)
        self.relative = float(ratios.nan_to_num(torch.inf, torch.inf).max()) if ratios.numel() else 0.0

    def excess(self, tolerance: float, noise: Tensor | float = 0.0) -> bool:
        """Does any channel differ by more than this part of its largest entry, and noise beside it?"""
        return bool((self.error > tolerance * torch.where(self.size > 0, self.size, 1.0) + noise).any())


def _by_channel(values: Tensor) -> Tensor:
    """The largest value of each channel."""
    if values.ndim < 2 or not values.numel():
        return values.reshape(-1)
    return values.transpose(0, 1).flatten(1).amax(1)


class _Rounded(nn.Module):
    """A model with parameters that are larger or smaller, at random, by as much as they are rounded by.

    They are drawn here and not by ``forward``: a generator that a model holds is put back after each call.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        super().__init__()

        def rounded(tensor: Tensor) -> Tensor:
            signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
            return tensor.detach() * (1 + signs * torch.finfo(tensor.dtype).eps)

        self.model = model
        self._values = {name: rounded(p) for name, p in model.named_parameters() if p.is_floating_point()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self._values, args, kwargs)


def _types_of_outputs(graph: CapturedGraph) -> list[set[torch.dtype]]:
    """For each output that is a tensor, the types of the tensors that it is computed from."""
    types: dict[fx.Node, set[torch.dtype]] = {}
    for node in graph.module.graph.nodes:
        own = {leaf.dtype for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)}
        types[node] = own.union(*(types[parent] for parent in node.all_input_nodes))
    results = graph.module.graph.output_node().args[0]
    outputs = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, fx.Node)]
    return [types[node] for node in outputs[len(outputs) - _num_leaves(graph, outputs) :]]


def _num_leaves(graph: CapturedGraph, outputs: list[fx.Node]) -> int:
    """How many of the last outputs are the model's own; those before them are written into buffers and inputs."""
    return min(graph.structure.num_leaves, len(outputs))
