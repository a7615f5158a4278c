"""Tracing: from a model to its neuron graph."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from dagpath.capture.graph import Capture, CapturedGraph, shared_parameters
from dagpath.capture.modes import changed_by_modes
from dagpath.capture.survey import survey
from dagpath.graph.explanation import explain, explanation
from dagpath.graph.neuron_graph import NeuronGraph
from dagpath.graph.unrolled import UnrolledGraph
from dagpath.passes.agreement import agree, grouped, reconciled
from dagpath.passes.masses import MassFlow
from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.structure import Structure
from dagpath.passes.structure_flow import StructureFlow
from dagpath.rules.base import Unknown, operation_of
from dagpath.rules.compound import is_compound
from dagpath.runtime.distributed import Peers, has_all_values, values_of, whole
from dagpath.runtime.state import one_thread, plain_computation, uncollected, unwrap
from dagpath.words import not_finite

Flow = TypeVar("Flow", bound=MassFlow)
_ALONE = Peers()


class TracedModel:
    """A model, its graph of operations and its graph of neurons. Made by :func:`trace`.

    Path quantities read the parameters' current values from the model: after training or rescaling, the same trace
    serves. An architecture that changes needs a new one.

    Attributes:
        model: the module that was traced (below wrappers such as DistributedDataParallel).
        graph: the :class:`NeuronGraph`.
        seconds: how long tracing took.
        tables: copies of the buffers of which the neurons may depend (tables of indices, masks), as they were.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> traced
        TracedModel(Sequential, NeuronGraph(10 neurons, 8 free groups, 58 parameters))
        >>> before = dagpath.path_norm(traced)
        >>> _ = net[2].weight.data.mul_(3.0), net[2].bias.data.mul_(3.0)
        >>> round(dagpath.path_norm(traced) / before, 6)
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Capture,
        graph: NeuronGraph,
        seconds: float,
        peers: Peers = _ALONE,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.seconds = seconds
        self.captured = captured
        self.tables = captured.tables()
        self.peers = peers
        self._values = values

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The current value of each parameter, in the order of ``model.named_parameters()``.

        Those of a model that several processes share are gathered one at a time, as they are asked for.

        Raises:
            ValueError: a parameter is on the meta device.
        """
        return values_of(self.model) if self._values is None else self._values

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The current value of each buffer that eval mode reads, by its name."""
        captured = self.captured.eval
        read = {node.name for node in captured.module.graph.nodes if node.users}
        return {name: whole(captured.tensors[place]) for place, name in captured.buffers.items() if place in read}

    @property
    def fx(self) -> fx.GraphModule:
        """The captured eval graph, a :class:`torch.fx.GraphModule` of ATen operations; not to be changed."""
        return self.captured.eval.module

    def __repr__(self) -> str:
        return f"TracedModel({type(self.model).__name__}, {self.graph!r})"

    def masses(self, kind: type[Flow], **options: Any) -> Flow:
        """A pass over the eval graph that sums masses over paths.

        Args:
            kind: the class of the pass, which says what the mass of a path is.
            **options: its own options, and ``parameters`` in place of the model's own at their current values.

        Raises:
            ValueError: ``dtype`` is not float64 or float32, or a parameter is on the meta device.
        """
        require_dtype(options.get("dtype", torch.float64))
        parameters = options.pop("parameters", None) or self.values
        return kind(self.captured.eval, parameters, operation_of, self.graph.cut, self.graph.kept, **options)

    @plain_computation()
    def unroll(self, device: torch.device | str | None = None, progress: bool = False) -> UnrolledGraph:
        """The network as a sparse graph of scalar activations, at the parameters' current values.

        Every position of every channel is a node of its own, every use of a weight an edge. Path quantities are then
        products of sparse matrices, level by level: a second way to all that :func:`dagpath.path_norm` and
        :func:`dagpath.gram_diagonal` compute, and the way to explicit paths (:class:`dagpath.PathLifting`).

        Args:
            device: where the sparse tensors go; None for the CPU, where they are built.
            progress: show a progress bar.

        Returns:
            An :class:`UnrolledGraph`.

        Raises:
            UnsupportedOpError: a registered rule does not say which edges its operation makes.
            ValueError: a parameter is on the meta device.

        Cost: 28 bytes per edge, twice that while it is built, and no loops over nodes. A CIFAR ResNet-20 has 38 million
        edges; ``benchmarks/unroll.py`` prints time and memory.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(),
            ...                           torch.nn.Linear(6, 1))
            >>> graph = dagpath.trace(net, torch.zeros(1, 1, 5)).unroll()
            >>> graph
            UnrolledGraph(19 nodes, 37 edges, 4 levels)
            >>> graph.path_count()
            25
            >>> graph.name(graph.num_nodes - 1)
            '3 linear[0]'
        """
        decided = self.graph.cut, self.graph.kept
        return UnrolledGraph(self.captured.eval, dict(self.values), operation_of, *decided, device, progress)

    def explain(self, format: str = "text") -> str | dict[str, Any]:  # noqa: A002 (as in the standard library)
        """What is free, tied and fixed in each module, and which operation in which module fixed it.

        Args:
            format: ``"text"`` for one screen of text; ``"dict"`` for programs, with nothing left out:

                - ``neurons``, ``free``, ``fixed``, ``groups`` (free ones), ``parameters``: numbers;
                - ``modules``: path -> numbers of ``neurons``, ``free``, ``tied`` (free, in a group with others) and
                  ``fixed``, and the modules that they are ``tied_with``;
                - ``causes``, what fixed neurons, in the model's order: how many ``neurons`` ``of`` which modules, the
                  ``reason``, what they are ``tied_to`` (as in :class:`dagpath.graph.Cause`; empty where they are
                  fixed for their own sake), and where: ``operation``, ``module``, ``source``;
                - ``without_rule``: ``operation``, ``module`` and ``source`` of operations that dagpath does not know;
                - ``not_edges``: parameters that no rescaling multiplies;
                - ``unknown``: parameters with elements that read zeros alone in all calls that were looked at;
                - ``covers``: what the trace holds for: numbers of examples, sizes of inputs;
                - ``train_failure``: why train mode could not be captured, or empty.

        Returns:
            The text, or the dictionary. The source line is that of the innermost ``forward`` method outside of
            PyTorch.

        Raises:
            ValueError: another format.

        Cost: no pass over the model; a few operations per neuron.

        Example:
            >>> import torch, dagpath
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> print(dagpath.trace(net, torch.zeros(1, 4)).explain())  # doctest: +ELLIPSIS
            Sequential: 10 neurons, 8 free in 8 groups, 2 fixed; 58 parameters
            ...
        """

        facts = type(self.model).__name__, self.graph, self.captured.train_failure, self.captured.covers
        if format == "text":
            return explain(*facts)
        if format == "dict":
            return explanation(*facts)
        raise ValueError(f"format must be 'text' or 'dict', got {format!r}")


