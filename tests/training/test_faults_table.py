"""docs/faults.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions_of(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_all_25_faults_are_listed_each_with_a_test():
    faults = ROWS[1:]  # the first is the head of the table
    assert [row.split("|")[1].strip() for row in faults][:25] == [str(number) for number in range(1, 26)]
    assert [row for row in faults if not NAMED.search(row)] == []


def test_every_test_that_is_named_exists():
    named = [match for row in ROWS for match in NAMED.findall(row)]
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(file)] == []
