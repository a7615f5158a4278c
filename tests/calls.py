"""What is true of every call of a network, from one trace of it: other numbers of examples, other lengths, calls in a
row; and that the trace leaves nothing behind.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dagpath

from dags import Dag
from properties import assert_bitwise, outputs_in_a_row, quantities, traced_untouched

Calls = list[tuple[Tensor, ...]]

BATCHES = (1, 3, 5)

_Cache = type(functools.cache(lambda: None))


def rows_of_calls(net: Dag) -> dict[str, Calls]:
    """Calls one after the other, by their names: those that the network takes in eval mode."""
    example = net.example()
    rows: dict[str, Calls] = {"three calls": [example] * 3}
    rows |= {f"{batch} examples": [net.example(batch)] for batch in BATCHES}
    first, *others = net.spec.inputs
    longer = [(*first[:-1], first[-1] + more) for more in (1, first[-1], -1)]
    for shape in longer:
        inputs = [shape, *(shape if other == first else other for other in others)]
        if min(shape) > 0:
            rows[f"inputs of the shapes {inputs}"] = [net.example(2, inputs)]
    if net.memories():
        rows["five examples between"] = [example, net.example(5), example]
        rows |= {f"{name}, twice": 2 * row for name, row in rows.items() if len(row) == 1}
    return rows


def check_calls(traced: dagpath.TracedModel, sigma: float = 3.0, seed: int = 0) -> None:
    """Powers of two change no bit of any call that the network takes, also where the first call was made before."""
    net = traced.model
    generator = torch.Generator().manual_seed(seed)
    rescaling = dagpath.random_rescaling(traced, sigma, power_of_two=True, generator=generator)
    expected: dict[tuple[str, bool], tuple[Calls, list[Tensor]]] = {}
    for name, row in rows_of_calls(net).items():
        for training in (False, True):
            try:
                expected[name, training] = row, outputs_in_a_row(net, row, training)
            except (RuntimeError, ValueError, IndexError):  # it does not take them
                continue
    rescaling.apply_()
    for (name, training), (row, values) in expected.items():
        assert_bitwise(outputs_in_a_row(net, row, training), values, f"{name}, {_mode(training)}, output")
    rescaling.inverse().apply_()
    if not net.memories():
        return
    for (name, training), (row, values) in expected.items():
        if len(row) > 1:
            found = outputs_in_a_row(net, row, training, rescaling.apply_)
            rescaling.inverse().apply_()
            assert_bitwise(found, values, f"{name}, rescaled after the first, {_mode(training)}, output")


def _mode(training: bool) -> str:
    return "train mode" if training else "eval mode"


def check_trace_again(traced: dagpath.TracedModel) -> None:
    """A second trace finds the same graph and leaves the network as it was; path quantities do not
    depend on the number of examples in its inputs where each example is treated alike.
    """
    net = traced.model
    kept = contents(net)
    batch = 3 if net.spec.seed % 2 and traced.captured.eval.batch == 1 else 2
    again = traced_untouched(net, net.example(batch))
    if batch == 2:
        assert again.graph.digest() == traced.graph.digest(), "a second trace finds another graph"
    if again.captured.eval.batch == traced.captured.eval.batch:
        found, expected = quantities(again), quantities(traced)
        assert found["count"] == expected["count"], "paths are counted otherwise in a second trace"
        torch.testing.assert_close(
            torch.tensor(found["norms"]), torch.tensor(expected["norms"]), rtol=1e-12, atol=1e-12
        )
    del again
    assert contents(net) == kept, "tracing changes what the network keeps"


def contents(net: nn.Module) -> list[tuple[str, int, object]]:
    """All that a network's attributes hold: where, which object, and its value.

    Of what ``functools.cache`` keeps, the tensors without values, which only a trace makes.
    """
    return list(_contents("net", net, set()))


def _contents(place: str, value: Any, seen: set[int]) -> Iterator[tuple[str, int, object]]:
    if isinstance(value, _Cache):
        cached = [part for held in gc.get_referents(value) if isinstance(held, dict) for part in held.values()]
        yield from ((place, 0, "no values") for part in cached if isinstance(part, Tensor) and _is_empty(part))
        return
    known: object = value if isinstance(value, (int, float, str)) else None
    if isinstance(value, Tensor):
        known = "no values" if _is_empty(value) else (value.shape, value.dtype, repr(value.tolist()))
    yield place, id(value), known
    if id(value) in seen or isinstance(value, Tensor):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    elif isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        parts = [(name, cell.cell_contents) for name, cell in zip(value.__code__.co_freevars, cells, strict=True)]
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        parts = list(vars(value).items())
    else:
        parts = [(name, getattr(value, name)) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    for name, part in parts:
        yield from _contents(f"{place}.{name}", part, seen)


def _is_empty(tensor: Tensor) -> bool:
    return tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter)
