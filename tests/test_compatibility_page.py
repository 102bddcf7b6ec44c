"""docs/compatibility.md is what the table says, and the table is what the tests test."""

import ast
from pathlib import Path

from tests.parity_table import PAGE, TABLE, markdown

FOLDER = Path(__file__).parent
OTHERS = {"page", "hybrids"}  # about the table, not in it


def written_tests():
    """`file::Class::test` of every test of the suite."""
    found = set()
    for path in FOLDER.glob("test_compatibility_*.py"):
        topic = path.stem.removeprefix("test_compatibility_")
        if topic in OTHERS:
            continue
        for node in ast.parse(path.read_text()).body:
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{topic}::{node.name}::" if isinstance(node, ast.ClassDef) else f"{topic}::"
            found |= {prefix + m.name for m in members if isinstance(m, ast.FunctionDef) and m.name.startswith("test_")}
    return found


def test_every_row_is_tested_and_every_test_stands_in_a_row():
    named = {test for rows in TABLE.values() for row in rows for test in row.tests}
    assert named == written_tests()
    assert all(row.tests for rows in TABLE.values() for row in rows)


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run python -m tests.parity_table"
