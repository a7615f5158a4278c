"""Sphinx settings."""

import dagpath

project = "dagpath"
author = "The dagpath authors"
copyright = "2026, The dagpath authors"  # noqa: A001 (the name Sphinx reads)
version = release = dagpath.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.doctest"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Source", "notes_style")]

html_theme = "furo"
html_title = "dagpath"
