"""Which neuron reads which: the nodes and edges of a network as paths see them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

CONSTANT = 0
"""The node of the constant neuron, of value 1, that biases come from."""


@dataclass(frozen=True)
class Segment:
    """Nodes that one call made, in a row.

    Attributes:
        role: ``"constant"``, ``"input"``, ``"hidden"``, ``"join"``, ``"output"`` or ``"barrier"``.
        call: the call; None for the constant neuron.
        start: the first node.
        count: how many there are.
        again: the first of the nodes whose neurons these are once more: those between the factors of a weight that is
            used repeatedly; None for neurons of their own.
    """

    role: str
    call: fx.Node | None
    start: int
    count: int
    again: int | None = None


@dataclass(frozen=True)
class Edges:
    """Edges through the elements of a parameter.

    Attributes:
        call: the call that uses the parameter.
        order: what edges and links of smaller order lead to is complete when these read it.
        parameter: its name.
        index: flat positions of the elements in the parameter; None for all of them.
        dst, src: nodes at their ends, broadcastable to the elements; negative where there is no edge.
        values: what the edges multiply by, in the shape of the elements; signs have no meaning.
    """

    call: fx.Node
    order: float
    parameter: str
    index: Tensor | None
    dst: Tensor
    src: Tensor
    values: Tensor


@dataclass(frozen=True)
class Links:
    """Edges without a parameter: ``dst[i]`` reads ``src[i]`` times ``factor[i]``. One-dimensional tensors."""

    order: float
    dst: Tensor
    src: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Structure:
    """Nodes ``0 .. num_nodes - 1`` of a network and all its edges; node 0 is the constant neuron.

    Attributes:
        segments: the nodes, by the calls that made them.
        edges: those through parameters, by order.
        links: those without: into joins, and into nodes that stand for a constant factor.
        ends: those into outputs and barriers, where paths end.
        inexact: a call that multiplies what it adds up by constants that differ, and what it does in words, where no
            channel has one such constant; None where there is none. Links have the largest of them.
    """

    num_nodes: int
    segments: tuple[Segment, ...]
    edges: tuple[Edges, ...]
    links: tuple[Links, ...]
    ends: tuple[Links, ...]
    inexact: tuple[fx.Node, str] | None = None
