"""Random networks as directed acyclic graphs of operations: a printable specification, and the module made of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dag_base import Pick, Shape
from dag_kinds import KINDS, LAYERS, OF_CALLS, drawn
from dag_memory import Memory

_LARGEST = 96
"""Entries of an activation, at most."""

_REFUSED = (RuntimeError, ValueError, IndexError, NotImplementedError)
"""What PyTorch raises where settings do not fit."""


@dataclass(frozen=True)
class Op:
    """One operation of a network.

    Attributes:
        kind: a name in ``KINDS``.
        inputs: which values it reads; the network's inputs come first, then the results of all operations.
        settings: of the kind.
        owner: the operation whose module it uses; -1 for its own.
        alias: the operation whose ``weight`` is its own too, under a second name; -1 for none.
        frozen: do its parameters require no gradients?
        when: the mode in which it is there, ``"train"`` or ``"eval"``; in the other one its value is what it reads.
    """

    kind: str
    inputs: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    owner: int = -1
    alias: int = -1
    frozen: bool = False
    when: str = "always"


@dataclass(frozen=True)
class Spec:
    """A network: all that is needed to make it again.

    Attributes:
        inputs: shapes of the inputs, without the batch.
        ops: the operations.
        outputs: which values are returned.
        structure: ``"tensor"`` (the last value), ``"tuple"``, ``"dict"`` or ``"sum"`` (of the last value over all
            examples).
        seed: of the parameters and statistics.
        spread: the scale of a parameter tensor is a power of two, drawn between ``2**-spread`` and ``2**spread``.
        zeros: share of the weights that are exactly zero.
        dtype: ``"float32"`` or ``"float64"``.
        called: was the network called before it is looked at?
    """

    inputs: tuple[Shape, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...] = (-1,)
    structure: str = "tensor"
    seed: int = 0
    spread: int = 0
    zeros: float = 0.0
    dtype: str = "float64"
    called: bool = False


class Dag(nn.Module):
    """The network of a specification."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.modules_of = nn.ModuleList()
        self.owners: list[nn.Module] = []
        self._shapes = list(spec.inputs)
        for op in spec.ops:
            self._append(op)
        self._fill()
        self.to(getattr(torch, spec.dtype))
        self.eval()
        self.forget()
        if spec.called:
            with torch.no_grad():
                self(*self.example())
            for memory in self.memories():
                memory.begin_here()

    def memories(self) -> list[Memory]:
        return [module for module in self.modules() if isinstance(module, Memory)]

    def forget(self) -> None:
        """Keep what was kept before the first call."""
        for memory in self.memories():
            memory.forget()

    def _append(self, op: Op) -> None:
        shape = self._shapes[op.inputs[0]]
        module = self.owners[op.owner] if op.owner >= 0 else KINDS[op.kind].module(shape, **op.settings)
        if op.alias >= 0:
            if module.weight.shape != self.owners[op.alias].weight.shape:
                raise ValueError("one weight has one shape")
            module.weight = self.owners[op.alias].weight
        if op.frozen:
            module.requires_grad_(False)
        values = [torch.zeros(2, *self._shapes[index]) for index in op.inputs]
        with torch.no_grad():
            result = KINDS[op.kind].run(module.eval(), *values, **op.settings)
        for memory in module.modules():
            if isinstance(memory, Memory):
                memory.forget()
        if result.ndim < 2 or result.shape[0] != 2 or not 0 < math.prod(result.shape[1:]) <= _LARGEST:
            raise ValueError(f"a result of shape {tuple(result.shape)}")
        if op.when != "always" and tuple(result.shape[1:]) != shape:
            raise ValueError("both modes have one shape")
        self._shapes.append(tuple(result.shape[1:]))
        self.owners.append(module)
        if op.owner < 0:
            self.modules_of.append(module)

    def _fill(self) -> None:
        generator = torch.Generator().manual_seed(self.spec.seed)
        scales = random.Random(self.spec.seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                values = torch.randn(parameter.shape, generator=generator)
                zeros = 0.0 if name.endswith("original1") else self.spec.zeros  # a direction of length 0 is none
                kept = torch.rand(parameter.shape, generator=generator) >= zeros
                parameter.copy_(values * kept * 2.0 ** scales.randint(-self.spec.spread, self.spec.spread))
            for name, buffer in self.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator))
                elif name.endswith("running_var"):
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))

    def forward(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for op, module in zip(self.spec.ops, self.owners, strict=True):
            operands = [values[index] for index in op.inputs]
            if op.when == "always" or (op.when == "train") == self.training:
                values.append(KINDS[op.kind].run(module, *operands, **op.settings))
            else:
                values.append(operands[0])
        if self.spec.structure == "tensor":
            return values[-1]
        if self.spec.structure == "sum":
            return values[-1].sum(0)
        outputs = [values[index] for index in self.spec.outputs]
        return tuple(outputs) if self.spec.structure == "tuple" else {f"out{i}": out for i, out in enumerate(outputs)}

    def example(self, batch: int = 2, inputs: Sequence[Shape] | None = None) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.spec.seed + 1)
        dtype = getattr(torch, self.spec.dtype)
        shapes = self.spec.inputs if inputs is None else inputs
        return tuple(torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)


