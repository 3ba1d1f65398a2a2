"""Which tests hold which promise.

The promises are the rows of the table in tests/README.md. A test, or a whole file by its `pytestmark`, names the promises that it holds:
@pytest.mark.promise("exact"). Both are read from the source, so that no test has to be imported to know them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))


def promises() -> dict[str, str]:
    """The name of each promise and what it says, in the order of the table."""
    return dict(re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", (TESTS / "README.md").read_text(), re.M))


def marked(file: Path) -> Iterator[tuple[ast.FunctionDef, list[str]]]:
    """Each test of a file, and the names of the promises that it is marked with."""
    module = ast.parse(file.read_text())
    of_the_file = [name for node in module.body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "pytestmark"
                   for name in named(node.value)]  # fmt: skip
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node, of_the_file + [name for decorator in node.decorator_list for name in named(decorator)]


def named(marks: ast.expr) -> Iterator[str]:
    for node in ast.walk(marks):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
            yield from map(ast.literal_eval, node.args)


def held() -> dict[str, list[str]]:
    """The tests, as file::name, that are marked with each name, whether or not it is the name of a promise."""
    tests: dict[str, list[str]] = {}
    for file in FILES:
        for node, names in marked(file):
            for name in names:
                tests.setdefault(name, []).append(f"{file.relative_to(TESTS)}::{node.name}")
    return tests


def table() -> str:
    tests = held()
    rows = [f"{name}: {said}\n" + "".join(f"    {test}\n" for test in tests.get(name, [])) for name, said in promises().items()]
    return "\n".join(rows)
