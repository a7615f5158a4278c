"""What path conditioning will do to a freshly initialized network, from its architecture and its scheme alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dagpath.apply.rescaling import Rescaling
from dagpath.balance import balance
from dagpath.graph.explanation import table
from dagpath.lifting import expected_gram_diagonal, gram_diagonal
from dagpath.solver import MassAggregator, Problem
from dagpath.study.schemes import checked_scheme, second_moments
from dagpath.trace import TracedModel, trace


@dataclass(frozen=True)
class Effect:
    """What path conditioning does to a network.

    Attributes:
        layers: name of a layer -> mean of log λ over its free neurons (natural logarithm).
        spread: standard deviation of log λ over all free groups.
        drop: by how much the criterion falls, per live parameter.
        condition: largest over smallest live entry of the Gram diagonal, before and after. The criterion weighs the
            mean of the entries against their geometric mean, so this ratio of two may grow while it falls.
        rescaling: the factors themselves, not applied; None where only figures were kept.

    Example:
        >>> import torch, dagpath
        >>> from dagpath import study
        >>> net = study.mlp(2, 2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(1.0), net[2].weight.fill_(4.0)
        >>> effect = study.Effect.on(dagpath.trace(net, torch.zeros(1, 2)))
        >>> [round(ratio, 6) for ratio in effect.condition]  # G was 16 for the first weights and 2 for the last
        [8.0, 1.0]
    """

    layers: dict[str, float]
    spread: float
    drop: float
    condition: tuple[float, float]
    rescaling: Rescaling | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(traced: TracedModel, log_gram: Mapping[str, Tensor], bound: float | None = None) -> Effect:
        """The effect on a traced model of the given diagonal of the path Gram matrix.

        Args:
            traced: the traced model.
            log_gram: natural logarithms of diag(G), as ``gram_diagonal(traced, log=True)`` gives them.
            bound: largest ``|log λ|``.
        """
        rescaling = balance(traced, _GivenGram(log_gram), bound=bound)
        z = rescaling.log_scales
        before, after = _live(traced, log_gram, torch.zeros_like(z)), _live(traced, log_gram, z)
        drop = (rescaling.objective[0] - rescaling.objective[1]) / max(rescaling.live or 0, 1)
        return Effect(
            {name: float(part.mean()) for name, part in rescaling.layers()},
            float(z.std(correction=0)) if len(z) else 0.0,
            drop,
            (_ratio(before), _ratio(after)),
            rescaling,
        )

    @staticmethod
    def on(traced: TracedModel, bound: float | None = None) -> Effect:
        """The effect on a traced model as it is.

        Args:
            traced: the traced model.
            bound: largest ``|log λ|``.

        Cost: that of :func:`dagpath.gram_diagonal` and of a solve.
        """
        return Effect.of(traced, gram_diagonal(traced, log=True), bound)

    def __str__(self) -> str:
        rows = [
            ("standard deviation of log λ", f"{self.spread:.3g}"),
            ("fall of the criterion per live parameter", f"{self.drop:.3g}"),
            ("largest / smallest diag(G), before", f"{self.condition[0]:.3g}"),
            ("largest / smallest diag(G), after", f"{self.condition[1]:.3g}"),
        ]
        layers = [(name, f"{value:+.4f}", f"{math.exp(value):.4g}") for name, value in self.layers.items()]
        return table(("effect", "value"), rows) + "\n\n" + table(("layer", "mean log λ", "factor"), layers)


@dataclass(frozen=True)
class _GivenGram:
    """Path conditioning of a given Gram diagonal, from its logarithms."""

    log_gram: Mapping[str, Tensor]

    def problem(self, traced: TracedModel, bound: float, device: torch.device) -> Problem:
        masses = MassAggregator(traced.graph.num_groups, device)
        largest = max((float(values.max()) for values in self.log_gram.values() if values.numel()), default=-math.inf)
        offset = largest if math.isfinite(largest) else 0.0
        for name, values in self.log_gram.items():
            ends = traced.graph.ends[name]
            masses.add((values - offset).exp(), ends.dst, ends.src)
        return Problem.path_conditioning(masses, bound, offset)


def _live(traced: TracedModel, log_gram: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """log diag(G) of the live parameters once the network is rescaled by ``exp(z)``."""
    log_scales = torch.cat([z.new_zeros(1), z])
    parts = []
    for name, values in log_gram.items():
        ends = traced.graph.ends[name]
        parts.append((values.cpu() - 2 * (log_scales[ends.dst] - log_scales[ends.src])).reshape(-1))
    whole = torch.cat([torch.zeros(0, dtype=torch.float64), *parts])
    return whole[whole > -math.inf]


def _ratio(logs: Tensor) -> float:
    return float((logs.max() - logs.min()).exp()) if len(logs) else 1.0


def predict(
    build: Callable[[], nn.Module],
    example_inputs: Any,
    scheme: str = "default",
    gain: float = 1.0,
    moments: Mapping[str, float | Tensor] | None = None,
    bound: float | None = None,
) -> Effect:
    """The factors that path conditioning will choose at initialization, layer by layer, without sampling.

    The diagonal of the Gram matrix sums products of squares of distinct parameters, so its expectation follows from
    their second moments (:func:`dagpath.expected_gram_diagonal`). Balancing that in place of a sample is the
    prediction: what neurons of a layer have in common, without what chance adds.

    Args:
        build: makes the model; called once.
        example_inputs: as for :func:`dagpath.trace`.
        scheme: of linear and convolutional weights: ``"default"`` (PyTorch's), ``"kaiming"``, ``"xavier"``,
            ``"lecun"``, or ``"orthogonal"``, treated as its variance.
        gain: factor of these weights.
        moments: ``E[θ²]`` of parameters, by name, in place of :func:`second_moments`, which knows of those that the
            scheme does not draw only the mean of their squares in the model that was built.
        bound: largest ``|log λ|``, as for :func:`dagpath.balance`.

    Returns:
        An :class:`Effect`; ``print`` shows it.

    Raises:
        ValueError: an unknown scheme or parameter, or a gain that is not positive and finite.

    Cost: a trace, one forward and one backward pass in float64 at batch 1, and a solve.

    Source: the closed form for perceptrons is :func:`mlp_log_scales`; the criterion is that of Lebeurrier, Vayer,
    Gribonval 2026.

    Example:
        >>> import torch
        >>> from dagpath import study
        >>> effect = study.predict(lambda: study.mlp(64, 256, 32, 10), torch.zeros(1, 64), "kaiming", gain=0.5)
        >>> {name: round(value, 2) for name, value in effect.layers.items()}
        {'0': -0.86, '2': -0.68}
    """
    model = build()
    given = dict(second_moments(model, scheme, gain))
    unknown = [name for name in moments or {} if name not in given]
    if unknown:
        raise ValueError(f"moments names {unknown[0]!r}, which is no parameter of the model")
    traced = trace(model, example_inputs)
    return Effect.of(traced, expected_gram_diagonal(traced, {**given, **(moments or {})}, log=True), bound)


def mlp_log_scales(widths: Sequence[int], scheme: str = "default", gain: float = 1.0) -> list[float]:
    """The prediction for a multilayer perceptron without biases, in closed form.

    With layers of widths ``n_0, …, n_L`` and weights of variance ``σ_l²``, every element of layer l has the expected
    Gram entry ``g_l = C / (n_{l−1} n_l σ_l²)``, and path conditioning makes all of them equal, so that::

        log λ_l = ½ Σ_{k ≤ l} (log g_k − mean of log g)

    Args:
        widths: of the input, the hidden layers and the output.
        scheme, gain: as for :func:`predict`; without biases the gain changes nothing.

    Returns:
        log λ (natural logarithm) of each hidden layer.

    Raises:
        ValueError: fewer than two widths, one that is not positive, or as for :func:`predict`.

    Example:
        >>> from dagpath.study import mlp_log_scales
        >>> [round(value, 3) for value in mlp_log_scales([8, 8, 8, 8], "kaiming")]  # of constant width: none
        [0.0, 0.0]
    """
    rule = checked_scheme(scheme, gain)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be two or more positive numbers, got {list(widths)}")
    logs = [
        -math.log(inputs * outputs * rule.variance(torch.Size((outputs, inputs))) * gain**2)
        for inputs, outputs in itertools.pairwise(widths)
    ]
    mean = math.fsum(logs) / len(logs)
    return [value / 2 + 0.0 for value in itertools.accumulate(log - mean for log in logs)][:-1]
