"""Wrong rules: what an operation says of neurons or of paths, changed in one plausible way.

A mutant answers a call in place of the rule, and says whether its answer is another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dagpath.passes.edge_values import EdgeWeights, Nodes
from dagpath.passes.values import FIXED, ZERO, Mass, Weight, mapped

Answer = Callable[[Any, Any], Any]
Mutant = Callable[[Answer, Any, Any], tuple[Any, bool]]
"""Given the rule's method, the flow and the call: the wrong result, and whether anything is wrong about it."""


@contextlib.contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Another method of one object."""
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)


def instead(name: str, change: Callable[..., tuple[Any, bool]]) -> Mutant:
    """While the rule answers, a method of the flow is another: ``change(flow, original, *args) -> result, changed``."""

    def mutant(answer, flow, call):
        changed = []
        original = getattr(flow, name)

        def method(*args, **kwargs):
            result, differs = change(flow, original, *args, **kwargs)
            changed.append(differs)
            return result

        with replaced(flow, name, method):
            result = answer(flow, call)
        return result, any(changed)

    return mutant


def afterwards(kind: type, change: Callable[[Any, Any, Any], Any]) -> Mutant:
    """The first result of a type is another: ``change(flow, call, value)``, None to leave it."""

    def mutant(answer, flow, call):
        result, changed = answer(flow, call), []

        def one(value):
            other = None if changed else change(flow, call, value)
            if other is None:
                return value
            changed.append(True)
            return other

        return mapped(result, kind, one), bool(changed)

    return mutant


def turned(tensor: Tensor, axis: int) -> Tensor | None:
    """Rolled along an axis, if that changes anything."""
    if not -tensor.ndim <= axis < tensor.ndim:
        return None
    other = tensor.roll(1, axis)
    return None if torch.equal(other, tensor) else other


# -- neurons ---------------------------------------------------------------------------------------------------------


def _no_tie(flow, tie, a, b, reason):
    return None, bool(((a != b) & (a > ZERO) & (b > ZERO)).any())


def _no_fix(flow, fix, numbers, reason):
    return None, bool((numbers > FIXED).any())


def _no_use(wanted: Callable[[Tensor, Tensor], bool]):
    def change(flow, use, weight, dst, src, reads=None):
        if wanted(dst, src):
            return None, True
        return use(weight, dst, src, reads), False

    return change


def _other_ends(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
    def method(flow, use, weight, dst, src, reads=None):
        ends = change(dst, src)
        return use(weight, *ends, reads), not all(map(torch.equal, ends, (dst, src)))

    return method


def _end_turned(end: Tensor) -> Tensor:
    return next((other for axis in range(end.ndim) if (other := turned(end, axis)) is not None), end)


def _numbers_turned(axis: int):
    def change(flow, call, value):
        if isinstance(value, Weight):
            other = turned(flow.elements(value), axis)
            return None if other is None else Weight(value.shape, elements=other)
        return turned(value, axis)

    return change


def _of_operand(index: int):
    def change(flow, call, value):
        operands = call.leaves(Tensor)
        with contextlib.suppress(RuntimeError):
            if len(operands) > index:
                other = operands[index].expand(value.shape)
                return None if torch.equal(other, value) else other
        return None

    return change


def _new_neurons(flow, call, value):
    if not (value > FIXED).any():
        return None
    unique, inverse = torch.unique(value, return_inverse=True)
    numbers = torch.where(unique > FIXED, flow._new_numbers(len(unique), flow.node), unique)
    return numbers[inverse]


def _where(condition: Callable[[Tensor], Tensor], number: int):
    def change(flow, call, value):
        other = torch.where(condition(value), number, value)
        return None if torch.equal(other, value) else other

    return change


def _operands_fixed(answer, flow, call):
    numbers = [value for value in call.leaves(Tensor) if (value > FIXED).any()]
    for value in numbers:
        flow.fix(value, "a mutant")
    return answer(flow, call), bool(numbers)


def _one_neuron(flow, fresh, count, weight, standing=True):
    return fresh(count, weight, standing)[:1].expand(count), count > 1


def _other_factor(flow, product, factors, results):
    return product(factors, results[::-1]), not torch.equal(*torch.broadcast_tensors(*results))


def _second_of_two(flow, join, a, b, reason, scale=1.0):
    a, b = torch.broadcast_tensors(a, b)
    join(a, b, reason, scale)
    return b, not torch.equal(a, b)


NEURONS: dict[str, Mutant] = {
    "ties forgotten": instead("tie", _no_tie),
    "fixes forgotten": instead("fix", _no_fix),
    "pins forgotten": instead("pin", lambda flow, pin, *args: (None, True)),
    "edges forgotten": instead("use", _no_use(lambda dst, src: True)),
    "bias forgotten": instead("use", _no_use(lambda dst, src: not (src > FIXED).any())),
    "ends swapped": instead("use", _other_ends(lambda dst, src: (src, dst))),
    "destinations turned": instead("use", _other_ends(lambda dst, src: (_end_turned(dst), src))),
    "sources turned": instead("use", _other_ends(lambda dst, src: (dst, _end_turned(src)))),
    "destinations fixed": instead("use", _other_ends(lambda dst, src: (torch.zeros_like(dst), src))),
    "sources fixed": instead("use", _other_ends(lambda dst, src: (dst, torch.zeros_like(src)))),
    "one neuron for all": instead("fresh", _one_neuron),
    "the other factor": instead("product", _other_factor),
    "the second of two": instead("join", _second_of_two),
    "turned along channels": afterwards((Tensor, Weight), _numbers_turned(1)),
    "turned along the last axis": afterwards((Tensor, Weight), _numbers_turned(-1)),
    "turned along the first axis": afterwards((Tensor, Weight), _numbers_turned(0)),
    "numbers of the first operand": afterwards(Tensor, _of_operand(0)),
    "numbers of the second operand": afterwards(Tensor, _of_operand(1)),
    "new neurons": afterwards(Tensor, _new_neurons),
    "all fixed": afterwards(Tensor, _where(lambda numbers: numbers > FIXED, FIXED)),
    "all zero": afterwards(Tensor, _where(lambda numbers: numbers > FIXED, ZERO)),
    "zeros fixed": afterwards(Tensor, _where(lambda numbers: numbers == ZERO, FIXED)),
    "fixed are zeros": afterwards(Tensor, _where(lambda numbers: numbers == FIXED, ZERO)),
    "operands fixed": _operands_fixed,
}


# -- paths -----------------------------------------------------------------------------------------------------------


def _without(name: str, wrong: Any, is_there: Callable[[Any], bool]):
    """A verb with another value of one argument."""

    def change(flow, verb, *args, **kwargs):
        bound = inspect.signature(verb).bind(*args, **kwargs)
        bound.apply_defaults()
        known = bound.arguments[name]
        bound.arguments[name] = wrong(known) if is_there(known) else known
        return verb(*bound.args, **bound.kwargs), is_there(known)

    return change


_ungated = _without("gate", lambda gate: None, lambda gate: gate is not None)


def _is_no_one(weight: Any) -> bool:
    return isinstance(weight, Tensor) or weight != 1.0


def _one_factor(flow, product, shape, a, b):
    return product(shape, a, flow.number(1.0)), True


VERBS: dict[str, Mutant] = {
    "last term forgotten": instead("sum", _without("terms", lambda terms: terms[:-1], lambda terms: len(terms) > 1)),
    "terms times two": instead("sum", _without("terms", lambda terms: [(x, 2 * by) for x, by in terms], bool)),
    "a sum in place of a mean": instead("reduced", _without("weight", lambda _: 1.0, _is_no_one)),
    "no bias": instead("bilinear", _without("operands", lambda both: (*both[:2], None), lambda both: bool(both[2]))),
    "no shift": instead("affine", _without("shift", lambda shift: [], bool)),
    "only one factor": instead("product", _one_factor),
    "a factor for a divisor": instead("inverse", lambda flow, inverse, x: (x, True)),
}
"""Rules that use a verb in a wrong way."""


# -- masses ----------------------------------------------------------------------------------------------------------


def _of_mass(change: Callable[[Mass], dict[str, Any] | None]):
    def method(flow, call, value):
        if not (value.data or value.params):
            return None
        fields = change(value)
        if fields is None:
            return None
        known = {name: getattr(value, name) for name in ("values", "log2_scale", "zero", "data", "params")}
        return Mass(**{**known, **fields}, node=flow.node)

    return method


def _values_turned(axis: int):
    def change(value):
        other = turned(value.values, axis)
        return None if other is None else {"values": other}

    return change


class _Watched(Mass):
    """A mass with other values, which says when these are read."""

    def __init__(self, mass: Mass, factor: float, read: list[bool]) -> None:
        kept = {name: getattr(mass, name) for name in ("log2_scale", "zero", "data", "params", "node")}
        self.__dict__.update(kept, _values=mass.values * factor, _read=read)  # a mass is frozen

    @property
    def values(self) -> Tensor:
        self._read.append(True)
        return self._values

    @property
    def shape(self) -> torch.Size:
        return self._values.shape


def _operand_times(index: int, factor: float) -> Mutant:
    """The mass of one operand counts with a factor, 0 or 2."""

    def mutant(answer, flow, call):
        masses = [mass for mass in call.leaves(Mass) if (mass.data or mass.params) and bool(mass.values.any())]
        if len(masses) <= index:
            return answer(flow, call), False
        chosen, read = masses[index], []
        other = _Watched(chosen, factor, read)
        args, kwargs = mapped((call.args, call.kwargs), Mass, lambda mass: other if mass is chosen else mass)
        result = answer(flow, type(call)(call.target, args, dict(kwargs), call.node))
        return result, bool(read) or result is other

    return mutant


def _constant_as_it_is(flow, fixed, weights):
    """A constant's absolute value, not raised to the power of the pass."""
    mass = fixed(weights)
    values = weights.abs().to(mass.values.dtype)
    return Mass(values), not torch.equal(torch.ldexp(mass.values, torch.tensor(mass.log2_scale)), values)


