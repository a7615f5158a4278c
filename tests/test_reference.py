"""Every public name has a docstring, an example that runs, and an entry in the reference."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "reference").glob("*.rst"))
MODULES = (
    "dagpath",
    "dagpath.optim",
    "dagpath.solver",
    "dagpath.ops",
    "dagpath.study",
    "dagpath.study.figures",
    "dagpath.plots",
)
NEEDS = {"dagpath.integrations.huggingface": "transformers", "dagpath.integrations.lightning": "lightning"}
"""Modules that cannot be imported without a package that the tests do not need."""


@functools.cache
def entries() -> dict[str, dict[str, str]]:
    """Full name of what a page describes -> the options of its directive."""
    result: dict[str, dict[str, str]] = {}
    for page in PAGES:
        module, options, last = "dagpath", dict[str, str](), ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = match[1]
            elif match := re.match(r"\.\. (?:auto|py:)(?:function|class|exception|data):: ([\w.]+)", line):
                name = match[1] if match[1].startswith("dagpath.") else f"{module}.{match[1]}"
                assert name not in result, f"{name} has two entries"
                options = result[name] = {}
            elif match := re.match(r"   :([\w-]+):(.*)", line):
                last = match[1]
                options[last] = match[2]
            elif line.startswith("      ") and last in options:
                options[last] += line
            else:
                last = ""
    return result


def listed(names: str) -> set[str]:
    return {name.strip() for name in names.split(",") if name.strip()}


def public_names() -> list[str]:
    """What the modules call public, and what else the reference describes."""
    names = [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]
    return sorted({name for name in names if name not in MODULES} | entries().keys())


def found(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    return getattr(importlib.import_module(module), attribute)


def described_as(name: str) -> list[str]:
    """The entries of the reference that describe it, under whatever name."""
    value = found(name)
    others = (other for other in entries() if other.rpartition(".")[0] not in NEEDS)
    return [name] if name in entries() else [other for other in others if found(other) is value]


def is_code(value: object) -> bool:
    return inspect.isclass(value) or inspect.isfunction(value)


def docstring(name: str) -> str:
    """Its own docstring; of a value, the string behind its assignment."""
    value = found(name)
    if is_code(value):
        written: str = vars(value).get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or ""
        return "" if written.startswith(f"{value.__name__}(") else inspect.cleandoc(written)  # a dataclass's default
    for other in described_as(name):
        module, _, attribute = other.rpartition(".")
        for source in modules_of(module):
            body = ast.parse(Path(str(source.__file__)).read_text(encoding="utf-8")).body
            for statement, following in itertools.pairwise(body):
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                if any(isinstance(target, ast.Name) and target.id == attribute for target in targets):
                    text = getattr(following, "value", None)
                    if isinstance(text, ast.Constant) and isinstance(text.value, str):
                        return text.value
    return ""


def modules_of(name: str) -> list[ModuleType]:
    """A module, and those that it may have its values from."""
    module = importlib.import_module(name)
    sources = {getattr(value, "__module__", "") for value in vars(module).values()}
    return [module, *(importlib.import_module(source) for source in sources if str(source).startswith("dagpath."))]


def members(kind: type) -> Iterator[tuple[str, str]]:
    """The public methods and properties that a class defines itself, with their docstrings."""
    for name, value in vars(kind).items():
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, cached_property):
            value = value.func
        elif isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if not name.startswith("_") and inspect.isfunction(value):
            yield name, inspect.cleandoc(value.__doc__ or "")


def shown_members(name: str) -> Iterator[tuple[str, str]]:
    """Those that the reference shows."""
    options = entries().get(name, {})
    for member, text in members(found(name)):
        if member not in listed(options.get("exclude-members", "")):
            yield member, text


def examples() -> str:
    """The lines of all examples of the reference."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [
        docstring(name) for name in public_names() if name.rpartition(".")[0] not in NEEDS and is_code(found(name))
    ]
    return "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) .*", "\n".join(texts), re.MULTILINE))


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_an_entry_in_the_reference(name: str) -> None:
    assert described_as(name), f"no page of docs/reference describes {name}"


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_a_docstring(name: str) -> None:
    assert docstring(name), f"{name} has no docstring"


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_an_example(name: str) -> None:
    value = found(name)
    if is_code(value):
        texts = (
            [docstring(name), *(text for _, text in members(value))] if inspect.isclass(value) else [docstring(name)]
        )
        assert any(">>> " in text for text in texts), f"{name} has no example"
    else:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", examples()), f"no example of the reference has {name}"


@pytest.mark.parametrize("name", [name for name in public_names() if name in entries()])
def test_a_public_method_has_a_docstring_and_an_entry(name: str) -> None:
    value = found(name)
    if not inspect.isclass(value):
        return
    options = entries()[name]
    for member, text in shown_members(name):
        assert options.get("members", "none").strip() == "", f"the entry of {name} does not show {member}"
        assert text, f"{name}.{member} has no docstring"
    left = listed(options.get("exclude-members", ""))
    assert left <= {member for member, _ in members(value)}, f"the entry of {name} leaves out what there is not"


def parameters_of(value: Any) -> set[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(value).parameters.values()
    return {stars.get(parameter.kind, "") + parameter.name for parameter in found if parameter.name != "self"}


def arguments_in(text: str) -> set[str] | None:
    """The names in the section Args of a docstring; None without one."""
    match = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*)", text + "\n", re.MULTILINE)
    if match is None:
        return None
    heads = re.findall(r"^ {4}([\w*]+(?:, [\w*]+)*)(?: \([^)]*\))?:", match[1], re.MULTILINE)
    return {name for head in heads for name in listed(head)}


@pytest.mark.parametrize("name", [name for name in public_names() if name in entries()])
def test_args_name_every_parameter(name: str) -> None:
    value = found(name)
    if not is_code(value):
        return
    parts = [(name, value, docstring(name))]
    if inspect.isclass(value):
        parts += [(f"{name}.{member}", getattr(value, member), text) for member, text in shown_members(name)]
    for label, part, text in parts:
        named = arguments_in(text)
        if named is not None:
            assert named == parameters_of(part), f"the arguments of {label} and its docstring differ"


def test_the_index_has_a_line_for_every_function_and_class() -> None:
    index = next(page for page in PAGES if page.name == "index.rst").read_text(encoding="utf-8")
    tables = re.findall(r"\.\. autosummary::\n(?:   :.*\n)*\n((?:   \S+\n)+)", index)
    names = {f"dagpath.{line}" for table in tables for line in table.split()}
    assert names <= entries().keys()
    code = {name for name in entries() if name.rpartition(".")[0] in NEEDS or is_code(found(name))}
    assert code <= names
