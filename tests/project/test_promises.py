"""Every promise has a test that is marked with it, and every test can fail."""

import ast

import pytest

from tests.support.promises import FILES, TESTS, held, marked, promises, table

CONTRACT = {
    "exact", "gradcheck", "small", "repeatable", "defined", "only what is asked", "any shape", "dtypes", "composes", "refuses well",
}  # fmt: skip


def test_the_promises_of_the_contract_are_in_the_table():
    assert CONTRACT <= set(promises())


@pytest.mark.parametrize("promise", promises())
def test_every_promise_has_a_test_that_is_marked_with_it(promise):
    assert held().get(promise)


def test_every_mark_is_the_name_of_a_promise():
    assert set(held()) <= set(promises())


def test_the_table_has_a_line_for_every_mark():
    lines = table().splitlines()
    assert [line for line in lines if "::" not in line and line] == [f"{name}: {said}" for name, said in promises().items()]
    assert sum("::" in line for line in lines) == sum(map(len, held().values()))


def can_fail(node):
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name.startswith("assert_") or name in ("fail", "raises", "warns")


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_is_without_an_assertion(file):
    tests = [node for node, _ in marked(file)]
    assert tests and [node.name for node in tests if not any(map(can_fail, ast.walk(node)))] == []
