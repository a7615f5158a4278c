"""The heaviest paths of a network."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dagpath.capture.site import describe
from dagpath.errors import UnsupportedOpError
from dagpath.lifting import path_norm
from dagpath.passes.structure import CONSTANT, Structure
from dagpath.passes.values import is_count
from dagpath.paths.alive import alive_elements, masses_with
from dagpath.paths.search import Search, Step
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_finite, require_traced

_MARK = 50
"""Elements of a path that is looked for have the value 2**_MARK, all others zero: a path through fewer of them is far
lighter."""


@dataclass(frozen=True)
class Element:
    """An element of a parameter.

    Attributes:
        parameter: its name, as in ``model.named_parameters()``.
        index: where in the parameter.

    Example:
        >>> from dagpath.paths.top import Element
        >>> print(Element("0.weight", (1, 0)))
        0.weight[1, 0]
    """

    parameter: str
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.parameter}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class ChannelPath:
    """A path through channels, for all copies of it at different positions of the feature maps; from :func:`top_paths`.

    Attributes:
        neurons: names of the neurons that it crosses, as ``module.channel``, from its source (the name of an input,
            of a barrier, or ``"(1)"`` for the constant neuron) to the last neuron.
        elements: the parameter elements on the way, one before each neuron but the source.
        end: the output or the barrier in which it ends.
        value: ``|Φ|``, the product of the magnitudes of the elements and of the constants between them.
        log_value: its natural logarithm.
        share: ``Φ² / Σ Φ²``, its share of the squared path-norm, for one position.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]])), net[2].weight.fill_(-4.0)
        >>> path = dagpath.top_paths(dagpath.trace(net, torch.zeros(1, 2)), 1)[0]
        >>> path.neurons, path.end, round(path.value, 6)
        (('input', '0.1', '2.0'), 'output', 12.0)
        >>> [str(element) for element in path.elements]
        ['0.weight[1, 1]', '2.weight[0, 1]']
    """

    neurons: tuple[str, ...]
    elements: tuple[Element, ...]
    end: str
    value: float
    log_value: float
    share: float

    def __str__(self) -> str:
        return f"{' → '.join(self.neurons)}: {self.value:.4g}, share {self.share:.2e}"


@plain_computation()
def top_paths(traced: TracedModel, k: int, progress: bool = True) -> list[ChannelPath]:
    """The k heaviest paths of a network, those of the largest ``|Φ|``, at the parameters' current values.

    A path is a sequence of neurons with a parameter element before each. Two elements of one kernel make two paths.
    Copies of a path at other positions of the feature maps share all their elements, so they are one path here; one of
    them has to fit on the maps. Constants on the way (the 1/k of a mean, the 1/σ of a batch norm) belong to the value;
    where one depends on the position (the border of a mean that does not count its padding, an interpolation), its
    largest value does, so that the value is that of the best position or above it. The constant of a batch norm,
    ``β − mean γ/σ``, belongs to the element β.

    A path starts at an input, at the constant neuron (with a bias), or at an operation that no path crosses, and ends
    at an output or at such an operation.

    Args:
        traced: the traced model.
        k: how many.
        progress: show a progress bar where it takes longer than a second.

    Returns:
        The paths, heaviest first. Fewer than k where the network has fewer of a value above zero.

    Raises:
        ValueError: k is no integer or below 1, or a parameter is not finite.
        UnsupportedOpError: a weight is made of parameters in a way that no edges between channels have (a padded
            weight, one row of a product twice), or channels with several positions are added up with constants that
            differ.

    Cost: one pass over all parameters (the heaviest path to each neuron, vectorized per layer), a search whose steps
    are as many as the edges of the paths found, and one float32 forward pass per path, which tells whether it fits on
    the feature maps.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        ...     _ = net[2].weight.copy_(torch.tensor([[4.0, 1.0]]))
        ...     _ = net[2].bias.fill_(5.0)
        >>> for path in dagpath.top_paths(dagpath.trace(net, torch.zeros(1, 2)), 3):
        ...     print(path)
        input → 0.0 → 2.0: 8, share 5.61e-01
        (1) → 2.0: 5, share 2.19e-01
        input → 0.0 → 2.0: 4, share 1.40e-01
    """
    require_traced(traced)
    if not is_count(k):
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    require_finite(traced)
    structure = traced.graph.structure()
    if structure.inexact is not None:
        node, reason = structure.inexact
        raise UnsupportedOpError(f"{describe(node)} {reason}")
    layers = traced.graph.layers(structure)
    log_norm = path_norm(traced, 2, log=True)
    starts = [layer.start for layer in layers]

    def name(node: int) -> str:
        layer = layers[bisect.bisect_right(starts, node) - 1]
        return layer.name(node - layer.start)

    def described(steps: list[Step]) -> ChannelPath:
        through = [step for step in steps if step.parameter]
        shapes = (traced.graph.shapes[step.parameter] for step in through)
        places = (np.unravel_index(step.element, tuple(shape)) for step, shape in zip(through, shapes, strict=True))
        elements = (
            Element(step.parameter, tuple(int(place) for place in index))
            for step, index in zip(through, places, strict=True)
        )
        log_value = sum(step.log_value for step in steps)
        neurons = (name(steps[0].src), *(name(step.dst) for step in through))
        value, share = _exp(log_value), _exp(2 * (log_value - log_norm))
        return ChannelPath(neurons, tuple(elements), name(steps[-1].dst), value, log_value, share)

    paths = itertools.islice(_that_fit(traced, structure), int(k))
    return [described(steps) for steps in tqdm(paths, "paths", int(k), disable=not progress, delay=1, leave=False)]


def _exp(log: float) -> float:
    try:
        return math.exp(log)
    except OverflowError:
        return math.inf


def _that_fit(traced: TracedModel, structure: Structure) -> Iterator[list[Step]]:
    """The paths of a network that some position has, heaviest first, each once."""
    known: set[tuple[object, ...]] = set()
    alive: dict[str, Tensor] | None = None
    while True:
        for steps in Search(structure, alive):
            elements = ((step.dst, step.record, step.element) for step in steps if step.parameter)
            key = (steps[0].src, steps[-1].dst, *elements)
            if key in known:
                continue
            known.add(key)
            if _fits(traced, structure, steps):
                yield steps
            elif alive is None:  # elements that never fit would make far more such paths
                break
        else:
            return
        alive = alive_elements(traced, structure)


def _fits(traced: TracedModel, structure: Structure, steps: list[Step]) -> bool:
    """Is there a position at which the path stays on the feature maps?

    The network in which only the elements of the path are left, with a huge value each, has paths through some of them,
    and if this one fits, a path through all, which outweighs the others.
    """
    parameters = dict(traced.values)
    names = {edges.parameter for edges in structure.edges}
    marked = {
        name: torch.zeros(parameters[name].shape, dtype=_wide(parameters[name]), device=parameters[name].device)
        for name in names
    }
    expected = -_MARK / 2
    for step in steps:
        log_constant = step.log_value
        if step.parameter:
            marked[step.parameter].view(-1)[step.element] = 2.0**_MARK
            element = float(parameters[step.parameter].reshape(-1)[step.element])
            log_constant = 0.0 if step.src == CONSTANT else step.log_value - math.log(abs(element))
            expected += _MARK
        expected += log_constant / math.log(2)
    total = masses_with(traced, marked, torch.float32).total()
    return bool(total.values > 0) and math.log2(float(total.values)) + total.log2_scale > expected


def _wide(parameter: Tensor) -> torch.dtype:
    """The type of a parameter, which the graph may ask for; a wider one where that has not the range for marks."""
    return parameter.dtype if torch.finfo(parameter.dtype).max > 2.0 ** (2 * _MARK) else torch.float32
