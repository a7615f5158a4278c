"""Sums over paths: the graph of operations run on path masses in place of activations.

Every edge has a mass, its weight's absolute value to some power, say; a path's mass is the product of its edges'. With
a maximum replaced by a sum and a mean by a sum of edges of weight ``1/k``, feeding ones gives the mass of all paths to
an output; its derivative with respect to the mass of an edge is the mass of all paths through it, without that edge.
One forward and one backward pass. What the mass of an edge is, a subclass of :class:`MassFlow` says.

Masses leave the floating-point range in deep networks, so each tensor carries a power of two beside its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from dagpath.passes.paths import Gate, PathFlow, PathRule, Places, Reader, Terms
from dagpath.passes.values import LARGEST_STEP, NOTHING, Call, Later, Mass, compact, is_fetched, leaves, mapped
from dagpath.runtime.fetched import Fetched, device_of
from dagpath.runtime.state import uncollected

_HEADROOM = {torch.float64: 128, torch.float32: 16}
"""Values between 2**-h and 2**h are left alone: one operation moves them far less than the type's range over h."""


_FAST_LAYOUT = {(torch.float64, 4): torch.channels_last, (torch.float64, 5): torch.channels_last_3d}
"""Memory formats by type and number of dimensions: float64 convolutions are a quarter faster in these on a CPU."""


_AGAIN: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": False}


