"""Which neuron stands where: the graph of operations run on neuron numbers in place of activations.

Every activation becomes an integer tensor of its own shape whose entries are neuron numbers. Data movement is the
operation itself, applied to the numbers; a linear operation makes fresh neurons and records, for each parameter, the
numbers at both ends of its edges; sums and pooling declare neurons to be one. Tensors stay expanded (stride 0) where
a channel's positions share a number, so a number is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn

from dagpath.capture.graph import CapturedGraph
from dagpath.passes.constants import Constants
from dagpath.passes.elements import Elements
from dagpath.passes.products import Product, settle
from dagpath.passes.ties import Links, Tie
from dagpath.passes.values import FIXED, ZERO, Call, Weight, broadcast, compact, leaves, mapped

UNUSED = -2
"""The end of an element that no call met."""
UNKNOWN = -3
"""Where an element comes from that met zeros alone: those are right under any scale, so they do not say."""
_SHARED = "a parameter that is used in several places"
_PINNED = "a parameter that is used in a way that no rescaling can follow"


@dataclass(frozen=True)
class Ends:
    """Neuron (or group) numbers at both ends of a parameter's edges, broadcastable to the parameter's shape."""

    dst: Tensor
    src: Tensor


@dataclass(frozen=True)
class Computed:
    """How a virtual parameter is computed: the weights that it is made of, and what its ends mean for theirs."""

    parts: Sequence[Weight]
    spread: Callable[[Tensor, Tensor], None]
    node: fx.Node


class NeuronRule(Protocol):
    """What an operation knows of neurons."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Any: ...


