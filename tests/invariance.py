"""What must not change when a network is rescaled, checked on any network."""

from __future__ import annotations

import copy

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
