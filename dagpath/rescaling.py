"""A rescaling of a model: one factor per scale group, and what applying it means."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dagpath.errors import BalanceError
from dagpath.flow.neurons import Ends
from dagpath.report import table
from dagpath.state import unwrap
from dagpath.trace import TracedModel

_FOUND = (
    "power_of_two",
    "objective",
    "optimality",
    "measure",
    "live",
    "iterations",
    "products",
    "converged",
    "seconds",
    "bound",
    "rounding_loss",
)
"""What is saved beside the factors."""
_SMALLER = "rescale by less (a smaller bound of balance or rescale_, a smaller sigma of random_rescaling)"
_CHUNK = 1 << 18
"""Elements that are multiplied at a time, in float64: few enough to stay in the cache."""


@dataclass(frozen=True, eq=False)
class Rescaling:
    """Factors ``λ = exp(log_scales)`` of the free scale groups of a traced model.

    Each parameter element is multiplied by ``λ[dst] / λ[src]``, which leaves the function of the model as it was. Made
    by :func:`balance`, :func:`rescale_` and :func:`random_rescaling`.

    Attributes:
        traced: the model that it belongs to.
        log_scales: float64 [num_groups], natural logarithms.
        power_of_two: are all factors powers of two? Then applying it is exact in floating point.
        objective: the criterion before and after; NaN where there is none (a random rescaling).
        optimality: how far from the minimum the solver stopped (before factors were rounded); 0 at the minimum.
        measure: what the optimality is, in words: ``‖∇F‖∞ / p`` for path conditioning, see ``tol`` of :func:`balance`.
        live: the number of live parameters, those that count: for path conditioning, those that a path of nonzero
            value, but for themselves, meets (p in the formulas); for norms and ranges, those that are not zero.
        iterations: iterations of the solver.
        products: its Hessian products.
        converged: did the solver reach its tolerance? True where none ran.
        seconds: time taken, all stages together.
        stages: the same, stage by stage.
        bound: the largest ``|log λ|`` that was allowed.
        rounding_loss: how much higher the objective is than at the minimum, for rounding to powers of two.
        difference: largest relative difference of the outputs, where it was verified.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)))
        >>> rescaling.log_scales.shape, rescaling.multipliers()["2.weight"].shape
        (torch.Size([8]), torch.Size([2, 8]))
        >>> _ = rescaling.apply_()
    """

    traced: TracedModel = field(repr=False)
    log_scales: Tensor = field(repr=False)
    power_of_two: bool = False
    objective: tuple[float, float] = (math.nan, math.nan)
    optimality: float = math.nan
    measure: str = ""
    live: int | None = None
    iterations: int = 0
    products: int = 0
    converged: bool = True
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict, repr=False)
    bound: float = math.inf
    rounding_loss: float = 0.0
    difference: float | None = None

    def __post_init__(self) -> None:
        if self.log_scales.shape != (self.traced.graph.num_groups,):
            raise ValueError(
                f"log_scales must have shape ({self.traced.graph.num_groups},), one for each free group, got "
                f"{tuple(self.log_scales.shape)}"
            )

    def multipliers(self) -> dict[str, Tensor]:
        """The factor of every element: {parameter name: float64 tensor broadcastable to the parameter}."""
        scales = self._scales()
        return {name: scales[ends.dst] / scales[ends.src] for name, ends in self.traced.graph.ends.items()}

    def inverse(self) -> Rescaling:
        """The rescaling that takes this one back."""
        return Rescaling(
            self.traced, -self.log_scales, self.power_of_two, objective=self.objective[::-1], bound=self.bound
        )

    def __matmul__(self, other: Rescaling) -> Rescaling:
        """``a @ b``: the rescaling that does what ``b`` does and then what ``a`` does.

        Raises:
            ValueError: they belong to models with different neuron graphs.
        """
        if not isinstance(other, Rescaling):
            return NotImplemented
        if self.traced.graph.digest() != other.traced.graph.digest():
            raise ValueError("these rescalings belong to models with different neuron graphs")
        return Rescaling(
            self.traced, self.log_scales + other.log_scales, self.power_of_two and other.power_of_two, bound=math.inf
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rescaling to a safetensors file: the factors, what the solver reported, and which graph it is for.

        Raises:
            ImportError: the package safetensors is not installed (``pip install "dagpath[io]"``).
        """
        from safetensors.torch import save_file  # an extra

        found = {name: getattr(self, name) for name in _FOUND}
        metadata = {"dagpath.rescaling": json.dumps(found), "dagpath.graph": self.traced.graph.digest()}
        save_file({"log_scales": self.log_scales}, path, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], traced: TracedModel) -> Rescaling:
        """Read a rescaling that :meth:`save` wrote.

        Args:
            path: the file.
            traced: the model that it is for; its neuron graph must be that of the model it was made for.

        Raises:
            ValueError: the file holds something else, or a rescaling for another neuron graph.
            ImportError: the package safetensors is not installed (``pip install "dagpath[io]"``).
        """
        from safetensors import SafetensorError, safe_open  # an extra

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "dagpath.rescaling" not in metadata:
                    raise ValueError(f"{path} holds no rescaling")
                log_scales = file.get_tensor("log_scales")
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        if metadata["dagpath.graph"] != traced.graph.digest():
            raise ValueError(f"the rescaling in {path} is for a model with another neuron graph")
        found = json.loads(metadata["dagpath.rescaling"])
        return Rescaling(traced, log_scales, **{**found, "objective": tuple(found["objective"])})

    @torch.no_grad()
    def apply_(self, model: nn.Module | None = None) -> nn.Module:
        """Multiply the parameters in place. All or nothing: if it fails, every parameter is bitwise what it was.

        Data types, devices, storages and ``requires_grad`` stay. Parameters with ``requires_grad=False`` are rescaled
        too: the function would change otherwise. Gradients in ``.grad`` and an optimizer's state still belong to the
        old parameters. The outputs are not compared here; :func:`rescale_` does that.

        Args:
            model: a model with the same parameters as the traced one, for instance a copy; None for the traced one.

        Returns:
            The model.

        Raises:
            ValueError: the model's parameters have other names or shapes.
            BalanceError: a product leaves the range of the parameter's type, or, where all factors are powers of two,
                is not exact in it (a subnormal number).

        Cost: reads and writes each parameter once; a copy of the parameters is held meanwhile.
        """
        model = self.traced.model if model is None else model
        parameters = dict(unwrap(model).named_parameters())
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        _check_same(shapes, self.traced.graph.shapes)
        scales = self._scales()
        with transaction(parameters):
            for name, parameter in parameters.items():
                _multiply_(name, parameter, self.traced.graph.ends[name], scales, self.power_of_two)
        return model

    def summary(self, layers: bool = False) -> str:
        """What was found, as a table.

        Args:
            layers: a second table, with the factors λ of each layer that has free neurons: the smallest, the median
                and the largest, the standard deviation of log λ, and how many are at the bound.
        """
        graph = self.traced.graph
        parameters = list(self.traced.model.parameters())
        frozen = sum(not parameter.requires_grad for parameter in parameters)
        rows = [
            ("neurons", f"{graph.num_neurons:,}"),
            ("free scale groups", f"{graph.num_groups:,}"),
            ("fixed neurons", f"{int((graph.group_of == 0).sum()):,}"),
        ]
        if not math.isnan(self.objective[0]):
            rows.append(("criterion before", _figure(self.objective[0])))
            rows.append(("criterion after", _figure(self.objective[1])))
            if self.rounding_loss:
                rows.append(("lost by rounding to powers of two", f"{self.rounding_loss:,.3g}"))
        if not math.isnan(self.optimality):
            state = "" if self.converged else "  NOT CONVERGED"
            when = " before rounding" if self.power_of_two else ""
            rows.append((f"optimality{when} ({self.measure})", f"{self.optimality:.1e}{state}"))
            if self.live is not None:
                rows.append(("live parameters", f"{self.live:,} of {graph.num_parameters:,}"))
            rows.append(("iterations", f"{self.iterations}"))
            rows.append(("seconds", f"{self.seconds:.3f}"))
        if graph.num_groups:
            spread = self.log_scales.exp()
            rows.append(("scale factors, smallest", f"{float(spread.min()):.4g}"))
            rows.append(("scale factors, median", f"{float(spread.median()):.4g}"))
            rows.append(("scale factors, largest", f"{float(spread.max()):.4g}"))
            rows.append(("groups at the bound", f"{self._at_bound(self.log_scales):,}"))
        if frozen:
            rows.append(("frozen parameters, rescaled too", f"{frozen} of {len(parameters)}"))
        if self.difference is not None:
            rows.append(("largest difference of outputs", f"{self.difference:.1e}"))
        text = table(("quantity", "value"), rows)
        if not graph.num_groups:
            text += "\nNo neuron is free, so nothing was rescaled: traced.explain() says why."
        elif self.live == 0:
            text += "\nNo parameter is live (all paths, or all weights, are zero), so there is nothing to balance."
        elif layers:
            text += "\n\n" + self._layer_table()
        return text

    def _layer_table(self) -> str:
        graph = self.traced.graph
        rows = []
        for index, site in enumerate(graph.sites):
            groups = graph.group_of[graph.maker_of == index]
            z = self.log_scales[groups[groups > 0] - 1]
            if not len(z):
                continue
            low, median, high = (f"{float(part.exp()):.4g}" for part in (z.min(), z.median(), z.max()))
            spread = f"{float(z.std(correction=0)):.3f}"
            rows.append((site.module or "(model)", f"{len(z):,}", low, median, high, spread, f"{self._at_bound(z):,}"))
        return table(("layer", "free", "smallest", "median", "largest", "std of log", "at the bound"), rows)

    def _at_bound(self, z: Tensor) -> int:
        return int((z.abs() >= self.bound * (1 - 1e-12)).sum())

    def _scales(self) -> Tensor:
        """λ of every group, 1 for the fixed group 0 in front."""
        exact = torch.round(self.log_scales / math.log(2))
        scales = torch.exp2(exact) if self.power_of_two else self.log_scales.exp()
        return torch.cat([scales.new_ones(1), scales]).cpu()


