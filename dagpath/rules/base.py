"""What an operation is to dagpath: its facts stand together in one small class.

Each ATen operation says how **neurons** flow through it (which neuron stands in each entry of its output, which ones
must share a scale) and how **paths** go through it. A pass over the graph (:mod:`dagpath.passes.neurons`,
:mod:`dagpath.passes.masses`, :mod:`dagpath.passes.edges`) hands each operation a
:class:`~dagpath.passes.values.Call` and itself; the operation answers with the value of its output.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import Tensor

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import PathFlow
from dagpath.passes.values import FIXED, Call, Operand, Weight, compact


class Operation:
    """How one kind of operation treats neurons and paths; :func:`dagpath.register_op` takes an instance.

    Instances are stateless and shared. The method ``neurons`` may raise: what that call touches is fixed then, and no
    path crosses it.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.ops import Operation
        >>> @torch.library.custom_op("dagpath_example::gain", mutates_args=())
        ... def gain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ...     return x * weight
        >>> _ = gain.register_fake(lambda x, weight: torch.empty_like(x))
        >>> class Gain(Operation):  # x is [batch, channels], the weight [channels]
        ...     def neurons(self, flow, call):
        ...         sources = flow.per_channel(flow.activation(call["x"]), 1, "a gain")
        ...         neurons = flow.fresh(len(sources), call["weight"])
        ...         flow.use(call["weight"], dst=neurons, src=sources)
        ...         return neurons.expand(call.output.shape)
        ...     def paths(self, flow, call):
        ...         return flow.product(call.output.shape, call["x"], call["weight"])
        >>> dagpath.register_op(gain, Gain())
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        ...         self.gain = torch.nn.Parameter(torch.randn(3))
        ...     def forward(self, x):
        ...         return self.b(gain(self.a(x), self.gain).relu())
        >>> traced = dagpath.trace(Net(), torch.zeros(1, 2))
        >>> traced.graph.num_groups  # three before the gain, three after it
        6
        >>> before = dagpath.path_norm(traced)
        >>> _ = dagpath.random_rescaling(traced).apply_()
        >>> abs(dagpath.path_norm(traced) / before - 1) < 1e-5
        True
    """

    moves_weights = False
    """Does a parameter stay one (each entry of the output an element, perhaps times a constant)?"""

    def keeps_weights(self, call: Call) -> bool:
        """Of parameters alone, is the output a weight that paths cross? Else it is a constant.

        Args:
            call: the call, with an :class:`Operand` for each tensor.
        """
        return self.moves_weights

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        """The neuron numbers of the output.

        Args:
            flow: makes neurons, and takes what the operation says of them.
            call: the call, with int64 neuron numbers for activations and a :class:`Weight` for each parameter.

        Returns:
            int64 tensors of the shapes of ``call.output`` (or a :class:`Weight`).
        """
        raise NotImplementedError

    def paths(self, flow: PathFlow, call: Call) -> Any:
        """How paths go through: what is moved, summed, multiplied or cut, in the verbs of the flow.

        Args:
            flow: has the verbs, see :class:`PathFlow`.
            call: the call, with an :class:`Operand` for each tensor.

        Returns:
            An :class:`Operand` for each tensor of ``call.output``; None for one that no path goes into.
        """
        raise NotImplementedError(f"the rule {type(self).__name__} has no method 'paths'")


def first_of(result: Any, output: Any) -> Any:
    """A result as the first of what an operation returns, the others being tensors that no path goes into."""
    return result if isinstance(output, Tensor) else (result, *[None] * (len(output) - 1))


def all_parameters(*operands: Any) -> bool:
    """Are all operands of a call parameters, or computed from parameters alone?"""
    return all(isinstance(operand, Operand) and operand.params and not operand.data for operand in operands)


class Unknown(Operation):
    """An operation without a rule, or one that is not positively homogeneous: what it touches is fixed.

    To paths it is a barrier: what enters counts as an output, what leaves as a new input.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason or "enters an operation without a rule"
        self.known = bool(reason)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        touched = call.leaves(Weight) or any(bool((compact(numbers) > FIXED).any()) for numbers in call.leaves(Tensor))
        if touched and not (self.known or flow.graph_inputs.call):
            flow.without_rule.append(call.node)
        for weight in call.leaves(Weight):
            flow.pin(weight)
        for numbers in call.leaves(Tensor):
            flow.fix(numbers, self.reason)
        return flow.constant(call.output)

    def paths(self, flow: PathFlow, call: Call) -> Any:
        return flow.barrier(call)


_REGISTRY: dict[str, Operation] = {}
_UNKNOWN = Unknown()


def register(operation: Operation, *names: str) -> None:
    """Give ATen operations a rule: ``"max"`` means every overload and the in-place form, ``"max.other"`` that one."""
    for name in names:
        _REGISTRY[name] = operation


def operation_of(target: Any) -> Operation:
    """The rule of a call's target: of its overload, else of its name; :class:`Unknown` where there is none."""
    name = operation_name(target)
    overload = f"{name}.{getattr(target, '_overloadname', '')}"
    return _REGISTRY.get(overload) or _REGISTRY.get(name, _UNKNOWN)


@functools.cache
def operation_name(target: Any) -> str:
    """``conv2d`` for ``aten.conv2d.default``, ``relu`` for ``aten.relu_.default``, ``getitem`` for the builtin."""
    if not hasattr(target, "_schema") and not hasattr(target, "_qualified_op_name"):
        return "getitem" if target is operator.getitem else f"python::{getattr(target, '__name__', target)}"
    packet = getattr(target, "overloadpacket", target)
    name = getattr(packet, "__name__", str(packet))
    namespace = getattr(packet, "_qualified_op_name", "aten::").split("::")[0]
    if namespace != "aten":
        return f"{namespace}::{name}"
    return name.rstrip("_") if not name.startswith("_") else "_" + name.strip("_")


def registered() -> dict[str, Operation]:
    """Every operation that has a rule, with the rule, in the order of the names.

    The name of an ATen operation stands for all its overloads and its in-place form, ``name.overload`` for that one;
    others have their namespace, ``mylib::cut``.

    Example:
        >>> from dagpath.ops import registered
        >>> "conv2d" in registered(), "erfinv" in registered()
        (True, False)
    """
    return dict(sorted(_REGISTRY.items()))
