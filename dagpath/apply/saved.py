"""Rescalings in files: what is written, and what of it is checked when it is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dagpath.runtime.files import require_regular, written_whole


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count_or_none(value: object) -> bool:
    return value is None or _is_count(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


FOUND: Mapping[str, Callable[[object], bool]] = {
    "power_of_two": _is_truth,
    "objective": _is_pair,
    "optimality": _is_number,
    "measure": _is_text,
    "live": _is_count_or_none,
    "iterations": _is_count,
    "products": _is_count,
    "converged": _is_truth,
    "seconds": _is_number,
    "bound": _is_number,
    "rounding_loss": _is_number,
}
"""What is saved beside the factors, and what it must be."""
_LARGEST = math.log(torch.finfo(torch.float64).max)
"""Largest |log λ| of a factor that float64 holds."""


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], found: Mapping[str, Any], digest: str) -> None:
    """Write the factors, what was found beside them, and the digest of the graph that they are for."""
    from safetensors.torch import save_file  # an extra

    with written_whole(path) as target:
        save_file(tensors, target, {"dagpath.apply.rescaling": json.dumps(found), "dagpath.graph": digest})


def read(path: str | os.PathLike[str], num_groups: int, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors and what was found beside them, all checked.

    Raises:
        ValueError: the file holds something else, is for another graph, or is damaged.
        OSError: there is no such file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open  # an extra

    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("log_scales", "held") if name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if "dagpath.apply.rescaling" not in metadata:
        raise ValueError(f"{path} holds no rescaling")
    if metadata.get("dagpath.graph") != digest:
        raise ValueError(f"the rescaling in {path} is for a model with another neuron graph")
    try:
        found = _found(metadata["dagpath.apply.rescaling"])
        _check_factors(tensors, num_groups, found["power_of_two"])
    except ValueError as error:
        raise ValueError(f"the rescaling in {path} is damaged: {error}") from error
    return tensors, found


def _found(text: str) -> dict[str, Any]:
    """What was saved beside the factors; a ValueError that says what is wrong with it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"its metadata is {type(found).__name__}, not an object")
    for name, is_right in FOUND.items():
        if name not in found:
            raise ValueError(f"its metadata has no {name!r}")
        if not is_right(found[name]):
            raise ValueError(f"{name!r} in its metadata is {str(found[name])[:60]!r}")
    more = [name for name in found if name not in FOUND]
    if more:
        raise ValueError(f"its metadata has {str(more[0])[:60]!r}, which no rescaling has")
    return found


def _check_factors(tensors: Mapping[str, Tensor], num_groups: int, power_of_two: bool) -> None:
    for name, dtype in (("log_scales", torch.float64), ("held", torch.bool)):
        if name not in tensors:
            raise ValueError(f"it has no tensor {name!r}")
        if tensors[name].shape != (num_groups,) or tensors[name].dtype != dtype:
            given = f"{tensors[name].dtype} of shape {tuple(tensors[name].shape)}"
            raise ValueError(f"{name!r} is {given}, not {dtype} of shape ({num_groups},), one for each free group")
    log_scales = tensors["log_scales"]
    powers = log_scales / math.log(2)
    bad = ~(log_scales.abs() < _LARGEST)  # NaN too
    if power_of_two:
        bad |= (powers - powers.round()).abs() > 1e-6
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        kind = "the logarithm of a power of two" if power_of_two else "the logarithm of a factor"
        raise ValueError(f"'log_scales' at index {first} is {float(log_scales[first])}, not {kind}")