class MassFlow(PathFlow):
    """A pass over masses.

    Args:
        graph, parameters, rule, cut, kept: see :class:`~dagpath.passes.paths.PathFlow`.
        dtype: float64, or float32 for speed.

    Attributes:
        records: do passes record what a backward pass needs?
        outputs: the masses at the model's outputs, once the graph was run.
        sinks: the masses at all ends of paths: those, and what enters operations that cut paths.
        layers: the calls that are parametrized linear layers.
    """

    def __init__(self, *graph: Any, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__(*graph, **options)
        self.dtype = dtype
        self.records = False
        self.resumptions = 0  # of backward passes, inside of calls
        self.layers: set[fx.Node] = set()
        self.sinks: list[Mass] = []
        self.outputs: list[Mass] = []
        self.device = device_of(self.parameters)

    # -- what the mass of an edge is: for subclasses -----------------------------------------------------------------

    def parameter(self, name: str) -> Mass:
        """The masses of a parameter's elements."""
        raise NotImplementedError

    def fixed(self, weights: Tensor) -> Mass:
        """The masses of edges of constant weights."""
        raise NotImplementedError

    def edge(self, parts: Terms) -> Mass:
        """The masses of edges of weight ``Σ coefficient · parameter``; one part may have no parameter."""
        raise NotImplementedError

    def layer(self, values: Tensor) -> Tensor:
        """The masses of paths once they have crossed a parametrized linear layer."""
        return values

    def factors_of(self, weight: Mass, x: Mass) -> Callable[[Mass], None] | None:
        """What takes the result of a linear layer, if derivatives by its weight's masses are not made one by one."""
        return None

    def settled(self, values: Tensor) -> tuple[Tensor, int | None]:
        """Computed values, brought back near one where they drift away, and by how much; None if all are zero."""
        top = self.log2_of(values)
        if top == NOTHING:
            return values, None
        return (self.shifted(values, -top), top) if abs(top) > _HEADROOM[self.dtype] else (values, 0)

    # -- running a graph -------------------------------------------------------------------------------------------

    def run_graph(self) -> None:
        with uncollected(), torch.set_grad_enabled(self.records):
            super().run_graph()
        self.env.clear()  # what nothing reads refers to this flow

    def total(self) -> Mass:
        """The sum over all paths, as a mass of one entry."""
        self.run_graph()
        with torch.set_grad_enabled(self.records):
            if not self.sinks:
                return Mass(torch.zeros((), dtype=self.dtype, device=self.device), zero=True)
            log2_scale = self.common(
                self.sinks
            )  # a sum of zero has derivatives too: those by the zeros of a last layer
            sums = [self.at(sink, log2_scale).sum() for sink in self.sinks]
            return Mass(torch.stack(sums).sum(), log2_scale, zero=all(sink.zero for sink in self.sinks))

    def parameter_at(self, node: fx.Node) -> Mass:
        return Later(self._parameter, True, node)

    def _parameter(self, node: fx.Node) -> Mass:
        with torch.set_grad_enabled(self.records):  # whatever the rule that reads it first is in
            return self.parameter(self.graph_inputs.parameters[str(node.target)])

    def constant_at(self, node: fx.Node) -> Mass:
        return Later(self.evaluated, False, node)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.outputs = leaves(args, Mass)
        super().output(target, args, kwargs)

    def end(self, operand: Mass) -> None:
        self.sinks.append(operand)

    def answer(self, rule: PathRule, call: Call) -> Any:
        """What the rule says. Parameters that are fetched for this call alone are let go, and fetched again later."""
        passing = [mass for mass in call.leaves(Mass) if not is_fetched(mass)]
        if not (self.records and isinstance(self.parameters, Fetched)) or len(passing) == len(call.leaves(Mass)):
            return super().answer(rule, call)
        sinks, resumptions, found = len(self.sinks), self.resumptions, list[Any]()

        def compute(anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            given = iter(values)

            def anew(mass: Mass) -> Mass:
                assert mass.node is not None
                return Later(self._parameter, True, mass.node) if is_fetched(mass) else mass.on(next(given))

            outer, self.node = self.node, call.node  # a backward pass is elsewhere in the graph
            args, kwargs = mapped((call.args, call.kwargs), Mass, anew)
            before = len(self.sinks)
            result = super(MassFlow, self).answer(rule, Call(call.target, args, kwargs, call.node))
            self.node = outer
            if found:  # paths end there already
                del self.sinks[before:]
            else:  # later ones would hold what they were computed from
                found.append(result)
            return anchor.clone(), *(mass.values for mass in leaves(result, Mass))

        anchor = torch.ones((), requires_grad=True)  # without which nothing that is fetched would have a derivative
        _, *computed = checkpoint(compute, anchor, *(mass.values for mass in passing), **_AGAIN)
        values = iter(computed)
        first, known = found[0], {id(mass.values) for mass in passing}
        if self.resumptions > resumptions or any(id(sink.values) not in known for sink in self.sinks[sinks:]):
            del self.sinks[sinks:]
            return super().answer(rule, call)
        return mapped(first, Mass, lambda mass: mass.on(next(values)))

    # -- values ----------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> Mass:
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        tensor = tensor.abs() if tensor.is_complex() else tensor
        return self.fixed(tensor if math.isfinite(tensor.sum()) else tensor.masked_fill(tensor.isinf(), 0))

    def source(self, shape: Sequence[int], read: Reader | None = None, role: str = "") -> Mass:
        layout = _FAST_LAYOUT.get((self.dtype, len(shape)), torch.contiguous_format)
        ones = torch.ones(torch.Size(shape), dtype=self.dtype, device=self.device)
        return Mass(ones.contiguous(memory_format=layout), data=True)

    def real(self, mass: Mass) -> Tensor:
        """The true values, in float64, of something that does not depend on the network's input."""
        assert mass.node is not None
        value: Tensor = self.real_node(mass.node)
        return value.to(self.device, torch.float64).detach()

    def result(
        self, parents: Sequence[Mass], values: Tensor, log2_scale: int, gate: Gate | None = None, layer: bool = False
    ) -> Mass:
        """A computed mass; its values are brought back near one where they drift away.

        Args:
            parents: what it was computed from.
            values: its values.
            log2_scale: the power of two beside them.
            gate: what the input decides of it.
            layer: did the paths cross a parametrized linear layer?
        """
        if layer:
            self.layers.add(self.node)
            values = self.layer(values)
        values, shift = self.settled(values)
        data = gate is not None or any(parent.data for parent in parents)
        params = any(parent.params for parent in parents)
        return Mass(values, log2_scale + (shift or 0), shift is None, data, params, self.node)

    def _weighted(self, mass: Mass, weight: Tensor | float) -> Mass:
        """A mass times that of a constant weight."""
        if not isinstance(weight, Tensor) and abs(weight) == 1:
            return mass
        factor = self.constant(torch.as_tensor(weight, dtype=torch.float64))
        return replace(
            mass, values=mass.values * factor.values, log2_scale=mass.log2_scale + factor.log2_scale, node=None
        )

    # -- verbs -----------------------------------------------------------------------------------------------------

    def moved(self, call: Call, move: Callable[[Call, Callable[[Any], Any]], Any]) -> Any:
        parents = call.leaves(Mass)
        log2_scale = self.common(parents)
        moved = move(call, lambda leaf: self.at(leaf, log2_scale) if isinstance(leaf, Mass) else leaf)
        return mapped(moved, Tensor, lambda values: self.result(parents, values, log2_scale))

    def placed(self, x: Mass, place: Places) -> Mass:
        return self.result([x], place(x.values), x.log2_scale)

    def sum(self, shape: Sequence[int], terms: Sequence[tuple[Mass, float]], gate: Gate | None = None) -> Mass:
        masses = [self._weighted(x, factor) for x, factor in terms]
        if len(masses) == 1 and gate is None and masses[0].shape == shape:
            return masses[0]
        log2_scale = self.common(masses)
        whole = self.at(masses[0], log2_scale)
        for mass in masses[1:]:
            whole = whole + self.at(mass, log2_scale)
        return self.result(masses, whole.expand(torch.Size(shape)), log2_scale, gate)

    def reduced(
        self,
        x: Mass,
        shape: Sequence[int],
        src: Places,
        dst: Places | None = None,
        weight: Tensor | float = 1.0,
        gate: Gate | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Mass:
        if total is None:
            assert dst is None, "sums into places need a way to them"
            seen = compact(src(x.values), range(len(shape)))
            values = seen.sum(tuple(range(len(shape), seen.ndim))) if seen.ndim > len(shape) else seen
        else:
            values = total(x.values)
        sums = self._weighted(Mass(values.expand(torch.Size(shape)), x.log2_scale), weight)
        return self.result([x], sums.values, sums.log2_scale, gate, layer=gate is not None and x.params and not x.data)

    def product(self, shape: Sequence[int], a: Mass, b: Mass) -> Mass:
        a, b = self._factors(a, b)
        return self.result([a, b], a.values * b.values, a.log2_scale + b.log2_scale)

    def inverse(self, x: Mass) -> Mass:
        if x.data:
            x = self._ended(x)
        values = 1 / x.values.detach()
        return Mass(values.masked_fill(values.isinf(), 0.0), -x.log2_scale)  # as every constant that is infinite

    def bilinear(
        self,
        shape: Sequence[int],
        operands: tuple[Mass, Mass, Mass | None],
        run: Callable[..., Tensor],
        places: Callable[[], tuple[Places, Places, Places, Places, int]],
        is_layer: bool = False,
    ) -> Mass:
        a, b, bias = operands
        watch = self.factors_of(b, a) if is_layer else None
        through_a, through_b = self._factors(a, b)
        values_b = through_b.values if watch is None else through_b.values.detach()
        product = log2_scale = through_a.log2_scale + through_b.log2_scale
        if bias is not None and not bias.zero:
            log2_scale = bias.log2_scale if a.zero or b.zero else max(log2_scale, bias.log2_scale)
        added = self.at(bias, log2_scale) if bias is not None else None
        if added is None or not self.is_far(product - log2_scale):
            values = run(self.at(through_a, log2_scale - through_b.log2_scale), values_b, added)
        else:
            alone = Mass(run(through_a.values, values_b, torch.zeros_like(added)), product)
            values = self.at(alone, log2_scale) + run(torch.zeros_like(through_a.values), values_b, added)
        layer = any(part.params and not part.data for part in (a, b)) and (a.data or b.data)
        result = self.result([part for part in (through_a, through_b, bias) if part], values, log2_scale, layer=layer)
        if watch is not None:
            watch(result)
        return result

    def affine(self, x: Mass, scale: Terms, shift: Terms, place: Places) -> Mass:
        slope = self.edge(scale)
        constant = self.edge(shift) if shift else self.constant(torch.zeros((), dtype=torch.float64))
        through = Mass(x.values, x.log2_scale + slope.log2_scale, x.zero or slope.zero)
        log2_scale = self.common([through, constant])
        factor, added = (place(part.values) for part in (slope, constant))
        added = self.at(replace(constant, values=added), log2_scale)
        if self.is_far(through.log2_scale - log2_scale):
            product = self.at(replace(through, values=x.values * factor), log2_scale).clone()
        else:
            product = x.values * self.shifted(factor, through.log2_scale - log2_scale)
        used = [x, *(weight for _, weight in (*scale, *shift) if weight is not None)]
        return self.result(used, product.add_(added), log2_scale)  # addcmul is slow where it broadcasts

    def weights(self, terms: Terms) -> Mass:
        edges = self.edge(terms)
        return self.result([weight for _, weight in terms if weight is not None], edges.values, edges.log2_scale)

    def _ended(self, mass: Mass) -> Mass:
        """Cut the paths into one tensor; returns the new inputs that replace it."""
        self.cut_paths(mass)
        return Mass(torch.ones_like(mass.values), data=True)

    def _factors(self, a: Mass, b: Mass) -> tuple[Mass, Mass]:
        """Both factors of a product; of two activations one is a gate, of mass one, where paths end.

        A weight times a gate is still a weight: its edges continue the paths of the other factor.
        """
        through_second = self.through_second(a, b)
        if through_second is None:
            return a, b
        return (self._ended(a), b) if through_second else (a, self._ended(b))

    # -- powers of two ---------------------------------------------------------------------------------------------

    @staticmethod
    def log2_of(values: Tensor) -> int:
        """The power of two just above the largest absolute value."""
        if not values.numel():
            return NOTHING
        values = values.detach()
        if not values.is_contiguous():  # aminmax would make a copy
            values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))
        low, high = values.aminmax()
        top = max(float(high), -float(low))
        return math.frexp(top)[1] if top else NOTHING

    @staticmethod
    def shifted(values: Tensor, shift: int) -> Tensor:
        """``values * 2**shift``: infinite or zero where that leaves the floating-point range."""
        step = LARGEST_STEP[values.dtype]
        shift = max(-3 * step, min(shift, 3 * step))  # which leads from one end of the range beyond the other
        while shift:
            now = max(-step, min(shift, step))
            values = values * 2.0**now
            shift -= now
        return values

    def at(self, mass: Mass, log2_scale: int) -> Tensor:
        """The values of a mass at another scale: masses are added at one, see :meth:`common`."""
        return self.shifted(mass.values, mass.log2_scale - log2_scale)

    def is_far(self, shift: int) -> bool:
        """Would derivatives leave the range of the type if values are multiplied by ``2**shift``?"""
        return False

    @staticmethod
    def common(masses: list[Mass]) -> int:
        """The log2_scale at which masses are added: the largest of those that are not zero."""
        largest = max(mass.magnitude for mass in masses)
        return largest if largest != NOTHING else masses[0].log2_scale
