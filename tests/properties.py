"""What is true of every network, from one trace of it: the function, path quantities, both engines, balancing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dagpath

TOL = 1e-9
"""The optimality that is asked of the solver."""

_PATHS = 3000
"""Networks of more paths are not realized path by path."""


def outputs(net: nn.Module, inputs: Sequence[Any], training: bool) -> list[Tensor]:
    """The outputs of one call."""
    return outputs_in_a_row(net, [inputs], training)


def outputs_in_a_row(
    net: nn.Module, calls: Sequence[Sequence[Any]], training: bool, after_first: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """The outputs of calls one after the other in one mode, with the same random numbers each time.

    Buffers, modes and what a random network keeps come back as they were.

    Args:
        net: the network.
        calls: the inputs of each call.
        training: in train mode?
        after_first: called between the first call and the second.
    """
    modes = [(module, module.training) for module in net.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    net.train(training)
    found: list[Tensor] = []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for number, inputs in enumerate(calls):
                if number == 1:
                    after_first()
                found += [leaf.clone() for leaf in pytree.tree_leaves(net(*(_copied(x) for x in inputs)))]
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        getattr(net, "forget", lambda: None)()
    return found


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def assert_bitwise(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(one, other):  # or there are NaNs in both
            place = f"{what} {index}: "
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=place.__add__)


def traced_untouched(net: nn.Module, inputs: tuple[Any, ...]) -> dagpath.TracedModel:
    """Trace a network; nothing of it changes, nor does the state of random generators."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    modes = [module.training for module in net.modules()]
    gradients = [parameter.requires_grad for parameter in net.parameters()]
    states = torch.get_rng_state(), random.getstate()
    traced = dagpath.trace(net, inputs)
    assert torch.equal(torch.get_rng_state(), states[0]), "tracing draws random numbers"
    assert random.getstate() == states[1], "tracing draws Python's random numbers"
    assert [module.training for module in net.modules()] == modes, "tracing changes a mode"
    assert [parameter.requires_grad for parameter in net.parameters()] == gradients, "tracing changes requires_grad"
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert after.keys() == tensors.keys(), "tracing registers or drops a tensor"
    for name, tensor in after.items():
        assert tensor is tensors[name], f"tracing replaces {name}"
        assert_bitwise([tensor.detach()], [before[name]], name)
        assert getattr(tensor, "grad", None) is None, f"tracing leaves a gradient at {name}"
    return traced


def quantities(traced: dagpath.TracedModel) -> dict[str, Any]:
    """Path quantities that no rescaling changes, and diag(G), which it changes by known factors."""
    return {
        "norms": [dagpath.path_norm(traced, p, log=True) for p in (1, 2, 3)],
        "count": dagpath.path_count(traced),
        "mass": _masses(traced) if traced.graph.num_neurons else torch.zeros(0),
        "gram": dagpath.gram_diagonal(traced),
    }


def _masses(traced: dagpath.TracedModel) -> Tensor:
    """The mass of the paths through each neuron; nothing where dagpath says that it cannot tell them apart."""
    try:
        return dagpath.path_mass(traced, 2)
    except dagpath.UnsupportedOpError:
        return torch.zeros(0)


def assert_quantities(found: dict[str, Any], expected: dict[str, Any], multipliers: dict[str, Tensor]) -> None:
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), rtol=1e-10, atol=1e-9)
    assert found["count"] == expected["count"]
    torch.testing.assert_close(found["mass"], expected["mass"], rtol=1e-9, atol=0, equal_nan=True)
    for name, values in found["gram"].items():
        torch.testing.assert_close(values, expected["gram"][name] / multipliers[name] ** 2, rtol=1e-9, atol=0)


def check_rescaling(traced: dagpath.TracedModel, inputs: Sequence[Any], sigma: float = 3.0, seed: int = 0) -> None:
    """Powers of two leave both modes bitwise as they were, path quantities follow, and the inverse is exact."""
    net = traced.model
    before = {mode: outputs(net, inputs, mode) for mode in (False, True)}
    known = quantities(traced)
    saved = [parameter.detach().clone() for parameter in net.parameters()]
    generator = torch.Generator().manual_seed(seed)
    rescaling = dagpath.random_rescaling(traced, sigma, power_of_two=True, generator=generator)
    rescaling.apply_()
    try:
        for mode, values in before.items():
            assert_bitwise(outputs(net, inputs, mode), values, f"outputs in {'train' if mode else 'eval'} mode")
        assert_quantities(quantities(traced), known, rescaling.multipliers())
        rescaling.inverse().apply_()
        assert_bitwise([parameter.detach() for parameter in net.parameters()], saved, "parameters taken back")
    finally:
        restore_(net, saved)