class _Growing:
    """A specification that grows by operations that fit."""

    def __init__(self, inputs: Sequence[Shape]) -> None:
        self.inputs = tuple(inputs)
        self.ops: list[Op] = []
        self.net = Dag(Spec(self.inputs, ()))

    @property
    def shapes(self) -> list[Shape]:
        return self.net._shapes

    def grow(self, op: Op) -> None:
        try:
            self.net._append(op)
        except _REFUSED:
            return
        self.ops.append(op)

    def earlier(self, wanted: Callable[[Op], bool]) -> list[int]:
        return [index for index, op in enumerate(self.ops) if wanted(op)]


def _op(pick: Pick, net: _Growing, plain: bool) -> Op:
    places = range(len(net.shapes) - 1, -1, -1)
    first = pick([places[0]] * 4 + list(places[1:4]))
    shape = net.shapes[first]
    kind = pick(drawn(shape, plain))
    if kind == "transposed":
        tied = net.earlier(lambda op: op.kind == "linear" and not op.settings["norm"])
        return Op(kind, (first,), owner=pick(tied)) if tied else Op("activation", (first,), {"function": "relu"})
    inputs = [first]
    if KINDS[kind].operands == 2:
        same = [place for place in places if net.shapes[place] == shape]
        inputs.append(pick([place for place in same if place != first] + [first] + list(places[:2])))
    settings, frozen = KINDS[kind].settings(pick, shape), pick((False,) * 7 + (True,))
    when = pick(("always",) * 6 + ("train", "eval")) if kind in OF_CALLS else "always"
    return Op(kind, tuple(inputs), settings, frozen=frozen, when=when)


def _again(pick: Pick, net: _Growing, earlier: Sequence[int]) -> Op:
    """An earlier layer once more: the module itself, or another one that has its weight."""
    again = pick(earlier)
    op = net.ops[again]
    shape = net.shapes[op.inputs[0]]
    places = [place for place, other in enumerate(net.shapes) if other == shape]
    inputs = (pick(places[::-1]), *op.inputs[1:])
    shares = isinstance(getattr(net.net.owners[again], "weight", None), nn.Parameter)
    if shares and pick((False, True)):
        return Op(op.kind, inputs, op.settings, alias=again)
    return Op(op.kind, inputs, op.settings, owner=again)


@st.composite
def specs(draw: st.DrawFn, max_ops: int = 12) -> Spec:
    """Random networks. The structure is drawn, the values of parameters and inputs come from a drawn seed."""

    def pick(options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(options))

    first = pick(
        [(2,), (2, 3), (2, 3, 4), (2, 2, 3, 2), (4,), (4, 3), (4, 2, 2), (1, 5), (3, 1), (1, 4, 4), (1, 3, 3, 3)]
    )
    net = _Growing([first, *pick([(), (), (), (first,), ((2,),)])])
    size = pick(range(1, max_ops + 1))
    plain = pick((True, False, False))
    if size > 2:
        kind = pick([name for name in ("linear", "convolution") if name in drawn(first)])
        net.grow(Op(kind, (0,), KINDS[kind].settings(pick, first)))
    for _ in range(2 * size):
        if len(net.ops) < size:
            layers = net.earlier(lambda op: op.owner < 0 and op.alias < 0 and op.kind in LAYERS)
            net.grow(_again(pick, net, layers) if layers and pick((False,) * 11 + (True,)) else _op(pick, net, plain))
    if pick((True, True, True, False)):
        net.grow(Op("linear", (len(net.shapes) - 1,), {"out": 2, "bias": True, "norm": False}))
    outputs, structure = (-1,), "tensor"
    if net.ops and pick((False, False, False, True)):
        places = range(len(net.shapes))
        outputs = tuple(draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True)))
        structure = pick(("tuple", "dict", "sum"))
    return Spec(
        net.inputs,
        tuple(net.ops),
        outputs,
        structure,
        draw(st.integers(0, 2**31 - 1)),
        pick((0, 0, 4)),
        pick((0.0, 0.0, 0.2, 0.8)),
        pick(("float64", "float32")),
        pick((False, False, False, True)),
    )