def structure_of(
    model: nn.Module, captured: Capture, values: Mapping[str, Tensor] | None = None
) -> Callable[[NeuronGraph], Structure]:
    """What finds the structure of a model's graph, at the values given, or at the model's current ones."""
    return functools.partial(_structure, model, captured, values)


@plain_computation()
def _structure(
    model: nn.Module, captured: Capture, values: Mapping[str, Tensor] | None, graph: NeuronGraph
) -> Structure:
    weights = values_of(model) if values is None else values
    return StructureFlow(model, captured, operation_of, Unknown, graph.cut, graph.kept, weights).structure()


@plain_computation()
def neurons_of(model: nn.Module, captured: Capture) -> NeuronGraph:
    """The graph of neurons of a captured model: what all of its graphs have in common."""
    families = [
        [grouped(_flow_of(model, graph, pinned=captured.pinned)) for graph in (first, *others)]
        for first, others in (
            (captured.eval, captured.others),
            (captured.train or captured.eval, captured.train_others),
        )
        if others
    ]
    found = reconciled(_flow_of(model, *captured.graphs, pinned=captured.pinned), families)
    return NeuronGraph(found, structure_of(model, captured))


@plain_computation()
def _agree(model: nn.Module, graph: CapturedGraph, other: CapturedGraph) -> bool:
    return agree(grouped(_flow_of(model, graph)), grouped(_flow_of(model, other)))


def _flow_of(model: nn.Module, *graphs: CapturedGraph, pinned: Mapping[str, str] | None = None) -> NeuronFlow:
    shared = {name: f"the memory that {name} shares with other tensors" for name in shared_parameters(model, graphs)}
    flow = NeuronFlow(model, operation_of, Unknown, {**shared, **(pinned or {})})
    for graph in graphs:
        flow.run_graph(graph)
    return flow


def require_traced(traced: object) -> None:
    """Raise TypeError for anything but a :class:`TracedModel`."""
    if not isinstance(traced, TracedModel):
        raise TypeError(
            f"expected a TracedModel, got {type(traced).__name__}: make one with dagpath.trace(model, example_inputs)"
        )


def require_finite(traced: TracedModel) -> None:
    """Raise ValueError if a parameter has no values, or values that are not finite."""
    for name, parameter in traced.values.items():
        bad = torch.nonzero(~torch.isfinite(parameter))
        if len(bad):
            first = tuple(bad[0].tolist())
            raise ValueError(
                f"the parameter {name!r} has {not_finite(len(bad))}, the first at {first}: {parameter[first].item()}"
            )


