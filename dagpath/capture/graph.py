"""Captured calls of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dagpath.capture.sizes import Dim
from dagpath.runtime.distributed import own


@dataclass(frozen=True)
class CapturedGraph:
    """One call of a model as a functional graph.

    Attributes:
        module: the graph; every node is an ATen operation whose ``meta["val"]`` holds its shape. Where its result
            outlives the call, ``meta["escapes"]`` says how.
        parameters: placeholder name -> name in ``model.named_parameters()``.
        buffers: placeholder name -> name in ``model.named_buffers()``.
        tensors: placeholder name -> buffer or constant tensor (the live one, not a copy).
        state: as ``tensors``, those that calls write to: what one call leaves there, the next one reads.
        batch: number of examples that it was captured with; None where the inputs were used as given.
        structure: how the model arranges the tensors that it returns; they are the last outputs of the graph.
        call: which call it is, in words; empty for the one that the others are compared with.
        leaves: where it leaves something behind that the next call may read, a few places.
        chosen: the lines of code at which values of the inputs decide how many entries there are.
    """

    module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    batch: int | None
    structure: pytree.TreeSpec
    call: str = ""
    leaves: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "what was traced belongs to one model in one process, and is neither copied nor pickled: trace the copy of "
            "the model, or trace in the other process; Rescaling.save writes factors to a file"
        )


@dataclass(frozen=True)
class Capture:
    """The graphs of a model.

    Attributes:
        eval: the eval graph.
        train: the train graph; None where it puts the same constraints on scales, or cannot be captured.
        others: graphs of further calls in eval mode: other sizes, further examples, a second call.
        train_others: those in train mode.
        train_failure: why train mode cannot be captured; empty if it can.
        covers: what the trace holds for, a line each.
        not_captured: calls that the model takes and that could not be captured, in words.
        sizes: other sizes of dimensions of the inputs that the model takes too, one for each call with them.
        written: names of the parameters that a call writes to.
        pinned: names of parameters that no factor may change, whatever the graphs say, and why.
    """

    eval: CapturedGraph
    train: CapturedGraph | None
    others: tuple[CapturedGraph, ...]
    train_others: tuple[CapturedGraph, ...]
    train_failure: str
    covers: tuple[str, ...]
    not_captured: tuple[str, ...] = ()
    sizes: tuple[Mapping[Dim, int], ...] = ()
    written: tuple[str, ...] = ()
    pinned: Mapping[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> list[CapturedGraph]:
        """All graphs, the eval graph first."""
        return [graph for graph in (self.eval, self.train, *self.others, *self.train_others) if graph is not None]

    def buffers_read(self) -> dict[str, Tensor]:
        """Buffer name -> tensor, for the buffers that any graph reads."""
        return {name: graph.tensors[node.name] for graph, node, name in self._readers()}

    def tables(self) -> dict[str, Tensor]:
        """Buffer name -> a copy of it, for those on which the neurons may depend: all but running statistics."""
        statistics: dict[str, bool] = {}
        for _, node, name in self._readers():
            are = all("_norm" in str(user.target) and node in user.args[3:5] for user in node.users)
            statistics[name] = are and statistics.get(name, True)
        return {name: t.detach().clone() for name, t in self.buffers_read().items() if not statistics[name]}

    def _readers(self) -> Iterator[tuple[CapturedGraph, fx.Node, str]]:
        for graph in self.graphs:
            for node in graph.module.graph.nodes:
                if node.users and node.name in graph.buffers:
                    yield graph, node, graph.buffers[node.name]


def shared_parameters(model: nn.Module, graphs: Sequence[CapturedGraph] = ()) -> set[str]:
    """Names of parameters whose memory other tensors of the model use too, or several of their own entries.

    Multiplying one of them in place would change the others.
    """
    tensors = {id(tensor): own(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for graph in graphs:
        tensors |= {id(tensor): own(tensor) for tensor in (*graph.tensors.values(), *graph.state.values())}
    users = Counter(storage_of(tensor) for tensor in tensors.values())
    return {
        name
        for name, parameter in ((name, tensors[id(parameter)]) for name, parameter in model.named_parameters())
        if users[storage_of(parameter)] > 1
        or any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True))
    }


def storage_of(tensor: Tensor) -> tuple[str, int]:
    """What tells the memory of tensors apart: its address, or the storage itself where there is none."""
    tensor = own(tensor)
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # sparse tensors
        return "tensor", id(tensor)
    has_address = not (tensor.is_meta or isinstance(tensor, FakeTensor)) and storage.data_ptr()
    return ("address", storage.data_ptr()) if has_address else ("storage", storage._cdata)


def is_random(node: fx.Node) -> bool:
    """Does a call draw random numbers? A dropout that is not training, or drops nothing, does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    trains = given.get("train", given.get("training", True)) is not False
    rate = next((given[name] for name in ("dropout_p", "dropout", "p") if name in given), None)
    return trains and rate != 0.0


def outputs_have_batch(graph: CapturedGraph, size: int) -> bool:
    output = next(node for node in graph.module.graph.nodes if node.op == "output")
    values = [node.meta.get("val") for node in output.all_input_nodes]
    return all(value.shape[0] == size for value in values if isinstance(value, Tensor) and value.ndim)
