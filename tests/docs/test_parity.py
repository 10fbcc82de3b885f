"""The parity page names a test for each row; it must be there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "reference" / "parity.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
#: Tables whose rows say what the server does, and so need a test.
TESTED = [table for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE) if "our test" in table]


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_the_page_names_is_there(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_of(file)


def test_every_row_of_a_tested_table_names_a_test() -> None:
    assert len(TESTED) >= 7
    for table in TESTED:
        header, _, *rows = table.splitlines()
        for row in rows:
            # No cell of these tables contains a bar.
            assert row.count("|") == header.count("|"), row
            assert re.search(r"`[\w/]+\.py::test_\w+` \|$", row), row
