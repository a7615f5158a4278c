"""Rules for a user's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagpath.flow.masses import MassFlow
from dagpath.flow.values import Call, Mass
from dagpath.ops.base import Operation, Unknown, operation_name, register
from dagpath.ops.elementwise import Choice, Homogeneous, Sum
from dagpath.ops.movement import Movement, move


class Rearrangement(Movement):
    """Data movement by an operation of a user's own, which may have no derivative: masses follow the numbers."""

    def mass(self, flow: MassFlow, call: Call) -> Any:
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

        values = torch.cat([flow.shifted(mass.values, mass.exponent - exponent).flatten() for mass in masses])
        return pytree.tree_map_only(
            Tensor, lambda numbers: flow.result(masses, values[numbers], exponent), move(call, places)
        )


_RULES: dict[str, Operation] = {
    "homogeneous": Homogeneous(),
    "movement": Rearrangement(),
    "sum": Sum(),
    "choice": Choice(),
    "fixed": Unknown("enters an operation that was registered as fixed"),
}


def register_op(op: Any, rule: str | Operation) -> None:
    """Tell dagpath how an operation treats neurons and path masses.

    For an ATen operation that has no rule yet, or one of your own made with :mod:`torch.library`. A rule that is
    already there is replaced. Models traced before keep what they were traced with.

    Args:
        op: ``torch.ops.namespace.name``, one of its overloads, or the string ``"namespace::name"``.
        rule: one of

            - ``"homogeneous"``: ``f(λx) = λ f(x)`` for λ > 0, entry by entry, like a leaky ReLU;
            - ``"movement"``: every entry of the output is an entry of an input, like a permutation. The operation is
              run on integer tensors, or on float64 ones if it takes no integers;
            - ``"sum"``: ``input + other``, entry by entry; the operation's arguments must have these names;
            - ``"choice"``: ``input`` or ``other`` in each entry, like a maximum; the same;
            - ``"fixed"``: not homogeneous; what it touches keeps its scale;

            or an instance of a subclass of :class:`dagpath.ops.Operation` with methods ``neurons`` and ``mass``, and
            ``edges`` for :meth:`TracedModel.unroll`.

    Raises:
        ValueError: ``rule`` is another string.
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
    if not isinstance(rule, Operation):
        raise TypeError(f"a rule is a name or an instance of dagpath.ops.Operation, got {rule!r}")
    if isinstance(op, str):
        name = op.removeprefix("aten::")
    elif hasattr(op, "overloadpacket") or hasattr(op, "overloads"):
        name = operation_name(op)
    else:
        raise TypeError(f"op is torch.ops.namespace.name or the string 'namespace::name', got {op!r}")
    register(rule, name)
