"""Rules for a user's own operations."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from dagpath.errors import UnsupportedOpError
from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import PathFlow
from dagpath.passes.values import Call, Operand, Weight, leaves, mapped
from dagpath.rules.base import Operation, Unknown, operation_name, register, registered
from dagpath.rules.elementwise import Choice, Homogeneous, Sum
from dagpath.rules.movement import Movement


class Rearrangement(Movement):
    """Data movement by an operation of a user's own, which need not know any floating-point type: numbers move."""

    @staticmethod
    def move(call: Call, convert: Callable[[Any], Any]) -> Any:
        converted = call.converted(convert)
        moved = [leaf for leaf in converted.leaves(Tensor) if leaf.is_floating_point()]
        if not moved:
            return Movement.move(_on_contiguous(call), convert)
        starts, end = {}, 0
        for tensor in moved:
            starts[id(tensor)] = end
            end += tensor.numel()

        def places(leaf: Any) -> Any:
            if id(leaf) not in starts:
                return leaf
            return (torch.arange(leaf.numel(), device=leaf.device) + starts[id(leaf)]).view(leaf.shape)

        values = torch.cat([tensor.flatten() for tensor in moved])
        return mapped(Movement.move(_on_contiguous(converted), places), Tensor, lambda numbers: values[numbers])


def _on_contiguous(call: Call) -> Call:
    """The call with contiguous tensors: what a user wrote for activations need not take any other layout."""

    def target(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = mapped((args, kwargs), Tensor, Tensor.contiguous)
        return call.target(*args, **kwargs)

    return Call(target, call.args, call.kwargs, call.node)


def _two_tensors(call: Call) -> list[Any]:
    """The two tensors of a call, whatever its arguments are called."""
    operands = call.leaves((Tensor, Weight, Operand))
    if len(operands) != 2:
        raise ValueError(f"it was registered as an operation of two tensors, and is called with {len(operands)}")
    return operands


class SumOfTwo(Sum):
    """The sum of the two tensors of a call."""

    operands = staticmethod(_two_tensors)

    def keeps_weights(self, call: Call) -> bool:
        return len(call.leaves(Operand)) == 2 and super().keeps_weights(call)


class ChoiceOfTwo(Choice):
    """An entry of one of the two tensors of a call."""

    operands = staticmethod(_two_tensors)


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

    def paths(self, flow: PathFlow, call: Call) -> Any:
        """What the rule says.

        Raises:
            UnsupportedOpError: it gives anything but an operand of the output's shape.
        """
        result = self._rule.paths(flow, call)
        found, fakes = leaves(result, (Operand, Tensor)), leaves(call.output, Tensor)
        shapes = [tuple(fake.shape) for fake in fakes if fake.is_floating_point()]
        rule = f"the method 'paths' of {type(self._rule).__name__}, the rule of {operation_name(call.target)},"
        if not all(isinstance(operand, Operand) for operand in found):
            raise UnsupportedOpError(f"{rule} returned a tensor: the verbs of the flow make operands")
        if len(found) > len(fakes) or any(tuple(operand.shape) not in shapes for operand in found):
            given = [tuple(operand.shape) for operand in found]
            raise UnsupportedOpError(f"{rule} gave operands of shapes {given}, the output has {shapes}")
        return result


_RULES: dict[str, Operation] = {
    "homogeneous": Homogeneous(),
    "movement": Rearrangement(),
    "sum": SumOfTwo(),
    "choice": ChoiceOfTwo(),
    "fixed": Unknown("enters an operation that was registered as fixed"),
}


def register_op(op: Any, rule: str | Operation) -> None:
    """Tell dagpath how an operation treats neurons and paths.

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
              ``RuntimeError`` or ``NotImplementedError`` for integers), and once more in
              each pass over paths. Tensors of integers or booleans are taken for indices and masks: they are given as
              they are, and if they depend on the model's input, the others are fixed;
            - ``"sum"``: the sum of its two tensors, entry by entry, broadcast as usual;
            - ``"choice"``: an entry of one of its two tensors in each place, like a maximum, broadcast as usual;
            - ``"fixed"``: not homogeneous; what it touches keeps its scale;

            or an instance of a subclass of :class:`dagpath.ops.Operation` with methods ``neurons`` and ``paths``.

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
