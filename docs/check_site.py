"""Check a built site: every internal link leads somewhere, and every public name has its entry.

python docs/check_site.py docs/_build/html
"""

from __future__ import annotations

import importlib
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util.inventory import InventoryFile

MODULES = ("dagpath", "dagpath.optim", "dagpath.solver", "dagpath.ops", "dagpath.study")


class Page(HTMLParser):
    """The links of a page, and the anchors in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for value in (found.get("id"), found.get("name")) if value}
        self.links |= {value for value in (found.get("href"), found.get("src")) if value}


def broken_links(site: Path) -> list[str]:
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target.exists() and not target.is_dir()
            anchor = unquote(parts.fragment)
            if not known or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


def missing_names(site: Path) -> list[str]:
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    entries = {name for role, names in inventory.items() if role.startswith("py:") for name in names}
    named = (f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__)
    short = {entry.rpartition(".")[2] for entry in entries}
    return [name for name in named if name not in entries and name.rpartition(".")[2] not in short]


def main() -> None:
    site = Path(sys.argv[1])
    failures = [f"broken link: {text}" for text in broken_links(site)]
    failures += [f"no entry: {name}" for name in missing_names(site)]
    print("\n".join(failures) or "every internal link leads somewhere, and every public name has its entry")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