def require_dtype(dtype: object) -> None:
    """Raise ValueError for a type that passes over masses do not compute in."""
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype!r}")


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Tensor | tuple[Any, ...] | Mapping[str, Any]] = (),
) -> TracedModel:
    """Find the neurons of a model and which of them may be rescaled.

    The model's forward is captured with :func:`torch.export.export` and run on neuron numbers in place of activations.
    One call is not the model: it is also looked at in train mode, with other numbers of examples, with other lengths or
    image sizes where it takes those, and once more after a call left something behind. Where two calls tie neurons
    otherwise, these keep their scale; :meth:`TracedModel.explain` says what the trace holds for. The model, and all
    that its code can reach, is left as it was: mode, buffers, attributes, caches, gradients, hooks and random state.

    Several threads may trace, the same model too: they wait for each other, since PyTorch's exporter changes PyTorch
    itself while it runs. For the same reason no other thread may run a module meanwhile, be it another model, nor
    compute anything of an earlier trace of this one. Otherwise threads may share a trace as they like.

    Args:
        model: any module, also one wrapped in DataParallel, DistributedDataParallel or by ``torch.compile``, and a
            ``torch.export.ExportedProgram``. Operations that dagpath does not know fix the neurons they touch, and
            :meth:`TracedModel.explain` names them.
        example_inputs: a tensor, or the tuple of positional arguments of ``model.forward``. Dimension 0 of tensors is
            the batch if the model treats it so: the graph is that of one example then, and path quantities do not
            depend on how many are given. Else it is that of the inputs as they are given.
        kwargs: keyword arguments of ``model.forward``.
        more_examples: further calls that the trace has to be right for: other lengths, other branches. Each is a tensor
            or a tuple of positional arguments (with the same ``kwargs``), or a mapping of keyword arguments alone.

    Returns:
        A :class:`TracedModel`, which reads the parameters of the model as they are whenever it is asked.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` neither a tensor nor a tuple.
        CaptureError: the model's forward raises, or depends on the values of its input; the message names the line.

    Warns:
        UserWarning: the model cannot be captured in train mode. Rescalings are then exact in eval mode; parameters
            that only train mode uses are not accounted for.

    Cost: one export, dry runs on the meta device (the more, the more sizes the model refuses), a forward pass of the
    model and one of its graph, and one more export for each further call that is not provably alike.
    ``benchmarks/results/zoo.json`` has the seconds of many models, measured before further calls were looked at.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> dagpath.trace(net, torch.zeros(1, 4)).graph
        NeuronGraph(10 neurons, 8 free groups, 58 parameters)
    """
    start = time.perf_counter()
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dictionary of arguments by their names, got {type(kwargs).__name__}")
    if not isinstance(more_examples, (list, tuple)):
        raise TypeError(f"more_examples must be a list of example inputs, got {type(more_examples).__name__}")
    inner = unwrap(model)
    peers, model = Peers.of(model), inner
    with peers.together():
        given, *more = (inputs_of(example, kwargs or {}) for example in (example_inputs, *more_examples))
        captured, neurons = _captured(model, given, more)
    peers.require_same("the graphs of neurons", f"{type(model).__name__}, {neurons.digest()}")
    if captured.train_failure:
        warnings.warn(
            f"{type(model).__name__} cannot be captured in train mode ({captured.train_failure}); rescalings of it "
            "are exact in eval mode, and in train mode only if neurons meet there as they do in eval mode",
            stacklevel=2,
        )
    if captured.not_captured:
        warnings.warn(
            f"{type(model).__name__} takes calls that could not be captured: {'; '.join(captured.not_captured)}; "
            "rescalings are not exact for these, if they use neurons in another way than the others do",
            stacklevel=2,
        )
    return TracedModel(model, captured, neurons, time.perf_counter() - start, peers)


@uncollected()
@one_thread()
def _captured(
    model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], more: Sequence[Any]
) -> tuple[Capture, NeuronGraph]:
    captured = survey(model, given, more, is_compound, functools.partial(_agree, model))
    neurons = neurons_of(model, captured)
    changed = changed_by_modes(model, _drawn_factors(neurons)) if has_all_values(model) else []
    if changed:
        pinned = {name: f"train() and eval() of the model, which change {name}" for name in changed}
        captured = replace(captured, pinned={**captured.pinned, **pinned})
        neurons = neurons_of(model, captured)
    return captured, neurons


def _drawn_factors(neurons: NeuronGraph) -> dict[str, Tensor]:
    """Factors of a random rescaling by powers of two, by parameter."""
    generator = torch.Generator().manual_seed(0)
    scales = 2.0 ** torch.randint(-3, 4, (neurons.num_groups + 1,), generator=generator, dtype=torch.float64)
    scales[0] = 1.0
    return {name: scales[ends.dst] / scales[ends.src] for name, ends in neurons.ends.items()}


def inputs_of(example: object, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call."""
    if isinstance(example, Mapping):
        return (), dict(example)
    args = (example,) if isinstance(example, Tensor) else example
    if not isinstance(args, tuple):
        raise TypeError(
            f"example_inputs must be a Tensor or a tuple of the model's positional arguments, got "
            f"{type(example).__name__}"
        )
    return args, dict(kwargs)
