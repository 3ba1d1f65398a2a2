"""tests/README.md maps promises to tests: every test it names exists, and every test can fail."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
FILES = {path.name: path for path in HERE.rglob("test_*.py")}
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", (HERE / "README.md").read_text())
CHECKS = {"assert_within_budget", "assert_close", "assert_all_close", "assert_array_equal", "fail", "raises", "warns"}
PROMISES = [
    "exact", "gradcheck", "small", "repeatable", "defined", "only what is asked", "any shape", "dtypes", "composes", "refuses well",
]  # fmt: skip


def functions(file):
    tree = ast.parse(FILES[file].read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_named_in_the_readme_exists(file):
    assert {name for named, name in NAMED if named == file} <= set(functions(file))


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_has_a_row_with_tests(promise):
    rows = [line for line in (HERE / "README.md").read_text().splitlines() if line.startswith(f"| {promise}")]
    assert rows and all("`test_" in row for row in rows)


def checks(node):
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in CHECKS


@pytest.mark.parametrize("file", sorted(FILES))
def test_no_test_is_without_an_assertion(file):
    tests = {name: node for name, node in functions(file).items() if name.startswith("test_")}
    assert tests and [name for name, node in tests.items() if not any(map(checks, ast.walk(node)))] == []
