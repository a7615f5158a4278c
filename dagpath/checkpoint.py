"""Weights in safetensors files, rescaled file by file: they need not fit into memory, nor does the model."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dagpath.apply.buffers import require_same_neurons, with_values
from dagpath.apply.multiply import Moving, multiply_one_
from dagpath.apply.rescaling import Rescaling
from dagpath.balance import BalanceOptions
from dagpath.criteria import Criterion
from dagpath.runtime.fetched import Fetched
from dagpath.runtime.files import require_regular, written_whole
from dagpath.trace import TracedModel, trace
from dagpath.words import counted

_INDEX = ".safetensors.index.json"
_TYPES = ("F64", "F32", "F16", "BF16")
"""The types of parameters that can be multiplied, as the files call them."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is, and what it is.

    Attributes:
        file: the file.
        shape: the shape.
        kind: the type, as the file calls it.
    """

    file: Path
    shape: torch.Size
    kind: str


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in safetensors files.

    Attributes:
        path: what was opened.
        files: the files of tensors.
        index: the file that says which tensor is in which of them; None where there is one file.
        places: tensor name -> where it is.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None
    places: Mapping[str, Place]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Open a file of tensors, an index of several (``*.safetensors.index.json``), or a folder with one of either.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, or the index and the files do not agree.
            ImportError: the package safetensors is not installed (``pip install 'dagpath[io]'``).
        """
        path = Path(path)
        found = _only(path) if path.is_dir() else path
        if not found.name.endswith(_INDEX):
            return Checkpoint(path, (found,), None, _places(found))
        require_regular(found)
        try:
            names = json.loads(found.read_bytes())["weight_map"]
            files = {file: found.parent / file for file in sorted(set(names.values()))}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{found} is no index of safetensors files: {error!r}") from error
        for file in files.values():
            if file.parent != found.parent:
                raise ValueError(f"{found} names {str(file)!r}, which is in another folder")
        places = {file: _places(part) for file, part in files.items()}
        inside = {(name, file) for file, part in places.items() for name in part}
        if inside != set(names.items()):
            name, file = min(inside ^ set(names.items()))
            raise ValueError(f"{found} and its files do not agree: {name!r} is in one of {found.name} and {file} alone")
        return Checkpoint(
            path, tuple(files.values()), found, {name: places[file][name] for name, file in names.items()}
        )

    def read(self, name: str) -> Tensor:
        """One tensor, which is not to be written to: its memory may be a map of the file."""
        from safetensors import safe_open  # an extra

        with safe_open(self.places[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def check_target(self, out: str | os.PathLike[str]) -> None:
        """Raise what :meth:`write` would raise of a place that cannot be written to."""
        out = Path(out)
        if not out.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {out.parent}")
        if self.index is not None:
            if os.path.lexists(out):
                raise FileExistsError(f"{out} exists: name a folder that does not, for {len(self.files)} files")
        elif out.is_dir():
            raise FileExistsError(f"{out} is a folder: name a file")
        elif out.exists() and out.samefile(self.files[0]):
            raise ValueError(f"{out} is the file that is read: name another")
        elif out.exists() and not out.is_file():
            raise FileExistsError(f"{out} is no regular file: name a file on a disk")

    def write(
        self,
        out: str | os.PathLike[str],
        names: Collection[str],
        change_: Callable[[str, Tensor], None],
        progress: bool = False,
    ) -> None:
        """Write a copy in which some tensors are changed: the whole of it, or nothing.

        Args:
            out: a file where the checkpoint is one file (which is replaced at the end, if it exists), else a folder,
                which must not exist.
            names: of the tensors to change.
            change_: gets the name and a copy of each, and changes it in place.
            progress: show a progress bar.

        Raises:
            ValueError: ``out`` is the checkpoint itself.
            FileExistsError: ``out`` exists, and is not one file in place of another.
            OSError: the files could not be written.

        Cost: each file is copied and the changed tensors are written again; one tensor is held at a time.
        """
        self.check_target(out)
        bar = tqdm(total=len(names), desc="rescaling", disable=not progress, leave=False, delay=2)
        with bar, written_whole(out, folder=self.index is not None) as made:
            for file in self.files:
                target = made if self.index is None else made / file.name
                shutil.copy(file, target)
                target.chmod(target.stat().st_mode | stat.S_IWUSR)
                with target.open("r+b") as written:
                    for name, start in _starts(written).items():
                        if name not in names:
                            continue
                        tensor = self.read(name).clone()
                        change_(name, tensor)
                        written.seek(start)
                        written.write(tensor.view(-1).view(torch.uint8).numpy().data)
                        bar.update()
            if self.index is not None:
                shutil.copy(self.index, made / self.index.name)


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
    there before stays as it is if anything fails or is interrupted. Types, order, metadata and permissions stay. (What
    kills the process leaves a folder beside, whose name ends in ``.partial``.)

    Args:
        model: the architecture. Its values are not used and not changed, but for those that no file has (buffers with
            ``persistent=False``, tensors in plain attributes); make it without any, under ``torch.device("meta")``,
            where they would not fit.
        example_inputs: as in :func:`dagpath.trace`; tensors may be on the CPU though the model is on the meta device.
        weights: a file ``*.safetensors``, the index of several (``*.safetensors.index.json``), or their folder.
        out: where the new ones go: a file for a file, which is replaced if it exists; a folder that does not exist yet
            for several. Only safetensors files and their index are written there, no configuration.
        criterion: as in :func:`dagpath.balance`.
        kwargs: keyword arguments of ``model.forward``.
        prefix: what stands before the model's names in the files, such as ``"module."``.
        progress: show a progress bar.
        **balance_options: options of :func:`dagpath.balance`, such as ``power_of_two=True``.

    Returns:
        The :class:`Rescaling` of the model that was given; its ``apply_`` would multiply that, not the files.

    Raises:
        ValueError: the files lack a parameter, or a buffer that the model reads and stores, or one that it does not
            store and has no values for either; with a buffer of theirs other neurons would meet than with that of the
            model; or they hold a tensor that the model does not have, one of another shape, a parameter that is not of
            floating-point numbers of 16 bits or more, or two copies of one that differ; or ``out`` is what is read.
        BalanceError: a weight is not finite, or a product leaves the range of its type.
        OSError: a file cannot be read or written, or ``out`` exists and may not be replaced; nothing is left behind.
        CaptureError: as in :func:`dagpath.trace`.

    Cost: each tensor is read some four times and written once. One tensor is held at a time as it is stored, and the
    masses of two for a moment, in float64; the masses of linear layers whose inputs are alike at all positions are
    stored as vectors, those of convolutions summed over their kernels. Criteria other than path conditioning hold the
    absolute values of all.

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
    start = time.perf_counter()
    options = BalanceOptions(criterion, **balance_options)
    checkpoint = Checkpoint.open(weights)
    checkpoint.check_target(out)
    names = _names_in(checkpoint, model, prefix)
    traced = _with_values(trace(model, example_inputs, kwargs), checkpoint, names, prefix)
    rescaling = options.minimize(traced)
    if not rescaling.converged:
        warnings.warn(options.shortfall(rescaling), stacklevel=2)
    owners = {inside: name for name in traced.graph.movable for inside in names[name]}
    scales = rescaling.scales()

    def change_(inside: str, tensor: Tensor) -> None:
        name = owners[inside]
        multiply_one_(Moving(name, inside, tensor, 1, rescaling.power_of_two), traced.graph.ends[name], scales)

    found = time.perf_counter()
    checkpoint.write(out, owners, change_, progress)
    end = time.perf_counter()
    stages = {"trace": traced.seconds, **rescaling.stages, "write": end - found}
    return replace(rescaling, seconds=end - start, stages=stages)


def _names_in(checkpoint: Checkpoint, model: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Parameter name -> the names of its copies in the files: one that is used in several places may have several."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in known.values()}
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        if prefix + alias in checkpoint.places:
            names[known[id(parameter)]].append(prefix + alias)
    found = {inside for all_inside in names.values() for inside in all_inside}
    buffers = {prefix + name: name for name, _ in model.named_buffers(remove_duplicate=False)}
    stored = {name: [inside] for inside, name in buffers.items() if inside in checkpoint.places and name in shapes}
    hint = f"prefix={prefix!r} stands before the model's names; in the files are {some(checkpoint.places)}"
    for name, all_inside in names.items():
        if not all_inside:
            raise ValueError(f"{checkpoint.path} has no {prefix + name!r}, a parameter of the model ({hint})")
        for inside in all_inside:
            if checkpoint.places[inside].kind not in _TYPES:
                raise ValueError(
                    f"{inside!r} in {checkpoint.path} is of type {checkpoint.places[inside].kind}: only parameters of "
                    f"type {', '.join(_TYPES)} can be rescaled; nothing was written"
                )
        if any(not torch.equal(checkpoint.read(all_inside[0]), checkpoint.read(other)) for other in all_inside[1:]):
            raise ValueError(
                f"{', '.join(map(repr, all_inside))} are one parameter of the model, but differ in the file"
            )
    for name, all_inside in [*names.items(), *stored.items()]:
        for inside in all_inside:
            shape = checkpoint.places[inside].shape
            if shape != shapes[name]:
                expected = tuple(shapes[name])
                raise ValueError(f"{inside!r} in {checkpoint.path} has shape {tuple(shape)}, the model's {expected}")
    more = [inside for inside in checkpoint.places if inside not in found | buffers.keys()]
    if more:
        raise ValueError(
            f"{checkpoint.path} has {more[0]!r}, which the model does not have "
            f"({counted(len(more), 'such tensor')}): what reads it is not known, so nothing was rescaled ({hint})"
        )
    return names


def some(names: Iterable[object]) -> str:
    """The first few names, for messages."""
    names = list(names)
    first = names[:3]
    return ", ".join(map(repr, first)) + (", ..." if len(names) > len(first) else "")


def _with_values(
    traced: TracedModel, checkpoint: Checkpoint, names: Mapping[str, list[str]], prefix: str
) -> TracedModel:
    """The same trace, with the values of the files."""
    read = traced.captured.buffers_read()
    computed = _computed_buffers(traced.model)
    modes = [graph for graph in (traced.captured.eval, traced.captured.train) if graph is not None]
    buffers = {name for graph in modes for name in graph.buffers.values()}
    stored = {name: checkpoint.read(prefix + name) for name in buffers if prefix + name in checkpoint.places}
    for name, tensor in read.items():
        if name in stored:
            continue
        if tensor.is_meta:
            raise ValueError(
                f"the buffer {name!r} has no values: it is not in {checkpoint.path}, and the model is on the meta "
                "device; put the values that the model computes for it in its place first"
            )
        if name not in computed:
            raise ValueError(
                f"{checkpoint.path} has no {prefix + name!r}, a buffer that the model reads and stores: write the file "
                "from all of model.state_dict(); or, if the model computes it, register it with persistent=False"
            )
    values = Fetched(list(names), lambda name: checkpoint.read(names[name][0]), torch.device("cpu"))
    absent = {name: tensor for name, tensor in stored.items() if name in read and read[name].is_meta}
    traced = with_values(traced, absent, values)
    require_same_neurons(
        traced,
        stored,
        str(checkpoint.path),
        "Load the file into the model first, or make the model on the meta device; nothing was written",
    )
    return with_values(traced, stored, values)


def _computed_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that are not stored, since the model computes them."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _only(folder: Path) -> Path:
    """The index of a folder, or its one file of tensors."""
    for pattern in (f"*{_INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{folder} has {len(found)} files {pattern}: name the one that is meant")
    raise FileNotFoundError(f"{folder} has no *.safetensors")


TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
"""How names of files of ``torch.save`` end."""


def _places(path: Path) -> dict[str, Place]:
    """The tensors of a file."""
    from safetensors import SafetensorError, safe_open  # an extra

    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Place(path, torch.Size(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        convert = "read it with torch.load(..., weights_only=True) and write it with safetensors.torch.save_file"
        hint = f"; if torch.save wrote it, {convert}" if path.suffix in TORCH_FILES else ""
        raise ValueError(f"{path} is no safetensors file: {error}{hint}") from error


def _starts(file: Any) -> dict[str, int]:
    """Where each tensor of a file begins: after a length, of 8 bytes, and a header of that length."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