def _constant_with_sign(flow, fixed, weights):
    mass = fixed(weights)
    signs = torch.where(weights < 0, -1.0, 1.0)
    return dataclasses.replace(mass, values=mass.values * signs), bool((weights < 0).any())


def _path_goes_on(flow, ended, mass):
    return mass, bool(mass.data and mass.params)


def _path_is_lost(flow, ended, mass):
    return Mass(torch.ones_like(mass.values), data=True), bool(mass.data and mass.params)


def _other_way(flow, factors, a, b):
    first, second = factors(a, b)
    if (first is a) == (second is b):
        return (first, second), False
    return ((flow._ended(a), b) if first is a else (a, flow._ended(b))), True


MASSES: dict[str, Mutant] = {
    **VERBS,
    "twice": afterwards(Mass, _of_mass(lambda mass: {"values": 2 * mass.values} if mass.values.any() else None)),
    "power of two forgotten": afterwards(Mass, _of_mass(lambda mass: {"log2_scale": 0} if mass.log2_scale else None)),
    "first operand forgotten": _operand_times(0, 0.0),
    "second operand forgotten": _operand_times(1, 0.0),
    "third operand forgotten": _operand_times(2, 0.0),
    "first operand twice": _operand_times(0, 2.0),
    "second operand twice": _operand_times(1, 2.0),
    "third operand twice": _operand_times(2, 2.0),
    "constants not raised to the power": instead("fixed", _constant_as_it_is),
    "constants with their signs": instead("fixed", _constant_with_sign),
    "paths go on behind a barrier": instead("_ended", _path_goes_on),
    "paths into a barrier forgotten": instead("_ended", _path_is_lost),
    "paths end nowhere": instead("cut_paths", lambda flow, cut, x: (None, isinstance(x, Mass) and x.data and x.params)),
    "paths through the other factor": instead("_factors", _other_way),
    "turned along channels": afterwards(Mass, _of_mass(_values_turned(1))),
    "turned along the last axis": afterwards(Mass, _of_mass(_values_turned(-1))),
    "no derivative": afterwards(
        Mass, _of_mass(lambda mass: {"values": mass.values.detach()} if mass.values.requires_grad else None)
    ),
    "parameters forgotten": afterwards(Mass, _of_mass(lambda mass: {"params": False} if mass.params else None)),
}


