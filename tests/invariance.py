"""What must not change when a network is rescaled, checked on any network."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagpath


def assert_invariant(net: nn.Module, x: Tensor) -> dagpath.TracedModel:
    """Bitwise the same function, the same path norm, and the same minimum of ``F`` from a rescaled copy."""
    net = net.double().eval()
    x = x.double()
    traced = dagpath.trace(net, x)
    expected, norm, gram = (
        dagpath.balance(traced).objective[1],
        dagpath.path_norm(traced),
        dagpath.gram_diagonal(traced),
    )
    with torch.no_grad():
        before = net(x)
        rescaling = dagpath.random_rescaling(traced, 2.0, power_of_two=True, generator=torch.Generator().manual_seed(0))
        rescaling.apply_()
        assert torch.equal(net(x), before)
    assert dagpath.path_norm(traced) == pytest.approx(norm, rel=1e-10)
    multipliers = rescaling.multipliers()
    moved = sum(float(multipliers[name].log().expand(g.shape)[g > 0].sum()) for name, g in gram.items())
    assert dagpath.balance(traced).objective[1] == pytest.approx(expected - 2 * moved, rel=1e-9, abs=1e-6)
    assert dagpath.rescale_(copy.deepcopy(net), x).converged
    return traced


def rescale_alike_(net: nn.Module, x: Any, found: dagpath.Rescaling, *args: Any, **options: Any) -> None:
    """Rescale a model in memory by factors that were found for its values elsewhere: in files, in other processes.

    They must be the model's own: the same numbers for powers of two, otherwise the same minimum. Two computations of it
    round apart on some processors, since tensors that are fetched one by one are not summed as those that are held; the
    tolerance is ten times that of the solver. What the factors make of the values is then bitwise the same everywhere.
    """
    expected = dagpath.rescale_(copy.deepcopy(net), x, *args, **options)
    tolerance = 0 if expected.power_of_two else 1e-8
    torch.testing.assert_close(found.log_scales, expected.log_scales, rtol=0, atol=tolerance)
    replace(expected, log_scales=found.log_scales).apply_(net)
