"""Rules for a user's own operations."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from dagpath.errors import UnsupportedOpError
from dagpath.flow.constants import NotConstantError
from dagpath.flow.edges import EdgeFlow
from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import Call, Mass, Weight, leaves, mapped
from dagpath.ops.base import Operation, Unknown, operation_name, register, registered
from dagpath.ops.elementwise import Choice, Homogeneous, Sum
from dagpath.ops.movement import Movement, move, with_indices


class Rearrangement(Movement):
    """Data movement by an operation of a user's own, which may have no derivative: masses follow the numbers."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return super().neurons(flow, _on_contiguous(call))

    def mass(self, flow: MassFlow, call: Call) -> Any:
        try:
            call = with_indices(_on_contiguous(call), flow.real_node)
        except NotConstantError:
            return flow.barrier(call)
        masses = call.leaves(Mass)
        exponent, starts, end = flow.common(masses), {}, 0
        for mass in masses:
            starts[id(mass)] = end
            end += mass.values.numel()

        def places(leaf: Any) -> Any:
            if not isinstance(leaf, Mass):
                return leaf
            numbers = torch.arange(leaf.values.numel(), device=leaf.values.device)
            return (numbers + starts[id(leaf)]).view(leaf.values.shape)

        values = torch.cat([flow.at(mass, exponent).flatten() for mass in masses])
        return mapped(move(call, places), Tensor, lambda numbers: flow.result(masses, values[numbers], exponent))


