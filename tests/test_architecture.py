"""The table of layers in CONTRIBUTING.md is that of the files: each imports from its own row and those below."""

import ast
import re
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dagpath"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The modules of dagpath that a file imports when it is imported itself."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in inside}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return {name for name in found if name.split(".")[0] == "dagpath"}


IMPORTS = {name: imports(path) for name, path in FILES.items()}


def entry(module: str) -> str:
    """What stands for a module in the table: a file, or the folder that it is in."""
    first = FILES[module].relative_to(PACKAGE).parts[0]
    return first if first.endswith(".py") else first + "/"


def rows() -> list[list[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("## How the house is laid out")[1].split("\n## ")[0]
    found = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert len(found) > 5
    return found


def test_the_table_names_every_file_of_the_package_once():
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()} - {"__pycache__/"}
    named = [name for row in rows() for name in row]
    assert sorted(named) == sorted(there)


def test_each_row_imports_from_itself_and_the_rows_below():
    height = {name: -number for number, row in enumerate(rows()) for name in row}
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if height[entry(other)] > height[entry(module)]
    ]
    assert wrong == []


def test_no_imports_go_in_a_circle():
    files = nx.DiGraph((module, other) for module, others in IMPORTS.items() for other in others)
    assert files.number_of_edges() > 100
    assert list(nx.simple_cycles(files)) == []
    entries = nx.DiGraph((entry(a), entry(b)) for a, b in files.edges if entry(a) != entry(b))
    assert list(nx.simple_cycles(entries)) == []


def test_the_solver_knows_nothing_of_dagpath():
    used = {entry(other) for module, others in IMPORTS.items() if entry(module) == "solver/" for other in others}
    assert used <= {"solver/", "errors.py"}
