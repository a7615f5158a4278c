"""Weights in safetensors files, rescaled file by file: they need not fit into memory, nor does the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dagpath.balance import balance
from dagpath.criteria import Criterion
from dagpath.fetched import Fetched
from dagpath.files import written_whole
from dagpath.multiply import Moving, multiply_one_
from dagpath.rescaling import Rescaling
from dagpath.trace import TracedModel, trace

_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in safetensors files.

    Attributes:
        path: what was opened.
        files: the files of tensors.
        index: the file that says which tensor is in which of them; None where there is one file.
        places: tensor name -> its file and its shape.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None
    places: Mapping[str, tuple[Path, torch.Size]]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Open a file of tensors, an index of several (``*.safetensors.index.json``), or a folder with one of either.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, or the index and the files do not agree.
            ImportError: the package safetensors is not installed (``pip install "dagpath[io]"``).
        """
        path = Path(path)
        found = _only(path) if path.is_dir() else path
        if not found.name.endswith(_INDEX):
            return Checkpoint(path, (found,), None, {name: (found, shape) for name, shape in _shapes(found).items()})
        try:
            names = json.loads(found.read_bytes())["weight_map"]
            files = {file: found.parent / file for file in sorted(set(names.values()))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{found} is no index of safetensors files: {error!r}") from error
        for file in files.values():
            if file.parent != found.parent:
                raise ValueError(f"{found} names {str(file)!r}, which is in another folder")
        shapes = {file: _shapes(part) for file, part in files.items()}
        inside = {(name, file) for file, part in shapes.items() for name in part}
        if inside != set(names.items()):
            name, file = min(inside ^ set(names.items()))
            raise ValueError(f"{found} and its files do not agree: {name!r} is in one of {found.name} and {file} alone")
        places = {name: (files[file], shapes[file][name]) for name, file in names.items()}
        return Checkpoint(path, tuple(files.values()), found, places)

    def read(self, name: str) -> Tensor:
        """One tensor, which is not to be written to: its memory may be a map of the file."""
        from safetensors import safe_open  # an extra

        with safe_open(self.places[name][0], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def write(
        self, out: str | os.PathLike[str], change: Callable[[str, Tensor], Tensor | None], progress: bool = False
    ) -> None:
        """Write a copy in which some tensors are changed: the whole of it, or nothing.

        Args:
            out: a file where the checkpoint is one file (which is replaced at the end, if it exists), else a folder,
                which must not exist.
            change: gets the name and a copy of each tensor; returns it with other values, or None to leave it.
            progress: show a progress bar.

        Raises:
            ValueError: ``out`` is the checkpoint itself.
            FileExistsError: ``out`` exists, and is not one file in place of another.
            OSError: the files could not be written.

        Cost: each file is copied and the changed tensors are written again; one tensor is held at a time.
        """
        out = Path(out)
        if self.index is None:
            _check_target(self.files[0], out)
        elif out.exists():
            raise FileExistsError(f"{out} exists: name a folder that does not, for {len(self.files)} files")
        bar = tqdm(total=len(self.places), desc="rescaling", disable=not progress, leave=False, delay=2)
        with bar, written_whole(out, folder=self.index is not None) as made:
            for file in self.files:
                target = made if self.index is None else made / file.name
                shutil.copyfile(file, target)
                with target.open("r+b") as written:
                    for name, start in _starts(written).items():
                        changed = change(name, self.read(name).clone())
                        if changed is not None:
                            written.seek(start)
                            written.write(changed.contiguous().view(-1).view(torch.uint8).numpy().data)
                        bar.update()
            if self.index is not None:
                shutil.copyfile(self.index, made / self.index.name)


def rescale_checkpoint(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    criterion: str | Criterion = "pathcond",
    kwargs: Mapping[str, Any] | None = None,
    prefix: str = "",
    progress: bool = False,
    **balance_options: Any,
) -> Rescaling:
    """Rescale the weights in safetensors files, to the minimum of a criterion, tensor by tensor.

    The files are written as a whole or not at all: they appear under their name once they are complete, and what was
    there before stays as it is if anything fails or is interrupted. Types, order and metadata stay.

    Args:
        model: the architecture. Its values are not used and not changed; make it without any, under
            ``torch.device("meta")``, where they would not fit.
        example_inputs: as in :func:`dagpath.trace`; tensors may be on the CPU though the model is on the meta device.
        weights: a file ``*.safetensors``, the index of several (``*.safetensors.index.json``), or their folder.
        out: where the new ones go: a file for a file, a folder that does not exist yet for several. Only safetensors
            files and their index are written there.
        criterion: as in :func:`dagpath.balance`.
        kwargs: keyword arguments of ``model.forward``.
        prefix: what stands before the model's names in the files, such as ``"module."``.
        progress: show a progress bar.
        **balance_options: options of :func:`dagpath.balance`, such as ``power_of_two=True``.

    Returns:
        The :class:`Rescaling`. Its model is the one given: ``apply_`` would multiply that, not the files.

    Raises:
        ValueError: the files lack a parameter, or a buffer that eval mode uses and that has no values in the model
            either, or hold a tensor that the model does not have, or one of another shape; or ``out`` is what is read.
        BalanceError: a weight is not finite, or a product leaves the range of its type.
        FileNotFoundError, FileExistsError, OSError: as it happens; nothing is left behind.
        CaptureError: as in :func:`dagpath.trace`.

    Cost: each tensor is read three times and written once. One tensor is held at a time, in float64, and its masses for
    a moment; the masses of linear layers whose inputs are alike at all positions are stored as vectors, those of
    convolutions summed over their kernels. Criteria other than path conditioning hold the absolute values of all.

    Example:
        >>> import tempfile, torch, dagpath
        >>> from safetensors.torch import load_file, save_file
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net, x = make(), torch.randn(5, 4)
        >>> with torch.device("meta"):
        ...     empty = make()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(net.state_dict(), f"{folder}/in.safetensors")
        ...     found = dagpath.rescale_checkpoint(empty, x, f"{folder}/in.safetensors", f"{folder}/out.safetensors")
        ...     rescaled = load_file(f"{folder}/out.safetensors")
        >>> torch.allclose(torch.func.functional_call(net, rescaled, x), net(x), atol=1e-5)
        True
    """
    checkpoint = Checkpoint.open(weights)
    names = _names_in(checkpoint, model, prefix)
    if checkpoint.index is None:
        _check_target(checkpoint.files[0], Path(out))
    traced = _with_values(trace(model, example_inputs, kwargs), checkpoint, names, prefix)
    rescaling = balance(traced, criterion, **balance_options)
    owners = {inside: name for name, all_inside in names.items() for inside in all_inside}
    scales = rescaling.scales()

    def change(inside: str, tensor: Tensor) -> Tensor | None:
        if owners.get(inside) not in traced.graph.movable:
            return None
        name = owners[inside]
        multiply_one_(Moving(name, inside, tensor, 1, rescaling.power_of_two), traced.graph.ends[name], scales)
        return tensor

    checkpoint.write(out, change, progress)
    return rescaling


def _names_in(checkpoint: Checkpoint, model: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Parameter name -> the names of its copies in the files: one that is used in several places may have several."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in known.values()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        if prefix + alias in checkpoint.places:
            names[known[id(parameter)]].append(prefix + alias)
    found = {inside for all_inside in names.values() for inside in all_inside}
    buffers = {prefix + name for name, _ in model.named_buffers(remove_duplicate=False)}
    hint = f"prefix={prefix!r} stands before the model's names; in the files are {_some(checkpoint.places)}"
    for name, all_inside in names.items():
        if not all_inside:
            raise ValueError(f"{checkpoint.path} has no {prefix + name!r}, a parameter of the model ({hint})")
        for inside in all_inside:
            shape = checkpoint.places[inside][1]
            if shape != shapes[name]:
                expected = tuple(shapes[name])
                raise ValueError(f"{inside!r} in {checkpoint.path} has shape {tuple(shape)}, the parameter {expected}")
    more = [inside for inside in checkpoint.places if inside not in found | buffers]
    if more:
        raise ValueError(
            f"{checkpoint.path} has {more[0]!r}, which the model does not have ({len(more)} such tensors): what reads "
            f"it is not known, so nothing was rescaled ({hint})"
        )
    return names


def _some(names: Mapping[str, object]) -> str:
    first = list(names)[:3]
    return ", ".join(map(repr, first)) + (", ..." if len(names) > len(first) else "")


def _with_values(
    traced: TracedModel, checkpoint: Checkpoint, names: Mapping[str, list[str]], prefix: str
) -> TracedModel:
    """The same trace, with the values of the files."""
    captured = traced.captured.eval
    tensors = dict(captured.tensors)
    read = set(traced.buffers)
    for place, name in captured.buffers.items():
        if prefix + name in checkpoint.places:
            tensors[place] = checkpoint.read(prefix + name)
        elif name in read and tensors[place].is_meta:
            raise ValueError(
                f"the buffer {name!r} has no values: it is not in {checkpoint.path}, and the model is on the meta "
                "device; put the values that the model computes for it in its place first"
            )
    values = Fetched(list(names), lambda name: checkpoint.read(names[name][0]), torch.device("cpu"))
    captures = replace(traced.captured, eval=replace(captured, tensors=tensors))
    return TracedModel(traced.model, captures, traced.graph, traced.seconds, traced.peers, values)


def _only(folder: Path) -> Path:
    """The index of a folder, or its one file of tensors."""
    for pattern in (f"*{_INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{folder} has {len(found)} files {pattern}: name the one that is meant")
    raise FileNotFoundError(f"{folder} has no *.safetensors")


def _shapes(path: Path) -> dict[str, torch.Size]:
    """The tensors of a file and their shapes."""
    from safetensors import SafetensorError, safe_open  # an extra

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _starts(file: Any) -> dict[str, int]:
    """Where each tensor of a file begins: after a length, of 8 bytes, and a header of that length."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _check_target(source: Path, out: Path) -> None:
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder: name a file")
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the file that is read: name another")