def _on_contiguous(call: Call) -> Call:
    """The call with contiguous tensors: what a user wrote for activations need not take any other layout."""

    def target(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = mapped((args, kwargs), Tensor, Tensor.contiguous)
        return call.target(*args, **kwargs)

    return Call(target, call.args, call.kwargs, call.node)


class OfTwoTensors(Operation):
    """What an ATen operation does to two tensors, whatever the operation and its arguments are called."""

    def __init__(self, rule: Operation, target: OpOverload) -> None:
        self._rule, self._target = rule, target

    def _renamed(self, call: Call) -> Call:
        operands = call.leaves((Tensor, Weight, Mass))
        if len(operands) != 2:
            raise ValueError(f"it was registered as an operation of two tensors, and is called with {len(operands)}")
        return Call(self._target, tuple(operands), {}, call.node)

    def keeps_weights(self, call: Call) -> bool:
        return len(call.leaves(Mass)) == 2 and self._rule.keeps_weights(self._renamed(call))

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        return self._rule.neurons(flow, self._renamed(call))

    def mass(self, flow: MassFlow, call: Call) -> Any:
        return self._rule.mass(flow, self._renamed(call))


class OwnRule(Operation):
    """A rule of a user's own, whose answers are checked."""

    def __init__(self, rule: Operation) -> None:
        self._rule = rule
        self.moves_weights = rule.moves_weights

    def keeps_weights(self, call: Call) -> bool:
        return self._rule.keeps_weights(call)

    def neurons(self, flow: NeuronFlow, call: Call) -> Any:
        """What the rule says; the flow fixes what the call touches where this raises.

        Raises:
            ValueError: it says nothing of a parameter, whose elements would be neither edges nor pinned.
        """
        numbers = self._rule.neurons(flow, call)
        named = {weight.name for weight in call.leaves(Weight)} - {None}
        left = named - flow.told - {weight.name for weight in leaves(numbers, Weight)}
        if left:
            names = ", ".join(map(repr, sorted(map(str, left))))
            raise ValueError(f"its rule says nothing of {names}: use it, pin it, or make it an activation")
        return numbers

    def mass(self, flow: MassFlow, call: Call) -> Any:
        """What the rule says.

        Raises:
            UnsupportedOpError: it gives anything but a mass of the output's shape.
        """
        masses = self._rule.mass(flow, call)
        found, fakes = leaves(masses, (Mass, Tensor)), leaves(call.output, Tensor)
        shapes = [tuple(fake.shape) for fake in fakes if fake.is_floating_point()]
        if not all(isinstance(mass, Mass) for mass in found):
            raise UnsupportedOpError(f"{self._name(call)} returned a tensor: make it a Mass with flow.result(...)")
        if len(found) > len(fakes) or any(tuple(mass.values.shape) not in shapes for mass in found):
            given = [tuple(mass.values.shape) for mass in found]
            raise UnsupportedOpError(f"{self._name(call)} gave masses of shapes {given}, the output has {shapes}")
        return masses

    def edges(self, flow: EdgeFlow, call: Call) -> Any:
        return self._rule.edges(flow, call)

    def _name(self, call: Call) -> str:
        return f"the method 'mass' of {type(self._rule).__name__}, the rule of {operation_name(call.target)},"


_RULES: dict[str, Operation] = {
    "homogeneous": Homogeneous(),
    "movement": Rearrangement(),
    "sum": OfTwoTensors(Sum(), torch.ops.aten.add.Tensor),
    "choice": OfTwoTensors(Choice(), torch.ops.aten.maximum.default),
    "fixed": Unknown("enters an operation that was registered as fixed"),
}


def register_op(op: Any, rule: str | Operation) -> None:
    """Tell dagpath how an operation treats neurons and path masses.

    For an ATen operation that has no rule yet, or one of your own made with :mod:`torch.library`. A rule that is
    already there is replaced. Models that were traced before have to be traced again. :doc:`/howto/own_operation` has
    a whole example.

    Args:
        op: what :func:`torch.library.custom_op` returned, or ``torch.ops.namespace.name`` (all its overloads), or one
            of its overloads, or a string: ``"namespace::name"``, ``"namespace::name.overload"``. A name without
            a namespace is one of ATen.
        rule: one of

            - ``"homogeneous"``: ``f(λx) = λ f(x)`` for λ > 0, entry by entry, like a leaky ReLU, where x is its first
              tensor. Other tensors, such as slopes, keep their scale, and so does x where those could be rescaled;
            - ``"movement"``: every entry of the output is an entry of an input, like a permutation, and which one
              does not depend on the values. The operation itself is run, on contiguous int64 tensors that number the
              entries of the inputs, in place of floating-point tensors (on float64 ones if it raises
              ``RuntimeError`` or ``NotImplementedError`` for integers), and once more when path masses are
              computed. Tensors of integers or booleans are taken for indices and masks: they are given as they are,
              and if they depend on the model's input, the others are fixed;
            - ``"sum"``: the sum of its two tensors, entry by entry, broadcast as usual;
            - ``"choice"``: an entry of one of its two tensors in each place, like a maximum, broadcast as usual;
            - ``"fixed"``: not homogeneous; what it touches keeps its scale;

            or an instance of a subclass of :class:`dagpath.ops.Operation` with methods ``neurons`` and ``mass``, and
            ``edges`` for :meth:`TracedModel.unroll`.

    Raises:
        ValueError: ``rule`` is another string, or there is no operation ``op``; the message has names that are close.
        TypeError: ``op`` or ``rule`` is of another type.

    Example:
        >>> import torch, dagpath
        >>> @torch.library.custom_op("dagpath_example::cut", mutates_args=())
        ... def cut(x: torch.Tensor) -> torch.Tensor:
        ...     return torch.where(x > 0, 2 * x, x)
        >>> _ = cut.register_fake(lambda x: torch.empty_like(x))
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        ...     def forward(self, x):
        ...         return self.b(cut(self.a(x)))
        >>> dagpath.trace(Net(), torch.zeros(1, 2)).graph.num_groups
        0
        >>> dagpath.register_op("dagpath_example::cut", "homogeneous")
        >>> dagpath.trace(Net(), torch.zeros(1, 2)).graph.num_groups
        3
    """
    if isinstance(rule, str):
        if rule not in _RULES:
            raise ValueError(f"unknown rule {rule!r}; known are {', '.join(map(repr, _RULES))}")
        rule = _RULES[rule]
    elif isinstance(rule, Operation):
        rule = OwnRule(rule)
    else:
        raise TypeError(f"a rule is a name or an instance of dagpath.ops.Operation, got {rule!r}")
    if isinstance(op, CustomOpDef):
        op = op._opoverload.overloadpacket
    target = _resolved(op) if isinstance(op, str) else op
    name = operation_name(target)
    if isinstance(target, OpOverload):
        register(rule, f"{name}.{target._overloadname}")
    elif isinstance(target, OpOverloadPacket):
        register(rule, name, *(known for known in registered() if known.startswith(f"{name}.")))
    else:
        raise TypeError(
            "op is what torch.library.custom_op returned, torch.ops.namespace.name or the string 'namespace::name', "
            f"got {op!r}"
        )


def _resolved(name: str) -> Any:
    """``torch.ops.namespace.name`` or ``torch.ops.namespace.name.overload``, from its name."""
    namespace, _, rest = name.rpartition("::")
    base, dot, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace or "aten"), base)
        return getattr(packet, overload) if dot else packet
    except AttributeError:
        known = {full if dot else full.partition(".")[0] for full in torch._C._dispatch_get_all_op_names()}
        close = difflib.get_close_matches(f"{namespace or 'aten'}::{rest}", known)
        hint = f"close to it: {', '.join(close)}" if close else "import the module that defines it first"
        raise ValueError(f"there is no operation {name!r} in torch.ops; {hint}") from None
