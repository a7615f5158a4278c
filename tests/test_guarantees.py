"""The page of guarantees names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "project" / "guarantees.rst").read_text()


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"``(test_\w+\.py)(?:::(\w+))?``", PAGE)
    assert len(named) > 15
    for file, function in named:
        text = (TESTS / file).read_text()
        assert not function or f"\ndef {function}(" in text, f"{file}::{function}"


def test_every_promise_has_its_test():
    promises = re.split(r"\n- ", PAGE)[1:]
    assert len(promises) > 15
    assert all("*Proof*: " in promise and "``test_" in promise for promise in promises)