class NeuronFlow(fx.Interpreter):
    """Runs graphs of one model on neuron numbers; collects neurons, ties and the ends of every parameter.

    Several graphs of the same model (its two modes) may be run one after the other: they share their parameters, and a
    parameter's edges have the same ends in each. :func:`dagpath.trace` makes it; rules get it.

    A neuron number is :data:`FIXED` (0) for what keeps its scale, :data:`ZERO` (−1) for an entry that is always zero,
    and positive for a neuron that may be free. Reasons complete the sentences "tied by …" and "fixed: …" of
    :meth:`dagpath.TracedModel.explain`.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.ops import FIXED, ZERO, Operation
        >>> @torch.library.custom_op("dagpath_example::summed", mutates_args=())
        ... def summed(x: torch.Tensor) -> torch.Tensor:
        ...     return x.sum(1, keepdim=True)
        >>> _ = summed.register_fake(lambda x: x.new_empty(x.shape[0], 1))
        >>> class Summed(Operation):
        ...     def neurons(self, flow, call):
        ...         return flow.mix(flow.activation(call["x"]), [1], "a sum of channels")
        >>> dagpath.register_op(summed, Summed())
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(1, 1)
        ...     def forward(self, x):
        ...         return self.b(summed(self.a(x)))
        >>> dagpath.trace(Net(), torch.zeros(1, 2)).graph.group_of  # three neurons of one scale; the output is FIXED
        tensor([1, 1, 1, 0])
        >>> FIXED, ZERO
        (0, -1)

    Args:
        model: the model.
        rule: finds the rule of a call's target.
        unknown: makes the rule of an operation that fixes what it touches, from the reason.
        pinned: names of parameters that are not rescaled, and what ties their ends, in words.

    Attributes:
        told: names of the parameters that the rule of the present call used, pinned or made activations.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Callable[[Any], NeuronRule],
        unknown: Callable[[str], NeuronRule],
        pinned: Mapping[str, str] | None = None,
    ) -> None:
        self._rule = rule
        self._unknown = unknown
        self._pinned = pinned or {}
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._elements = Elements(self.parameters)
        self._computed: dict[str, Computed] = {}
        self.num_numbers = 0
        self.makers: list[tuple[fx.Node | None, int]] = []
        self.ties: list[Tie] = []
        self.kept: dict[fx.Node, int] = {}
        self.places: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._standing: list[Tensor] = []
        self._products: list[Product] = []
        self.without_rule: list[fx.Node] = []
        self.cut: set[fx.Node] = set()
        self.inputs: set[fx.Node] = set()
        self._ends: dict[str, Ends] = {}
        self._pins: list[tuple[Weight, fx.Node, str]] = []
        self._made: dict[tuple[str, int], tuple[int, int]] = {}
        self._calls: dict[str, int] = {}
        self.told: set[str | None] = set()
        self._is_finished = False
        self.node: fx.Node
        self.graph_inputs: CapturedGraph
        self.real_node: Constants

    # -- running a graph -----------------------------------------------------------------------------------------

    def run_graph(self, graph: CapturedGraph) -> None:
        super().__init__(graph.module)
        self.graph_inputs = graph
        self._calls = {}
        self.real_node = Constants(graph, {})
        placeholders = sum(node.op == "placeholder" for node in graph.module.graph.nodes)
        self.run(*[None] * placeholders, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        self.node, self._standing = n, []
        result = super().run_node(n)
        if self._standing:
            first = leaves(result, object)[0]
            self.places[n] = (compact(first), torch.cat(self._standing))
        if n.meta.get("escapes"):
            self._fix_all(result, n.meta["escapes"])
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        super().placeholder(target, args, kwargs)
        name = self.graph_inputs.parameters.get(str(target))
        if name is None and str(target) not in self.graph_inputs.tensors:
            self.inputs.add(self.node)
        if name is not None and self.parameters[name].is_floating_point():
            weight = Weight(self.parameters[name].shape, name=name)
            if name in self._pinned:
                self.pin(weight, self._pinned[name])
            return weight
        return self.constant(self.node.meta.get("val"))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call = Call(target, args, dict(kwargs), self.node)
        self.told = set()
        try:
            numbers = self._rule(target).neurons(self, call)
            exact = self._carries(numbers, call)
        except Exception as error:  # an unforeseen form of an operation must not cost more than what it touches
            return self._cut(call, f"enters an unforeseen form of an operation: {error}")
        return numbers if exact else self._cut(call, "is rounded, compared or counted")

    def _cut(self, call: Call, reason: str) -> Any:
        self.cut.add(call.node)
        return self._unknown(reason).neurons(self, call)

    @staticmethod
    def _carries(numbers: Any, call: Call) -> bool:
        """Are all free neurons in entries that can carry a scale, not in integers, booleans or a narrower type?

        Raises:
            ValueError: the numbers have other shapes than the output.
        """
        values = leaves(numbers, (Weight, Tensor))
        fakes = leaves(call.output, Tensor)
        if [value.shape for value in values] != [fake.shape for fake in fakes]:
            raise ValueError(f"its rule gives {[tuple(v.shape) for v in values]}, it {[tuple(f.shape) for f in fakes]}")
        scaled = [leaf for leaf in call.leaves(Tensor) if not leaf.ndim and bool(leaf > FIXED)]
        rounded = [value for value, fake in zip(values, fakes, strict=True) if not call.keeps_range(fake, bool(scaled))]
        return not any(isinstance(value, Weight) or bool((compact(value) > FIXED).any()) for value in rounded)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constant(self.node.meta.get("val"))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        for node in self.node.all_input_nodes:
            self.node = node  # the call that returns it stands in the source, this one does not
            self._fix_all(self.env[node], "is an output of the model")

    def _fix_all(self, values: Any, reason: str) -> None:
        for value in leaves(values, (Weight, Tensor)):
            if isinstance(value, Weight):
                self.pin(value)
            elif isinstance(value, Tensor):
                self.fix(value, reason)

    # -- what operations call --------------------------------------------------------------------------------------

    def constant(self, output: Any) -> Any:
        """Fixed entries in the shape of ``output`` (``call.output``, or any tensors)."""
        return mapped(output, Tensor, lambda fake: torch.tensor(FIXED).expand(fake.shape))

    def fresh(self, count: int, weight: Weight | None, standing: bool = True) -> Tensor:
        """Numbers of ``count`` new neurons, fed through ``weight``.

        A later graph of the same model meets the neurons of an earlier one again: the same call of a parameter makes
        the same neurons.

        Args:
            count: how many.
            weight: the parameter that feeds them; None where it is known later.
            standing: do they stand in the call's output, so that all paths through them pass there? Else parameters
                alone lead into them.

        Returns:
            int64 tensor [count].
        """
        key = None
        if weight is not None and weight.name is not None:
            key = (weight.name, self._calls.get(weight.name, 0))
            self._calls[weight.name] = key[1] + 1
            start, made = self._made.get(key, (0, -1))
            if made == count:
                return torch.arange(start, start + count)
        numbers = self._new_numbers(count, None if self.graph_inputs.call else self.node)
        if key is not None:
            self._made[key] = (self.num_numbers - count + 1, count)
        if standing:
            self._standing.append(numbers)
        return numbers

    def _new_numbers(self, count: int, maker: fx.Node | None) -> Tensor:
        self.makers.append((maker, count))
        self.num_numbers += count
        return torch.arange(self.num_numbers - count + 1, self.num_numbers + 1)

    def makers_of(self, numbers: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
        """Numbers by the call that made them."""
        starts = np.cumsum([1, *(count for _, count in self.makers)])
        owners = np.searchsorted(starts, numbers.numpy(), side="right") - 1
        for owner in np.unique(owners):
            node = self.makers[owner][0]
            yield node if node is not None else self.node, numbers[torch.from_numpy(owners == owner)]

    def product(self, factors: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor]) -> Tensor:
        """The numbers of a product of two tensors of neurons, one factor of which is fixed; the other's scale goes on.

        If both could be free, that is decided once all ties are known; until then new numbers stand for the result,
        which belong to no neuron. ``kept`` tells the other passes which factor was not fixed.

        Args:
            factors: the numbers of both factors.
            results: the numbers of the result if the scale of the first, or of the second, goes on.
        """
        may_be_free = [bool((compact(factor) > FIXED).any()) for factor in factors]
        if not all(may_be_free):
            self.kept[self.node] = int(may_be_free[1])
            return results[self.kept[self.node]]
        first, second = broadcast(*(compact(result) for result in results))
        pairs, inverse = torch.unique((first + 1) * (self.num_numbers + 2) + second + 1, return_inverse=True)
        firsts, seconds = pairs // (self.num_numbers + 2) - 1, pairs % (self.num_numbers + 2) - 1
        numbers = torch.where((firsts == ZERO) & (seconds == ZERO), ZERO, self._new_numbers(len(pairs), None))
        self._products.append(Product(self.node, factors, (firsts, seconds), numbers))
        return numbers[inverse].expand(torch.broadcast_shapes(*(result.shape for result in results)))  # type: ignore[no-untyped-call]

    def _keep(self, product: Product, index: int) -> None:
        self.node = product.node
        self.kept[product.node] = index
        zero = (product.results[index] == ZERO) & (product.result > ZERO)
        self.tie(product.result, product.results[index], "a product")
        self.fix(product.result[zero], "is always zero")
        self.fix(product.factors[1 - index], "is a factor of a product of two tensors that could both be rescaled")

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Declare the neurons of two broadcastable tensors to be one, entry by entry."""
        a, b = broadcast(compact(a), compact(b))
        differ = (a != b) & (a > ZERO) & (b > ZERO)
        if differ.any():
            size = self.num_numbers + 1
            pairs = torch.unique(a[differ] * size + b[differ])
            fixed = tuple(node for node in self.node.all_input_nodes if self._is_fixed(self.env.get(node)))
            self.ties.append(Tie(pairs // size, pairs % size, self.node, reason, fixed))

    def enters(self, x: Tensor) -> bool:
        """Does an activation say where elements come from that are multiplied by it, entry by entry?"""
        return bool((compact(x) > FIXED).any())

    @staticmethod
    def _is_fixed(value: Any) -> bool:
        return isinstance(value, Tensor) and not bool((compact(value) > FIXED).any())

    def fix(self, numbers: Tensor, reason: str) -> None:
        """Declare that these neurons keep their scale."""
        met = torch.zeros(self.num_numbers + 1, dtype=torch.bool)
        met[compact(numbers).clamp(min=FIXED)] = True
        met[FIXED] = False
        if met.any():
            self.ties.append(Tie(torch.nonzero(met)[:, 0], None, self.node, reason))

    def pin(self, weight: Weight, reason: str = _PINNED) -> None:
        """Declare that these elements are not rescaled: wherever they are edges, both ends share a scale."""
        self.told.add(weight.name)
        self._pins.append((weight, self.node, reason))

    def mix(self, numbers: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Declare the entries along ``dims`` to be one neuron; return the numbers with those dimensions of size 1."""
        dims = list(dims)
        numbers = compact(numbers, dims)
        dims = [dim for dim in dims if numbers.shape[dim] > 1]
        if not dims or not numbers.numel():
            return numbers
        small = compact(numbers)
        result = small.amax(dims, keepdim=True)
        self.tie(small, result, reason)
        return result.expand([1 if dim in dims else size for dim, size in enumerate(numbers.shape)])

    def per_channel(self, numbers: Tensor, axis: int, reason: str) -> Tensor:
        """One number per entry of ``axis``: all other dimensions are mixed. Zeros count as fixed."""
        axis = axis % numbers.ndim
        mixed = self.mix(numbers, [dim for dim in range(numbers.ndim) if dim != axis], reason)
        return mixed.reshape(-1).expand(numbers.shape[axis])

    def join(self, a: Tensor, b: Tensor, reason: str, scale: float = 1.0) -> Tensor:
        """The numbers of a result that reads ``a`` and ``scale * b``, entry by entry: both are tied.

        Those of ``a``, and of ``b`` where ``a`` is always zero.
        """
        self.tie(a, b, reason)
        a, b = broadcast(compact(a), compact(b))
        return torch.where(a == ZERO, b, a)

    def bias(self, numbers: Tensor, weight: Weight) -> Tensor:
        """The numbers of neurons to which a parameter that broadcasts to them is added."""
        padded = (1,) * (numbers.ndim - len(weight.shape)) + tuple(weight.shape)
        dims = [dim for dim, size in enumerate(padded) if size == 1 and numbers.shape[dim] > 1]
        dst = self.mix(numbers, dims, "a bias that they share")
        extra = len(padded) - len(weight.shape)
        self.use(weight, dst.reshape(dst.shape[extra:]) if extra else dst, torch.tensor(FIXED))
        return dst

    def use(self, weight: Weight, dst: Tensor, src: Tensor, reads: Tensor | None = None) -> None:
        """Record the ends of a parameter's edges. A parameter met twice has the same ends both times.

        Args:
            weight: the parameter.
            dst, src: numbers that broadcast to its shape.
            reads: the activation that paths come from, where that keeps its scale whatever theirs is (the input of a
                normalization).

        Raises:
            ValueError: ends that do not broadcast to the shape of the parameter.
        """
        self.told.add(weight.name)
        dst, src = compact(dst), compact(src)
        if any(bool((end == UNUSED).any()) for end in (dst, src)):
            used = ((dst != UNUSED) & (src != UNUSED)).expand(weight.shape)
            dst, src = dst.expand(weight.shape)[used], src.expand(weight.shape)[used]
            weight = Weight(dst.shape, elements=self.elements(weight)[used])
        dst, src = torch.where(dst == ZERO, FIXED, dst), torch.where(src == ZERO, UNKNOWN, src)
        for end in (dst, src):
            if torch.broadcast_shapes(end.shape, weight.shape) != weight.shape:  # type: ignore[no-untyped-call]
                raise ValueError(f"ends of shape {tuple(end.shape)} for a parameter of shape {tuple(weight.shape)}")
        name = self._elements.name_of(weight)
        if name is not None:
            if weight.shape != self._elements.shapes[name]:
                dst, src = (
                    compact(end.expand(weight.shape).reshape(self._elements.shapes[name])) for end in (dst, src)
                )
            known = self._ends.get(name, Ends(dst, src))
            self._ends[name] = Ends(self._merge(known.dst, dst), self._merge(known.src, src))
        else:
            elements = self.elements(weight)
            for name, inside, local in self._elements.by_parameter(elements):
                known = self._full_ends(name)
                for stored, end in ((known.dst, dst), (known.src, src)):
                    flat, new = stored.view(-1), end.expand(elements.shape)[inside]
                    flat[local] = self._merge(flat[local], new)
                    self.tie(flat[local], new, _SHARED)  # an element may stand in several places

    def computed(
        self, formula: str, shape: torch.Size, parts: Sequence[Weight], spread: Callable[[Tensor, Tensor], None]
    ) -> Weight:
        """A weight computed from others. It travels like a parameter; once its ends are known, they go to its parts.

        Args:
            formula: tells apart what may be computed from the same parts.
            shape: shape of the result.
            parts: what it is computed from.
            spread: records the ends of the parts with :meth:`use`, given those of the result, expanded to its shape.
        """
        names = [part.name or "" for part in parts]
        name = f"{formula} of " + (" and ".join(names) if all(names) else f"{len(self._computed)}")
        if name not in self._computed:
            self._computed[name] = Computed(parts, spread, self.node)
            self._elements.add(name, shape)
        return Weight(shape, name)

    def elements(self, weight: Weight) -> Tensor:
        """The element numbers of a weight, as a tensor of its shape."""
        return self._elements.of(weight)

    def as_neurons(self, weight: Weight) -> Tensor:
        """A parameter that stands where an activation is expected, as one neuron per element, fed by the constant 1."""
        elements = self.elements(weight)
        small = compact(elements)
        unique, inverse = torch.unique(small, return_inverse=True)
        numbers = self.fresh(len(unique), weight, standing=False)[inverse]
        self.use(Weight(small.shape, elements=small), numbers, torch.tensor(FIXED))
        return numbers.expand(elements.shape)

    def activation(self, value: Any) -> Any:
        """``value``, with a weight turned into neurons."""
        if not isinstance(value, Weight):
            return value
        self.told.add(value.name)
        return self.as_neurons(value)

    def is_edge(self, name: str) -> bool:
        """Is the parameter an edge between neurons anywhere?"""
        return name in self._ends

    def num_edges(self) -> int:
        """How many elements of the model's parameters are edges between neurons."""
        known = [
            (self.parameters[name].numel(), ends.dst) for name, ends in self._ends.items() if name in self.parameters
        ]
        return sum(size // dst.numel() * int((dst != UNUSED).sum()) for size, dst in known if size)

    # -- the result ------------------------------------------------------------------------------------------------

    def spread_computed(self) -> None:
        """Give the ends of computed weights to their parts.

        A part is older than what is computed from it, so the youngest goes first.
        """
        for name, computed in reversed(self._computed.items()):
            if name in self._ends:
                self.node = computed.node
                ends, shape = self._ends[name], self._elements.shapes[name]
                computed.spread(ends.dst.expand(shape), ends.src.expand(shape))

    def ends(self) -> Mapping[str, Ends]:
        """The numbers at both ends of all parameters; negative where they are not used, or not known.

        No graph is to be run afterwards: the ends of computed weights are given to their parts, and the ends of the
        pinned are tied.
        """
        if not self._is_finished:
            self._is_finished = True
            self.spread_computed()
            self._tie_pinned()
        unused = Ends(torch.tensor(UNUSED), torch.tensor(UNUSED))
        return {name: self._ends.get(name, unused) for name in self.parameters}

    def settle(self) -> None:
        """Decide which factor of each product stays free, once all else that ties or fixes neurons is known."""
        settle(self._products, lambda: Links(self.ties, self.num_numbers + 1).groups(), self._keep)
        self._products.clear()

    def complete(self, name: str, ends: Ends) -> None:
        """Say where elements of a parameter lead that no call met."""
        self._ends[name] = ends

    def _tie_pinned(self) -> None:
        for weight, node, reason in self._pins:
            self.node = node
            if weight.name is not None:
                if weight.name in self._computed:  # what is computed keeps its scale if its parts do
                    self._pins += [(part, node, reason) for part in self._computed[weight.name].parts]
                elif weight.name in self._ends:
                    ends = self._ends[weight.name]
                    self._tie_ends(ends.dst, ends.src, reason)
                continue
            for name, _, local in self._elements.by_parameter(self.elements(weight)):
                if name in self._computed:
                    self._pins += [(part, node, reason) for part in self._computed[name].parts]
                elif name in self._ends:
                    ends = self._full_ends(name)
                    self._tie_ends(ends.dst.view(-1)[local], ends.src.view(-1)[local], reason)

    def _tie_ends(self, dst: Tensor, src: Tensor, reason: str) -> None:
        dst, src = broadcast(dst, src)
        used = dst != UNUSED
        self.tie(dst[used], src[used], reason)

    def _merge(self, known: Tensor, new: Tensor) -> Tensor:
        known, new = broadcast(known, new)
        open_ = (known == UNUSED) | ((known == UNKNOWN) & (new != UNUSED))
        merged = torch.where(open_, new, known) if open_.any() else known
        self.tie(merged, new, _SHARED)
        return merged

    def _full_ends(self, name: str) -> Ends:
        shape = self._elements.shapes[name]
        known = self._ends.get(name)
        if known is None:
            known = Ends(torch.full(shape, UNUSED), torch.full(shape, UNUSED))
        elif any(end.shape != shape or not end.is_contiguous() for end in (known.dst, known.src)):
            known = Ends(known.dst.expand(shape).contiguous(), known.src.expand(shape).contiguous())
        self._ends[name] = known
        return known
