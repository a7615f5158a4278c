"""A batch of inputs, example by example, as a captured graph takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.export.graph_signature import CustomObjArgument
from torch.utils import _pytree as pytree

from dagpath.capture.graph import CapturedGraph


def examples(graph: CapturedGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Placeholder name -> value, for each example.

    Dimension 0 is the batch if the graph takes one example and returns one; other graphs take their inputs as a whole.

    Raises:
        ValueError: an input is missing, has another shape or kind of type than the traced one, or no example.
    """
    given = pytree.tree_leaves((args, dict(kwargs)))
    nodes = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    held = {*graph.parameters, *graph.tensors, *graph.state}
    nodes = [
        node for node in nodes if node.name not in held and not isinstance(node.meta.get("val"), CustomObjArgument)
    ]
    if len(given) != len(nodes):
        names = ", ".join(node.name for node in nodes)
        raise ValueError(f"the model was traced with {len(nodes)} inputs ({names}), got {len(given)}")
    expected = {node.name: node.meta.get("val") for node in nodes}
    inputs = dict(zip(expected, given, strict=True))
    shapes = {name: fake.shape for name, fake in expected.items() if isinstance(fake, Tensor)}
    batched = _is_one_example(graph, [shape for shape in shapes.values() if len(shape)])
    size = None
    for name, shape in shapes.items():
        value = inputs[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"input {name!r} must be a Tensor of shape {_text(shape, batched)}, got {value!r}")
        if value.ndim != len(shape) or value.shape[int(batched) :] != shape[int(batched) :]:
            alone = "" if batched or graph.batch is None else "; one example, since outputs have no row for each"
            raise ValueError(f"input {name!r} has shape {list(value.shape)}, expected {_text(shape, batched)}{alone}")
        if _kind(value) != _kind(expected[name]):
            raise ValueError(
                f"input {name!r} has dtype {value.dtype}, the model was traced with {expected[name].dtype}"
            )
        if batched and value.shape[:1] == (0,):
            raise ValueError(f"input {name!r} has shape {list(value.shape)}: there must be at least one example")
        if batched and value.ndim:
            size = value.shape[0] if size is None else size
            if value.shape[0] != size:
                raise ValueError(
                    f"input {name!r} has shape {list(value.shape)}, expected {_text(shape, batched)} with batch {size}"
                )
    if size is None:
        return [inputs]

    def example(value: Any, index: int) -> Any:
        return value[index : index + 1] if isinstance(value, Tensor) and value.ndim else value

    return [{name: example(value, index) for name, value in inputs.items()} for index in range(size)]


def _kind(tensor: Tensor) -> str:
    """Tensors of one kind are computed in one type."""
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"


def _is_one_example(graph: CapturedGraph, shapes: list[Any]) -> bool:
    output = next(node for node in graph.module.graph.nodes if node.op == "output")
    outputs = [node.meta.get("val") for node in output.all_input_nodes]
    shapes = shapes + [value.shape for value in outputs if isinstance(value, Tensor)]
    return all(shape[:1] == (1,) for shape in shapes)


def _text(shape: Any, batched: bool) -> str:
    return f"[{', '.join(['batch'] * batched + [str(size) for size in shape[int(batched) :]])}]"
