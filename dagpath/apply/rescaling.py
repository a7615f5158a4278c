"""A rescaling of a model: one factor per scale group, and what applying it means."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dagpath.apply.buffers import differing, require_same_neurons
from dagpath.apply.multiply import Moving, multiply_
from dagpath.apply.optimizer_state import moving_state
from dagpath.apply.saved import FOUND, read, write
from dagpath.capture.graph import shared_parameters
from dagpath.graph.explanation import table
from dagpath.runtime.distributed import Peers, reshard
from dagpath.runtime.state import unwrap
from dagpath.trace import TracedModel, require_traced


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
        converged: did the solver reach its tolerance, and does the bound hold no group? True where none ran.
        seconds: time taken, all stages together.
        stages: the same, stage by stage.
        bound: the largest ``|log λ|`` that was allowed to any group.
        rounding_loss: how much higher the objective is than at the minimum, for rounding to powers of two.
        difference: largest relative difference of the outputs, where it was verified.
        held: bool [num_groups], which groups the bound holds away from the minimum.

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
    held: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), repr=False)

    def __post_init__(self) -> None:
        if not len(self.held):
            object.__setattr__(self, "held", torch.zeros(self.log_scales.shape, dtype=torch.bool))
        if self.log_scales.shape != (self.traced.graph.num_groups,):
            raise ValueError(
                f"log_scales must have shape ({self.traced.graph.num_groups},), one for each free group, got "
                f"{tuple(self.log_scales.shape)}"
            )

    @property
    def num_held(self) -> int:
        """How many groups the bound holds away from the minimum."""
        return int(self.held.sum())

    def multipliers(self) -> dict[str, Tensor]:
        """The factor of every element, ``λ[dst] / λ[src]``.

        Returns:
            parameter name -> float64 tensor on the CPU, broadcastable to the parameter.
        """
        scales = self.scales()
        return {name: scales[ends.dst] / scales[ends.src] for name, ends in self.traced.graph.ends.items()}

    def inverse(self) -> Rescaling:
        """The rescaling that takes this one back: ``log_scales`` have the other sign."""
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

        A file of that name is replaced once the new one is complete.

        Args:
            path: the file.

        Raises:
            ImportError: the package safetensors is not installed (``pip install 'dagpath[io]'``).

        Example:
            >>> import tempfile, torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> traced = dagpath.trace(net, torch.zeros(1, 4))
            >>> rescaling = dagpath.balance(traced)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     rescaling.save(f"{folder}/factors.safetensors")
            ...     loaded = dagpath.Rescaling.load(f"{folder}/factors.safetensors", traced)
            >>> torch.equal(loaded.log_scales, rescaling.log_scales)
            True
        """
        found = {name: getattr(self, name) for name in FOUND}
        write(path, {"log_scales": self.log_scales, "held": self.held}, found, self.traced.graph.digest())

    @staticmethod
    def load(path: str | os.PathLike[str], traced: TracedModel) -> Rescaling:
        """Read a rescaling that :meth:`save` wrote.

        Args:
            path: the file.
            traced: the model that it is for; its neuron graph must be that of the model it was made for.

        Returns:
            The :class:`Rescaling` of that model, not applied.

        Raises:
            ValueError: the file holds something else, a rescaling for another neuron graph, or a damaged one; the
                message names the file and what is wrong in it.
            OSError: there is no such file, or it cannot be read.
            ImportError: the package safetensors is not installed (``pip install 'dagpath[io]'``).
        """
        require_traced(traced)
        tensors, found = read(path, traced.graph.num_groups, traced.graph.digest())
        return Rescaling(traced, **{**tensors, **found, "objective": tuple(found["objective"])})

    def apply_(self, model: nn.Module | None = None, optimizers: Iterable[Optimizer] = ()) -> nn.Module:
        """Multiply the parameters in place. All or nothing: if it fails, every parameter is bitwise what it was.

        Data types, devices, storages and ``requires_grad`` stay. Parameters with ``requires_grad=False`` are rescaled
        too: the function would change otherwise. Gradients in ``.grad`` and an optimizer's state still belong to the
        old parameters, unless the optimizer is given or :meth:`apply_to_optimizer_` follows. The outputs are not
        compared here; :func:`rescale_` does that.

        Args:
            model: a model with the same parameters as the traced one, for instance a copy; None for the traced one.
            optimizers: optimizers of the model whose state is carried along, as :meth:`apply_to_optimizer_` does; all
                or nothing for parameters and state together.

        Returns:
            The model.

        Raises:
            ValueError: the model's parameters have other names or shapes, or no values; a buffer that the traced model
                reads (a table of indices, a mask) has other values, with which other neurons meet (running statistics
                may differ: the factors are exact for any); or an optimizer has state that is not known.
            BalanceError: a product leaves the range of its type. A parameter may not overflow; where all factors are
                powers of two, its products must be exact (a subnormal number may not be); otherwise, rounding below the
                normal range (6e-5 in float16, 1e-38 in bfloat16 and float32), to zero even, may change an element by no
                more than eps of the type times the largest into the same neuron, or from the same neuron if that is
                smaller. Buffers of optimizers may not overflow; what is too small there becomes zero.

        Threads that read the model meanwhile, in a forward pass for instance, see in each element the old value or the
        new one, never anything else, and may see old ones here and new ones there. Rescalings of different models may
        be applied at the same time.

        Cost: reads and writes each parameter once; a copy of the parameters is held meanwhile. The same for each buffer
        of an optimizer.
        """
        peers = self.traced.peers if model is None else Peers.of(model)
        with peers.together():
            parameters = self._parameters(model)
            moving = [Moving(name, name, values, 1, self.power_of_two) for name, values in parameters.items()]
            for optimizer in optimizers:
                moving += moving_state(optimizer, self._movable(parameters))
        multiply_(moving, self.traced.graph.ends, self.scales(), peers)
        return self.traced.model if model is None else model

    def apply_to_optimizer_(self, optimizer: Optimizer, model: nn.Module | None = None) -> None:
        r"""Carry the state of an optimizer along, after :meth:`apply_` has multiplied the parameters. All or nothing.

        Where a parameter θ is multiplied by μ, its gradient g is divided by μ. Afterwards the state is the one that the
        optimizer would have, had it been given the gradients g / μ of the rescaled model all along:

        ============================  ================================================  ================================
        optimizer                     buffer                                            is multiplied by
        ============================  ================================================  ================================
        SGD, Muon                     momentum_buffer                                   1/μ
        Adam, AdamW                   exp_avg                                           1/μ
        \                             exp_avg_sq, max_exp_avg_sq                        1/μ²
        NAdam, RAdam                  exp_avg                                           1/μ
        \                             exp_avg_sq                                        1/μ²
        Adamax                        exp_avg, exp_inf (a largest \|g\|)                1/μ
        RMSprop                       square_avg                                        1/μ²
        \                             grad_avg                                          1/μ
        \                             momentum_buffer (of g / sqrt(square_avg))         1
        Adagrad                       sum (the initial value is one more square)        1/μ²
        Adadelta                      square_avg                                        1/μ²
        \                             acc_delta (of g · sqrt(acc_delta / square_avg))   1
        Rprop                         prev (the last gradient)                          1/μ
        \                             step_size (depends on signs only)                 1
        ASGD                          ax (an average of parameters)                     μ
        all                           .grad, where it is not None                       1/μ
        all                           step counters                                     1
        ============================  ================================================  ================================

        Subclasses count as the optimizer that they extend; :func:`dagpath.optim.register_state` adds others. The
        gradient of an L2 penalty (``weight_decay`` of SGD) that a buffer remembers is a past gradient like any other.
        Where a step adds ``eps`` to what is divided by (Adamax, RMSprop, Adadelta), buffers that do so are exact as far
        as ``eps`` is negligible. Gradients are carried along too, for one may be accumulating. What the optimizer keeps
        for parameters that are not the model's, or that no rescaling reaches, is left alone, and so are learning rates.

        Args:
            optimizer: one that holds parameters of the model; empty state, before the first step, is fine.
            model: the model that :meth:`apply_` was given; None for the traced one.

        Raises:
            TypeError: it is no ``torch.optim.Optimizer``.
            ValueError: an optimizer or a buffer that is not known (L-BFGS and Adafactor, whose state is not one number
                for each element, are not), or a buffer that has another shape than its parameter; the message names
                them. Nothing is changed.
            BalanceError: a product leaves the range of the buffer's type. Nothing is changed.

        Cost: reads and writes each buffer once; a copy of them is held meanwhile.

        Source: the chain rule; Stock, Graham, Gribonval, Jégou 2019 divide the momentum of SGD in their code.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            >>> net(torch.randn(5, 4)).square().sum().backward()
            >>> optimizer.step()
            >>> momentum = optimizer.state[net[2].weight]["momentum_buffer"]
            >>> before = momentum.clone()
            >>> rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)))
            >>> _ = rescaling.apply_()
            >>> rescaling.apply_to_optimizer_(optimizer)
            >>> torch.allclose(momentum, before / rescaling.multipliers()["2.weight"].float())
            True
        """
        peers = self.traced.peers if model is None else Peers.of(model)
        with peers.together():
            moving = moving_state(optimizer, self._movable(self._parameters(model)))
        multiply_(moving, self.traced.graph.ends, self.scales(), peers)

    def _parameters(self, model: nn.Module | None) -> dict[str, Tensor]:
        model = self.traced.model if model is None else unwrap(model)
        reshard(model)
        traced, buffers = self.traced, dict(model.named_buffers(remove_duplicate=False))
        advice = "Trace and balance that model itself; nothing was changed"
        absent = next((name for name in traced.captured.buffers_read() if name not in buffers), None)
        if absent is not None:
            raise ValueError(f"the model is not the traced one: it has no buffer {absent!r}")
        if model is traced.model:
            require_same_neurons(traced, buffers, "the model", "Trace and balance it again; nothing was changed")
            traced.tables |= {name: value.detach().clone() for name, value in differing(traced, buffers).items()}
        else:
            require_same_neurons(traced, buffers, "this model", advice)
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        _check_same({name: parameter.shape for name, parameter in parameters.items()}, self.traced.graph.shapes)
        if model is not traced.model:
            shared = sorted(shared_parameters(model).intersection(traced.graph.movable))
            if shared:
                raise ValueError(
                    f"the parameter {shared[0]!r} shares its memory with another tensor of this model, and does not in "
                    f"the traced one. {advice}"
                )
        empty = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
        if empty is not None:
            raise ValueError(f"the parameter {empty!r} has no values (PyTorch's meta device): load them first")
        return parameters

    def _movable(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        movable = self.traced.graph.movable
        return {name: parameter for name, parameter in parameters.items() if name in movable}

    def summary(self, layers: bool = False) -> str:
        """What was found, as a table.

        Args:
            layers: a second table, with the factors λ of each layer that has free neurons: the smallest, the median
                and the largest, the standard deviation of log λ, and how many are at the bound.

        Returns:
            The text. Factors are λ, not logarithms.
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
            state = "  NOT CONVERGED" * (not self.converged and not self.num_held)
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
            rows.append(("groups at the bound", f"{self.num_held:,}" + "  NOT THE MINIMUM" * bool(self.num_held)))
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

    def layers(self) -> list[tuple[str, Tensor]]:
        """log λ (natural logarithm) of the free neurons of each layer that has some.

        Returns:
            The name of its module, and a float64 tensor, layer by layer. An operation that stands in no module has its
            own name; one of a module that is called again has a number.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 4)))
            >>> [(name, len(log_scales)) for name, log_scales in rescaling.layers()]
            [('0', 8)]
        """
        return list(self._by_layer(self.log_scales).items())

    def _by_layer(self, per_group: Tensor) -> dict[str, Tensor]:
        graph = self.traced.graph
        found: dict[str, Tensor] = {}
        for index, site in enumerate(graph.sites):
            groups = graph.group_of[graph.maker_of == index]
            if bool((groups > 0).any()):
                name = site.module or site.operation
                again = sum(other == name or other.startswith(f"{name} #") for other in found)
                found[f"{name} #{again + 1}" if again else name] = per_group[groups[groups > 0] - 1]
        return found

    def _layer_table(self) -> str:
        rows = []
        for (name, z), held in zip(self.layers(), self._by_layer(self.held).values(), strict=True):
            low, median, high = (f"{float(part.exp()):.4g}" for part in (z.min(), z.median(), z.max()))
            spread = f"{float(z.std(correction=0)):.3f}"
            rows.append((name, f"{len(z):,}", low, median, high, spread, f"{int(held.sum()):,}"))
        return table(("layer", "free", "smallest", "median", "largest", "std of log", "at the bound"), rows)

    def scales(self) -> Tensor:
        """λ of every group, float64 [num_groups + 1] on the CPU; 1 for the fixed group 0 in front."""
        return scales_of(self.log_scales, self.power_of_two)


def scales_of(log_scales: Tensor, power_of_two: bool) -> Tensor:
    """λ of every group from its logarithm, float64 [num_groups + 1] on the CPU; 1 for the fixed group 0 in front."""
    scales = torch.exp2(torch.round(log_scales / math.log(2))) if power_of_two else log_scales.exp()
    return torch.cat([scales.new_ones(1), scales]).cpu()


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
