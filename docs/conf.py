"""Sphinx settings."""

# ruff: noqa: E402 (the folders of what is imported are added first)

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks"), str(HERE.parent / "examples")]

import torch
from docutils import nodes
from sphinx.addnodes import desc_signature
from sphinx_gallery.sorting import ExplicitOrder

import dagpath

import vision
from inventories import write_inventories
from tables import write_tables

project = "dagpath"
author = "The dagpath authors"
copyright = "2026, The dagpath authors"  # noqa: A001 (the name Sphinx reads)
version = release = dagpath.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "*.inc", "sg_execution_times.rst", "gallery/sg_execution_times.rst"]

autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "transformers", "accelerate"]
autodoc_typehints = "signature"
autosummary_generate = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Source", "notes_style")]

nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(lightning|transformers)\..*"),  # which are not installed here
    ("py:class", r"dagpath\.passes\.structure\..*"),  # which is no part of the public interface
]

intersphinx_mapping = write_inventories(HERE / "_build" / "inventories")

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"
copybutton_exclude = ".linenos, .gp, .go"

GALLERY = [
    "rescale_resnet.py",
    "int8_ranges.py",
    "rebalancing.py",
    "predict_balance.py",
    "gram_spectrum.py",
    "solver_gap.py",
    "path_lengths.py",
    "heavy_layers.py",
    "pruning_distance.py",
    "same_learning.py",
    "conserved_quantities.py",
    "own_operation.py",
]
"""Its pages in their order: rescaling first, then what balancing does, then paths, then what no rescaling changes."""

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "within_subsection_order": ExplicitOrder(GALLERY),
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"^resnet\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 1e9,  # how long an example took on the machine that built this page says little
    "remove_config_comments": True,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "reference_url": {"dagpath": None},
    "doc_module": ("dagpath",),
    "backreferences_dir": None,
    "image_scrapers": ("matplotlib",),
    "image_srcset": ["2x"],
    "capture_repr": (),
    "default_thumb_file": None,
    "nested_sections": False,
}


def add_anchors(app: object, page: nodes.document) -> None:
    """Let pages of source lead back to ``dagpath.graph.Site`` as to ``dagpath.Site``.

    They know one public module for each file, here that of ``dagpath.NeuronGraph``.
    """
    known = {name for signature in page.findall(desc_signature) for name in signature["ids"]}
    for signature in page.findall(desc_signature):
        name = f"dagpath.{signature.get('fullname')}"
        if signature["ids"] and name not in known:
            signature["ids"].append(name)
            known.add(name)


def write_report(folder: Path) -> None:
    """The report page that a page shows."""
    torch.manual_seed(0)
    page = dagpath.html_report(dagpath.trace(vision.models.resnet18().eval(), torch.zeros(1, 3, 224, 224)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page, encoding="utf-8")


def setup(app: object) -> None:
    write_report(HERE / "_build" / "extra")
    app.connect("builder-inited", lambda app: write_tables())  # type: ignore[attr-defined]
    app.connect("doctree-read", add_anchors)  # type: ignore[attr-defined]


html_theme = "furo"
html_title = "dagpath"
html_static_path = ["static"]
html_extra_path = ["_build/extra"]
html_css_files = ["site.css"]

plot_basedir = str(HERE / "pictures")
plot_working_directory = str(HERE.parent)
plot_formats = [("png", 110)]
plot_html_show_formats = plot_html_show_source_link = False
plot_rcparams = {"font.size": 9}
plot_apply_rcparams = True
plot_pre_code = """
import sys
sys.path[:0] = ["docs", "docs/pictures"]
from dagpath.study import figures
from tables import SAME_FUNCTION, drawn, runs
"""
