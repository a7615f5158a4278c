"""Files that are written as a whole, or not at all, and what may be read as a file."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(out: str | os.PathLike[str], folder: bool = False) -> Iterator[Path]:
    """A path to write to, beside ``out``; it takes the place of ``out`` when the block ends, and vanishes if it raises.

    What kills the process leaves it behind, under a name that ends in ``.partial``, and ``out`` as it was.

    Args:
        out: a file, which may exist, or a folder, which may not. What a link leads to is replaced, not the link.
        folder: is it a folder?
    """
    given, out = out, Path(os.path.realpath(out))
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}")
    if out.is_symlink():
        raise OSError(f"{given} is a link that leads back to itself: name another file")
    if not folder and out.exists() and not out.is_file():
        raise FileExistsError(f"{given} is no regular file: name a file on a disk")
    with tempfile.TemporaryDirectory(prefix=".dagpath.", suffix=".partial", dir=out.parent) as made:
        target = Path(made, "whole")
        if folder:
            target.mkdir()
        yield target
        for path in [*target.iterdir(), target] if folder else [target]:
            _sync(path)  # before the name says that it is there
        if not folder and out.is_file():
            shutil.copymode(out, target)
        target.replace(out)
        _sync(out.parent)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless there is a file that may be read: to open a pipe would wait, and a device has no end."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise OSError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is no regular file (a pipe, a socket or a device): name a file on a disk")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read: its permissions do not allow it")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