def restore_(net: nn.Module, saved: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, values in zip(net.parameters(), saved, strict=True):
            parameter.copy_(values)


def unrolled_quantities(graph: dagpath.UnrolledGraph) -> dict[str, Any]:
    """What the passes over the captured graph compute, from the unrolled graph."""
    norms = [graph.path_norm(p) for p in (1, 2, 3)]
    return {
        "norms": [math.log(norm) if norm else -math.inf for norm in norms],
        "count": graph.path_count(),
        "gram": graph.gram_diagonal(),
        "cut": bool(graph.cuts),
    }


def assert_agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two engines give the same quantities."""
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), rtol=1e-10, atol=1e-10)
    assert found["count"] == expected["count"]
    for name, values in found["gram"].items():
        message = f"{name}: ".__add__
        torch.testing.assert_close(values, expected["gram"][name], rtol=1e-10, atol=0, msg=message)


def first_example(traced: dagpath.TracedModel, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What the eval graph takes: one example, as examples may be mixed elsewhere, or all of them."""
    return tuple(x[:1] for x in inputs) if traced.captured.eval.batch == 1 else tuple(inputs)


def check_realization(traced: dagpath.TracedModel, example: tuple[Any, ...], expected: Sequence[Tensor]) -> None:
    """The sum over all paths is the function, of one example.

    A maximum over no entries (a window that sees padding alone) is minus infinity, which no sum of paths is.
    """
    if not all(bool(torch.isfinite(other).all()) for other in expected):
        return
    realized = pytree.tree_leaves(dagpath.PathLifting(traced, _PATHS).realize(example))
    for one, other in zip(realized, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(1.0, float(other.abs().max())))


def check_engines(traced: dagpath.TracedModel, inputs: Sequence[Any]) -> None:
    """The unrolled graph has the same quantities; its paths, where nothing cuts them, are the function."""
    found = unrolled_quantities(traced.unroll())
    assert_agree(found, quantities(traced))
    if not found["cut"] and found["count"] <= _PATHS and in_float64(traced):
        example = first_example(traced, inputs)
        check_realization(traced, example, outputs(traced.model, example, False))


def in_float64(traced: dagpath.TracedModel) -> bool:
    """Is everything that the network computes in float64? Narrower numbers are rounded."""
    values = pytree.tree_leaves([node.meta.get("val") for node in traced.fx.graph.nodes])
    return all(v.dtype == torch.float64 for v in values if isinstance(v, Tensor) and v.is_floating_point())


def check_balance(traced: dagpath.TracedModel, criterion: str = "pathcond") -> None:
    """Balancing converges, and what it applies is taken back by its inverse, up to rounding."""
    net = traced.model
    rescaling = dagpath.balance(traced, criterion, tol=TOL)
    assert rescaling.converged
    assert rescaling.optimality <= TOL
    assert rescaling.objective[1] <= rescaling.objective[0] + 1e-9 * max(1.0, abs(rescaling.objective[0]))
    assert bool((rescaling.log_scales.abs() <= rescaling.bound).all())
    gram = dagpath.gram_diagonal(traced)
    if criterion == "pathcond":
        assert largest_gradient(traced, gram, rescaling) <= TOL + 1e-10
    saved = [parameter.detach().clone() for parameter in net.parameters()]
    rescaling.apply_()
    multipliers = rescaling.multipliers()
    if all(parameter.dtype == torch.float64 for parameter in net.parameters()):
        for name, values in dagpath.gram_diagonal(traced).items():
            torch.testing.assert_close(values, gram[name] / multipliers[name] ** 2, rtol=1e-9, atol=0)
    rescaling.inverse().apply_()
    for parameter, values in zip(net.parameters(), saved, strict=True):
        torch.testing.assert_close(parameter.detach(), values, rtol=8 * torch.finfo(values.dtype).eps, atol=0)
    restore_(net, saved)


def largest_gradient(traced: dagpath.TracedModel, gram: dict[str, Tensor], rescaling: dagpath.Rescaling) -> float:
    """``‖∇F‖∞ / p`` of path conditioning, element by element; groups that the bound holds do not count."""
    scales = torch.cat([torch.zeros(1, dtype=torch.float64), rescaling.log_scales])
    size = len(scales)
    masses, dsts, srcs = [], [], []
    for name, values in gram.items():
        ends = traced.graph.ends[name]
        dst, src = (end.expand(values.shape)[values > 0] for end in (ends.dst, ends.src))
        masses.append(values[values > 0].log() - 2 * (scales[dst] - scales[src]))
        dsts.append(dst)
        srcs.append(src)
    if not any(map(len, masses)) or size == 1:
        return 0.0
    mass, dst, src = torch.cat(masses), torch.cat(dsts), torch.cat(srcs)
    share = mass.softmax(0)
    entering, leaving = (torch.bincount(end, share, size) for end in (dst, src))
    balance = (torch.bincount(dst, minlength=size) - torch.bincount(src, minlength=size)).double()
    gradient = (-2 * (entering - leaving) + 2 * balance / len(mass))[1:]
    z, bound = rescaling.log_scales, rescaling.bound
    held = ((z >= bound) & (gradient < 0)) | ((z <= -bound) & (gradient > 0))
    return float(torch.where(held, 0.0, gradient).abs().max())
