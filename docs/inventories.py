"""The names of other projects that these pages link to.

Sphinx would fetch the whole inventories of these projects; the few names that are used stand in ``inventories.txt``, so
that the site builds without a network. A line is ``project role name page``; ``$`` at the end of a page stands for the
name.
"""

from __future__ import annotations

import zlib
from pathlib import Path

SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "numpy": "https://numpy.org/doc/stable/",
    "networkx": "https://networkx.org/documentation/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
}


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """Write one inventory file for each project; the value is what ``intersphinx_mapping`` is set to."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (Path(__file__).parent / "inventories.txt").read_text().splitlines()
    entries = [line.split() for line in lines if line and not line.startswith("#")]
    mapping = {}
    for project, site in SITES.items():
        rows = [f"{name} {role} 1 {page} -\n" for owner, role, name, page in entries if owner == project]
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        file = folder / f"{project}.inv"
        file.write_bytes(head.encode() + zlib.compress("".join(rows).encode()))
        mapping[project] = (site, str(file))
    return mapping