# -- edges -----------------------------------------------------------------------------------------------------------


def _nodes_turned(axis: int):
    def change(flow, call, value):
        if isinstance(value, Nodes):
            other = turned(value.numbers, axis)
            return None if other is None else Nodes(other, value.params)
        places = turned(torch.arange(1, 1 + torch.Size(value.shape).numel()).view(value.shape), axis)
        if places is None:
            return None
        other = value.taken(places)
        same = all(torch.equal(getattr(other, part), getattr(value, part)) for part in ("values", "elements"))
        return None if same else other

    return change


def _connected(change: Callable[..., tuple[Any, ...] | None]):
    """``change(dst, src, weight, slots)``: other edges, None to leave them."""

    def method(flow, connect, dst, src, weight=1.0, slots=None):
        if not isinstance(weight, EdgeWeights):
            weight = EdgeWeights.constant(torch.tensor(weight, dtype=torch.float64))
        other = change(dst, src, weight, slots)
        there = all(bool((part > 0).any()) for part in (dst, src, weight.exists))
        return connect(*(other or (dst, src, weight, slots))), other is not None and there

    return method


def _source_turned(dst, src, weight, slots):
    axis = next((axis for axis in range(src.ndim) if turned(src, axis) is not None), None)
    return None if axis is None else (dst, turned(src, axis), weight, slots)


