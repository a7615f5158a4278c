"""Sphinx settings."""

import dagpath

project = "dagpath"
author = "The dagpath authors"
copyright = "2026, The dagpath authors"  # noqa: A001 (the name Sphinx reads)
version = release = dagpath.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.doctest"]
exclude_patterns = ["_build", "*.inc"]
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "transformers", "accelerate"]
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Source", "notes_style")]


def _write_operations(app: object) -> None:
    """The table of operations, from the registry."""
    from pathlib import Path

    from dagpath.ops import Unknown, registered

    rules: dict[str, list[str]] = {}
    for name, rule in registered().items():
        if isinstance(rule, Unknown) and rule.known:
            text = f"Fixed: {rule.reason}."
        else:
            text = (type(rule).__doc__ or "").strip().splitlines()[0]
        rules.setdefault(text, []).append(f"``{name}``")
    rows = "".join(f"   * - {', '.join(names)}\n     - {text}\n" for text, names in sorted(rules.items()))
    table = ".. list-table::\n   :header-rows: 1\n   :widths: 50 50\n\n   * - Operations\n     - Rule\n" + rows
    Path(__file__).with_name("_operations_table.inc").write_text(table)


def setup(app: object) -> None:
    app.connect("builder-inited", _write_operations)  # type: ignore[attr-defined]


html_theme = "furo"
html_title = "dagpath"
