"""Buffers that a trace read: those of a file, or of another model, must lead to the same neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dagpath.capture.graph import CapturedGraph
from dagpath.runtime.distributed import whole
from dagpath.trace import TracedModel, neurons_of, structure_of


def with_values(
    traced: TracedModel, buffers: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
) -> TracedModel:
    """The same trace with other values of buffers and parameters: all that is asked of it is answered from these.

    Args:
        traced: the trace; it is not changed.
        buffers: buffer name -> value. If a buffer that is read has another, the neurons are found anew.
        values: parameter name -> value; None for the current values of the model.
    """

    def replaced(graph: CapturedGraph) -> CapturedGraph:
        others = {
            place: buffers[name].to(graph.tensors[place].dtype)
            for place, name in graph.buffers.items()
            if name in buffers
        }
        return replace(graph, tensors={**graph.tensors, **others})

    old, read = traced.captured, traced.captured.buffers_read()
    captured = replace(
        old,
        eval=replaced(old.eval),
        train=None if old.train is None else replaced(old.train),
        others=tuple(map(replaced, old.others)),
        train_others=tuple(map(replaced, old.train_others)),
    )
    anew = differing(traced, buffers) or any(read[name].is_meta for name in buffers.keys() & read.keys())
    graph = neurons_of(traced.model, captured) if anew else traced.graph
    graph = graph.reading(structure_of(traced.model, captured, values))
    return TracedModel(traced.model, captured, graph, traced.seconds, traced.peers, values)


def differing(traced: TracedModel, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the buffers whose values are others than those that the trace read; it may have read some without.

    Running statistics may be any: they weigh what passes, and change no neuron.
    """
    known = traced.tables
    return {name: value for name, value in buffers.items() if name in known and _difference(known[name], value)}


def require_same_neurons(traced: TracedModel, buffers: Mapping[str, Tensor], whose: str, advice: str) -> None:
    """Raise ValueError if a rescaling of the traced model would not be one of the model that has these buffers.

    Running statistics, and other buffers that only weigh what passes, may differ: the neurons, and which of them share
    a factor, are the same. A table of indices, a mask, or an offset that is zero in the one and not in the other says
    which neurons meet: factors found for the one would change the function of the other.

    Args:
        traced: the trace.
        buffers: buffer name -> value.
        whose: where the values are from, for the message.
        advice: what to do, for the message.
    """
    others, known = differing(traced, buffers), traced.tables
    for name, value in others.items():
        if value.shape != known[name].shape:
            shapes = tuple(value.shape), tuple(known[name].shape)
            raise ValueError(f"the buffer {name!r} of {whose} has shape {shapes[0]}, not {shapes[1]} as when traced")
    expected = traced.graph.digest()
    if not others or with_values(traced, others).graph.digest() == expected:
        return
    alone = [name for name in others if with_values(traced, {name: others[name]}).graph.digest() != expected]
    name = (alone or list(others))[0]
    difference = _difference(known[name], others[name])
    raise ValueError(
        f"the buffer {name!r} of {whose} has other values than the trace read ({difference}), and with them other "
        f"neurons meet: factors for the one would change the function of the other. {advice}"
    )


def _difference(ours: Tensor, theirs: Tensor) -> str:
    """Where two tensors differ first, in words; empty if they are equal, or if one has no values."""
    if ours.is_meta or theirs.is_meta:
        return ""
    ours, theirs = whole(ours).cpu(), whole(theirs).cpu()
    if ours.shape != theirs.shape:
        return f"shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"
    if ours.layout != theirs.layout:
        return f"layout {theirs.layout}, not {ours.layout}"
    if ours.layout != torch.strided:
        ours, theirs = (tensor.to_sparse().coalesce() for tensor in (ours, theirs))
        places = _difference(ours.indices(), theirs.indices()) and "other entries are stored"
        return places or _difference(ours.values(), theirs.values())
    theirs = theirs.to(ours.dtype)
    same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
    if bool(same.all()):
        return ""
    first = tuple(torch.nonzero(~same)[0].tolist())
    return f"at index {first} {theirs[first].item()}, not {ours[first].item()}"