class transaction:  # noqa: N801 (a context manager, used like a function)
    """Keep copies of parameters; put them back, bitwise, if the block raises or is interrupted."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._saved = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, saved in self._saved:
                    parameter.copy_(saved)


def _figure(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.6g}"


def _check_same(shapes: Mapping[str, torch.Size], traced: Mapping[str, torch.Size]) -> None:
    for name, shape in traced.items():
        if name not in shapes:
            raise ValueError(f"the model is not the traced one: it has no parameter {name!r}")
        if shapes[name] != shape:
            raise ValueError(
                f"the model is not the traced one: its parameter {name!r} has shape {tuple(shapes[name])}, not "
                f"{tuple(shape)}"
            )
    for name in shapes:
        if name not in traced:
            raise ValueError(f"the model is not the traced one: it has a parameter {name!r} more")


def _multiply_(name: str, parameter: Tensor, ends: Ends, scales: Tensor, exact: bool) -> None:
    dst, src = (scales[end].to(parameter.device) for end in (ends.dst, ends.src))
    if bool((dst == 1).all()) and bool((src == 1).all()):
        return
    for rows in _row_chunks(parameter):
        part = parameter[rows]
        product = part.double() * _rows_of(dst, rows, parameter) / _rows_of(src, rows, parameter)
        part.copy_(product)
        if exact and not torch.equal(part.double(), product):
            raise BalanceError(
                f"{name}: multiplied by powers of two between {float(dst.min() / src.max()):.3g} and "
                f"{float(dst.max() / src.min()):.3g}, values leave the range in which {parameter.dtype} is exact; "
                f"{_SMALLER}, with power_of_two=False, or in a wider type"
            )
        if not bool(torch.isfinite(part).all()):
            raise BalanceError(
                f"{name}: rescaled by up to {float(dst.max() / src.min()):.3g}, values leave the range of "
                f"{parameter.dtype}; {_SMALLER}, or convert the model to a wider type first"
            )


def _row_chunks(parameter: Tensor) -> Iterator[slice | tuple[()]]:
    """Slices of the first dimension that hold about ``_CHUNK`` elements each."""
    if parameter.ndim == 0:
        yield ()
        return
    step = max(1, _CHUNK * len(parameter) // max(parameter.numel(), 1))
    for start in range(0, len(parameter), step):
        yield slice(start, start + step)


def _rows_of(end: Tensor, rows: slice | tuple[()], parameter: Tensor) -> Tensor:
    """The part of a broadcastable tensor that meets ``parameter[rows]``."""
    return end[rows] if end.ndim == parameter.ndim and end.ndim and end.shape[0] > 1 else end
