"""Settings of all tests, and the rule that every block of code in the documentation is run.

Each page (README.md and the like, and docs/**/*.rst) is run from top to bottom in one namespace and in a folder of its
own: examples with ``>>>``, blocks of Python, and blocks of ``console`` in which ``$ dagpath …`` is followed by what it
prints (``...`` stands for anything). Blocks of ``sh`` are not: they install things.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from sybil import Example, Sybil
from sybil.parsers import markdown, rest

from dagpath.cli import app as cli

import vision  # noqa: F401 (lets torchvision be imported beside a PyTorch without its compiled operators)

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", deadline=None, derandomize=False, print_blob=True, database=None)
settings.load_profile("default")

torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

collect_ignore = ["docs/_build", "docs/gallery"]

SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_console(example: Example) -> str | None:
    """Run the commands of a block, and compare what they print with what the page shows."""
    for block in ("\n" + example.parsed.replace("\\\n", " ")).split("\n$ ")[1:]:
        command, _, expected = block.partition("\n")
        found = printed(command)
        if not doctest.OutputChecker().check_output(expected.strip() + "\n", found.strip() + "\n", SAME):
            return f"{command}\nshould print\n{expected}\nand printed\n{found}"
    return None


def printed(command: str) -> str:
    """What a command prints; ``dagpath`` runs in this process, everything else in a shell."""
    name, *arguments = shlex.split(command, comments=True)
    if name != "dagpath":
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
        return done.stdout + (done.stderr if done.returncode else "")
    out, errors = io.StringIO(), io.StringIO()
    failed = False
    with (
        mock.patch.object(sys, "argv", [name, *arguments]),
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            failed = bool(stop.code)
    return out.getvalue() + (errors.getvalue() if failed else "")


def enter_folder(namespace: dict[str, Any]) -> None:
    namespace["__folder__"], namespace["__before__"] = tempfile.TemporaryDirectory(), Path.cwd()
    os.chdir(namespace["__folder__"].name)


def leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["__before__"])
    namespace["__folder__"].cleanup()


def pages(parsers: Any, *patterns: str) -> Sybil:
    blocks = [
        parsers.PythonCodeBlockParser(),
        parsers.CodeBlockParser(language="console", evaluator=run_console),
        parsers.SkipParser(),
    ]
    if parsers is rest:
        blocks.append(rest.DocTestParser(SAME))
    return Sybil(blocks, patterns=patterns, setup=enter_folder, teardown=leave_folder)


pytest_collect_file = (
    pages(rest, "docs/*.rst", "docs/**/*.rst") + pages(markdown, "README.md", "CONTRIBUTING.md")
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what pytest's own plugin finds in pages that are named on the command line."""
    items[:] = [item for item in items if type(item.parent).__name__ != "DoctestTextfile"]


def pytest_runtest_teardown() -> None:
    """Close the pictures that a test drew."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
