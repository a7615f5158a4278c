"""The pages of the gallery, as they stand; the build of the documentation runs them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PAGES = sorted(path for path in (HERE / "examples").glob("*.py") if path.name != "resnet.py")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(params=PAGES, ids=[path.stem for path in PAGES])
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_example_has_its_place_in_the_gallery():
    block = re.search(r"^GALLERY = (\[.*?^\])", text_of(HERE / "docs" / "conf.py"), re.DOTALL | re.MULTILINE)
    assert sorted(ast.literal_eval(block[1])) == [path.name for path in PAGES]


def test_an_example_asks_one_question(page):
    _, title, rule, *_ = ast.parse(text_of(page)).body[0].value.value.split("\n")
    assert title.endswith("?")
    assert title.count("?") == 1
    assert rule == "=" * len(title)


def test_an_example_ends_with_a_picture_and_an_answer(page):
    text = text_of(page)
    assert text.count("plt.show()") == 1
    assert re.search(r"^# \*\*[^*]+\*\*", text, re.MULTILINE), "the answer stands in bold"


def test_an_example_imports_public_names_alone(page):
    public = {"dagpath", "dagpath.ops", "dagpath.optim", "dagpath.plots", "dagpath.study"}
    found = set()
    for node in ast.walk(ast.parse(text_of(page))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert {name for name in found if name.split(".")[0] == "dagpath"} <= public
