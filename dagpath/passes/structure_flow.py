"""How neurons read each other: the graph of operations run on node numbers, as paths see it.

Where :mod:`dagpath.passes.neurons` asks which neurons must share a scale, this pass asks which read which. It runs the
same rules: what ties two neurons into one scale there makes a new node here, a join that reads both. What lies between
layers without a parameter of its own (the 1/k of a mean, a constant factor) is measured by the operation's rule of
masses, so each operation's facts stay in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dagpath.capture.graph import Capture
from dagpath.passes.constants import Constants, NotConstantError
from dagpath.passes.responses import Response, Responses
from dagpath.passes.structure import CONSTANT, Links, Structure
from dagpath.passes.structure_nodes import OFFSET, NoEdgesError, has_nodes, largest, nodes_of
from dagpath.passes.structure_weights import WeightFlow
from dagpath.passes.values import FIXED, ZERO, Call, Weight, broadcast, compact, leaves, mapped
from dagpath.passes.weights import Magnitudes, WeightMasses

_MOST_SOURCES = 4096
"""Sources of a constant matrix are told apart one by one, up to here."""


class StructureFlow(WeightFlow):
    """Runs the graphs of a model on node numbers and records who reads whom in the eval graph.

    Args:
        model: the model.
        captured: its graphs.
        rule: finds the rule of a call's target.
        unknown: makes the rule of an operation that fixes what it touches, from the reason.
        cut: calls through which no path goes.
        kept: which factor paths go through, for calls that multiply two activations.
        values: the values of the parameters by name, which weigh the edges.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Capture,
        rule: Callable[[Any], Any],
        unknown: Callable[[str], Any],
        cut: Container[fx.Node],
        kept: Mapping[fx.Node, int],
        values: Mapping[str, Tensor],
    ) -> None:
        parameters: dict[str, Tensor] = dict(values)
        super().__init__(model, rule, unknown, kept, WeightMasses(captured.eval, parameters, rule, cut, kept))
        self.parameters = parameters
        self._captured = captured
        self._known_cut = cut
        self._values = Constants(captured.eval, parameters)
        self._responses = Responses(captured.eval, self._values, self.masses, rule, cut, kept)
        self._path_ends: list[Links] = []
        self._with_params: dict[fx.Node, bool] = {}
        self._inexact: tuple[fx.Node, str] | None = None

    def _start_call(self) -> None:
        super()._start_call()
        self._first_edge = len(self._edges)
        self._first_use = len(self._uses)
        self._first_link = len(self._links)
        self._used = False
        self._reads: tuple[int, Tensor] | None = None
        self._barrier: Tensor | None = None

    # -- running -----------------------------------------------------------------------------------------------------

    def structure(self) -> Structure:
        """Run both graphs (in the train graph neurons are only counted) and assemble the records.

        Raises:
            NoEdgesError: paths go through a call in a way that no edges have.
        """
        self.run_graph(self._captured.eval)
        self._recording = False
        if self._captured.train is not None:
            self.run_graph(self._captured.train)
        self.spread_computed()
        self._recording = True
        self._start_call()
        self.expand_uses()
        edges = sorted(self._edges, key=lambda record: record.order)
        records = (tuple(self._segments), tuple(edges), tuple(self._links), tuple(self._path_ends))
        return Structure(self.num_numbers - OFFSET + 1, *records, self._inexact)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        self._with_params[self.node] = str(target) in self.graph_inputs.parameters
        if self._recording and isinstance(value, Tensor) and not self._is_constant():
            return self._source("input").expand(value.shape)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self._call(target, args, kwargs)
        except (NotConstantError, ValueError, TypeError, IndexError, RuntimeError) as error:
            reason = f"is not followed from channel to channel: {type(error).__name__}: {error}"
            raise NoEdgesError(self.node, reason) from error

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self._recording:
            return super().call_function(target, args, kwargs)
        self._start_call()
        self._operands = {node: self.env[node] for node in self.node.all_input_nodes}
        self._with_params[self.node] = any(self._with_params.get(node, False) for node in self._operands)
        call = Call(target, args, dict(kwargs), self.node)
        if self._is_constant_of_weights():
            return self._unrecorded(call)
        cut = self.node in self._known_cut
        numbers = self._cut(call, "") if cut else self._rule(target).neurons(self, call)
        if self._moved:
            numbers = mapped(numbers, Tensor, self._replaced)
        data = self._data()
        if not data:
            is_input = not leaves(numbers, Weight) and not self._is_constant()
            return mapped(numbers, Tensor, self._sourced) if is_input else numbers
        if self._used and self._reads is None:
            self._check_constants(data)
            return numbers
        return self._responded(numbers, data, self._responses(self.node, data))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self._recording:
            return
        self._start_call()
        self._operands = {node: self.env[node] for node in self.node.all_input_nodes}
        returned = [node for node in leaves(self.node.args, fx.Node) if leaves(self.env[node], (Tensor, Weight))]
        for number, node in zip(self._allocate("output", len(returned)), returned, strict=True):
            value = self.env[node]
            self._end(number, self.joined(value) if isinstance(value, Weight) else self._with_constants(node, value))

    def _with_constants(self, node: fx.Node, numbers: Tensor) -> Tensor:
        """The numbers of an output, with a join that has the largest of its constants where there are any."""
        constant = compact(numbers) == FIXED
        try:
            values = self._values(node) if bool(constant.any()) else None
        except NotConstantError:
            values = None
        if not isinstance(values, Tensor) or not values.numel():
            return numbers
        magnitudes = values.detach().to("cpu", torch.float64).abs()
        join = self._allocate("join", 1)
        self._link(join, torch.tensor(FIXED), magnitudes.masked_fill(magnitudes.isinf(), 0.0).amax())
        return join

    def _data(self) -> dict[fx.Node, bool]:
        """The operands of the call that are activations -> do they depend on a parameter?"""
        return {node: self._with_params[node] for node, value in self._operands.items() if has_nodes(value)}

    def _is_constant(self) -> bool:
        """Has the current node a value that does not depend on the input?"""
        try:
            self._values(self.node)
        except NotConstantError:
            return False
        return True

    def _responded(self, numbers: Any, data: Mapping[fx.Node, bool], response: Response) -> Any:
        """The numbers that a call returned, after the constants that it multiplies by and adds, and what it cuts."""
        for operand in response.ended:
            for leaf in leaves(self._operands[operand], object):
                self._end(self._barrier_number(), leaf)
        if self._reads is not None:
            self._normalize(leaves(numbers, object)[0], response)
            return numbers
        self._check_weights(data, response)
        (operand, *others) = (self._operands[node] for node in data)
        if others and not response.ended and bool(self._responses.constants(self.node, data).sums[0].any()):
            raise NoEdgesError(self.node, "has a constant beside several activations")
        if self._mixed and not self._is_plain_sum(numbers, operand, response):
            exact = self._rows(numbers, operand, response)
            if exact is not None:
                return exact
        flat, spec = pytree.tree_flatten(numbers)
        for index, (leaf, is_data) in enumerate(zip(flat, response.data, strict=False)):
            if not is_data:
                continue
            found = leaf
            if isinstance(leaf, Weight):  # times a gate
                continue
            if not has_nodes(leaf):  # its scale is fixed, but do paths go on?
                goes_on = not response.ended and not others and isinstance(operand, Tensor)
                found = -operand.abs() if goes_on and operand.shape == leaf.shape else self._sourced(leaf)
            if response.factors:
                found = self._multiplied(found, response.factors[index], response.constants[index])
            flat[index] = found
        return pytree.tree_unflatten(flat, spec)

    def _is_constant_of_weights(self) -> bool:
        """Is the call one on parameters alone whose result is a constant to paths?"""
        is_weighted = any(isinstance(value, Weight) or has_nodes(value) for value in self._operands.values())
        return is_weighted and self.masses.is_inputless(self.node) and self.masses.are_constants(self.node)

    def _unrecorded(self, call: Call) -> Any:
        """Constants, and the neurons that the rule makes, which no path crosses."""
        self._recording = False
        numbers = super().call_function(call.target, call.args, call.kwargs)
        self._recording = True
        return mapped(numbers, Tensor, lambda tensor: torch.where(tensor == ZERO, ZERO, FIXED))

    def _is_plain_sum(self, numbers: Any, operand: Any, response: Response) -> bool:
        """Does every join of the call read all of its sources with the same constant, wherever it stands?

        Masses that are drawn at random tell.
        """
        if not response.sums:
            return True
        if not (response.is_even and isinstance(numbers, Tensor) and isinstance(operand, Tensor)):
            return False
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(self.num_numbers + 1, generator=generator, dtype=torch.float64) + 0.5
        table, links = drawn.clone(), self._links[self._first_link :]
        for link in links:
            joins, inverse, counts = torch.unique(link.dst + OFFSET, return_inverse=True, return_counts=True)
            totals = torch.zeros(len(joins), dtype=torch.float64).index_add_(0, inverse, table[link.src + OFFSET])
            table[joins] = totals / counts
        (node,) = self._data()
        given = torch.where(operand.abs() > OFFSET, drawn[operand.abs()], 0.0)
        found = self._responses.of_entries(self.node, node, given)
        expected = response.sums[0] * torch.where(numbers.abs() > OFFSET, table[numbers.abs()], 0.0)
        return torch.allclose(found, expected, rtol=1e-9, atol=0)

    def _check_weights(self, data: Mapping[fx.Node, bool], response: Response) -> None:
        """Raise NoEdgesError if a weight that stands as an activation is multiplied by one that depends on the input.

        To the passes over paths it is still a weight; the rule of neurons saw two activations, and let paths go through
        one of them.
        """
        weights = [node for node in data if self.masses.is_inputless(node)]
        if weights and len(weights) < len(data) and not response.ended and not self._responses.adds(self.node, data):
            raise NoEdgesError(weights[0], "makes a weight of parameters that is no plain choice of their elements")

    def _check_constants(self, data: Mapping[fx.Node, bool]) -> None:
        """Raise NoEdgesError if a call that adds a parameter multiplies its activations by constants."""
        floats = [node for node in data if node.meta["val"].is_floating_point()]
        if self._only_added and len(data) == len(floats) == 1:
            response = self._responses(self.node, data, weights=False)
            if self._mixed or response.factors:
                raise NoEdgesError(self.node, "multiplies channels by constants, and adds a parameter to their sums")

    def _rows(self, numbers: Any, operand: Any, response: Response) -> Any:
        """Joins that read each of their sources with a constant of its own; None where a source stands repeatedly."""
        alike = isinstance(numbers, Tensor) and isinstance(operand, Tensor) and response.data == (True,)
        there = operand.abs() > OFFSET if alike else torch.zeros(0, dtype=torch.bool)
        sources = operand[there] if alike else torch.zeros(0, dtype=torch.long)
        if not alike or len(sources) > _MOST_SOURCES or len(torch.unique(sources.abs())) < len(sources):
            reason = "adds up channels with constant weights that differ: no channel has one factor for its paths"
            self._inexact = self._inexact or (self.node, reason)
            return None
        (node,) = self._data()
        rows = self._responses.rows(self.node, node, there)  # [sources, *shape]
        flat = torch.cat([rows.flatten(1), response.constants[0].expand(numbers.shape).reshape(1, -1)]).t()
        any_free = bool((sources > FIXED).any())
        made, first = self._joins(flat, torch.full((len(flat),), 1 if any_free else -1))
        is_path = (flat > 0).any(1)
        joins, weights = made[first], flat[first]
        dst, column = torch.nonzero(weights, as_tuple=True)
        src = torch.cat([sources, torch.tensor([FIXED])])[column]
        self._link(joins[dst], src, weights[dst, column])
        return torch.where(is_path, made, ZERO).view(numbers.shape)

    # -- where paths start and end -------------------------------------------------------------------------------------

    def _source(self, role: str) -> Tensor:
        return -self._allocate(role, 1)[0]

    def _barrier_number(self) -> Tensor:
        if self._barrier is None:
            self._barrier = self._source("barrier")
        return self._barrier

    def _sourced(self, numbers: Tensor) -> Tensor:
        """Paths that start anew at a barrier."""
        self._with_params[self.node] = False
        return self._barrier_number().expand(numbers.shape)

    def _end(self, end: Tensor, numbers: Tensor) -> None:
        sources = torch.unique(nodes_of(compact(numbers)))
        sources = sources[sources > CONSTANT]
        ones = torch.ones(len(sources), dtype=torch.float64)
        self._path_ends.append(Links(self._next(), nodes_of(end).expand(len(sources)), sources, ones))

    # -- weights that depend on what a call does to its other operands ---------------------------------------------

    def added(self, weight: Weight) -> Magnitudes:
        weights = [value for value in self._operands.values() if isinstance(value, Weight)]
        if len(weights) > 1:
            found = self.found(weight)
            return Magnitudes.of(self.own_values(weight)) if found is None else found
        return self._responses.constants(self.node, self._data())

    def read(self, reads: Tensor) -> None:
        self._reads = (len(self._edges), reads)

    def _normalize(self, numbers: Tensor, response: Response) -> None:
        """Let the edges of a normalization's gain read its input, or a barrier where its statistics are the input's."""
        assert self._reads is not None
        if len(self._uses) > self._first_use:
            raise NoEdgesError(self.node, "has a gain or a shift that is computed from several parameters")
        at, reads = self._reads
        gain = self._edges[at]
        added = [index for index in range(self._first_edge, len(self._edges)) if index != at]
        goes_on = any(bool(factor.any()) for factor in response.factors)
        if response.ended or not goes_on:
            self._edges[at] = replace(gain, src=nodes_of(self._barrier_number()), order=self._next())
            return
        dst, src = broadcast(compact(numbers), compact(reads))
        given = (response.factors[:1] or (torch.ones(()),)) + (response.constants[:1] or (torch.zeros(()),))
        factor, constant = (largest(value, numbers.shape, dst.shape).reshape(-1) for value in given)
        dst, src = dst.reshape(-1), src.reshape(-1)
        tables = torch.zeros(2, self.num_numbers + 1, dtype=torch.float64)
        for table, value in zip(tables, (factor, constant), strict=True):
            table.scatter_reduce_(0, nodes_of(dst), value, "amax")
        pairs = torch.unique(torch.stack([dst, src], 1)[src.abs() > OFFSET], dim=0)
        read, inverse, counts = torch.unique(pairs[:, 0], return_inverse=True, return_counts=True)
        several = counts > 1
        sources = torch.full((self.num_numbers + 1,), ZERO)
        sources[nodes_of(pairs[:, 0])] = nodes_of(pairs[:, 1])
        joins = torch.zeros_like(read)
        joins[several] = self._allocate("join", int(several.sum()))
        chosen = several[inverse]
        self._link(joins[inverse[chosen]], pairs[chosen, 1])
        sources[nodes_of(read[several])] = nodes_of(joins[several])
        self._edges[at] = replace(
            gain, order=self._next(), src=sources[gain.dst], values=tables[0][gain.dst].expand(gain.values.shape)
        )
        for index in added:
            edges = self._edges[index]
            self._edges[index] = replace(edges, values=tables[1][edges.dst].expand(edges.values.shape))