def _without_sign(dst, src, weight, slots):
    if weight.elements.any() or not (weight.values < 0).any():
        return None
    return dst, src, dataclasses.replace(weight, values=weight.values.abs()), slots


def _constant_one(dst, src, weight, slots):
    if weight.elements.any() or bool((weight.values == 1).all()):
        return None
    return dst, src, dataclasses.replace(weight, values=torch.ones_like(weight.values)), slots


def _none_at(index: int) -> Mutant:
    """One of the calls that make edges is forgotten."""

    def mutant(answer, flow, call):
        count, original = [0], flow._connect

        def connect(*args, **kwargs):
            count[0] += 1
            if count[0] != index + 1:
                original(*args, **kwargs)

        with replaced(flow, "_connect", connect):
            return answer(flow, call), count[0] > index

    return mutant


def _gates(change: Callable[[Tensor], Tensor]):
    def method(flow, slots, shape, read):
        return slots(shape, lambda values: change(read(values).double())), True

    return method


EDGES: dict[str, Mutant] = {
    **VERBS,
    "gate forgotten": instead("reduced", _ungated),
    "gates of a sum forgotten": instead("sum", _ungated),
    "twice": instead("_connect", _connected(lambda dst, src, weight, slots: (dst, src, weight.scaled(2.0), slots))),
    "first edges forgotten": _none_at(0),
    "second edges forgotten": _none_at(1),
    "sources turned": instead("_connect", _connected(_source_turned)),
    "constants without signs": instead("_connect", _connected(_without_sign)),
    "constants of one": instead("_connect", _connected(_constant_one)),
    "always open": instead("_new_slots", _gates(torch.ones_like)),
    "open where closed": instead("_new_slots", _gates(lambda gates: 1 - gates)),
    "other gates": instead("_new_slots", _gates(lambda gates: gates.roll(1, -1) if gates.ndim else gates)),
    "paths into a barrier forgotten": instead(
        "cut_paths", lambda flow, cut, value: (None, isinstance(value, Nodes) and value.params)
    ),
    "turned along channels": afterwards((Nodes, EdgeWeights), _nodes_turned(1)),
    "turned along the last axis": afterwards((Nodes, EdgeWeights), _nodes_turned(-1)),
    "parameters forgotten": afterwards(
        Nodes, lambda flow, call, value: Nodes(value.numbers, False) if value.params else None
    ),
}
