"""Sphinx settings."""

import sys
from pathlib import Path

import dagpath

sys.path.insert(0, str(Path(__file__).parent))

from tables import write_tables

project = "dagpath"
author = "The dagpath authors"
copyright = "2026, The dagpath authors"  # noqa: A001 (the name Sphinx reads)
version = release = dagpath.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.doctest",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build", "*.inc"]
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "transformers", "accelerate"]
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Source", "notes_style")]


def setup(app: object) -> None:
    app.connect("builder-inited", lambda app: write_tables())  # type: ignore[attr-defined]


html_theme = "furo"
html_title = "dagpath"

plot_working_directory = str(Path(__file__).parents[1])
plot_formats = [("png", 110)]
plot_html_show_formats = plot_html_show_source_link = False
plot_rcparams = {"font.size": 9}
plot_apply_rcparams = True
plot_pre_code = """
import sys
sys.path.insert(0, "docs")
from dagpath.study import figures
from tables import SAME_FUNCTION, drawn, runs
"""
