"""The questions to a GPU, with its answers made up."""

import pytest

from bench.gpu import questions
from bench.gpu.tune import present

pytestmark = [pytest.mark.promise("benchmarks"), pytest.mark.usefixtures("table")]
ARCH = 90


@pytest.mark.parametrize("question", questions.QUESTIONS, ids=lambda question: question.text)
def test_each_asks_for_another_tile_than_the_present_one(question):
    assert question.other != present(question.cell, ARCH)


@pytest.mark.parametrize("faster, right, kept", [(0.5, True, "32x64 w8 s2"), (0.5, False, "32x64 w4 s1"), (1.0, True, "32x64 w4 s1")])
def test_the_faster_tile_is_to_be_kept_if_it_is_right(faster, right, kept):
    question = next(question for question in questions.QUESTIONS if question.cell.kernel == "dkdv" and question.cell.head == 128)
    now = present(question.cell, ARCH)

    def times(cell, arch, asked, device, seconds):
        return {tile: 1.0 if tile == now else faster for tile in asked}

    line = questions.answer(question, ARCH, times, lambda *_: right)
    assert line.endswith(f"Keep {kept}") and "1.0000 ms" in line
    assert present(question.cell, ARCH) == now


def test_nothing_changes_where_no_tile_runs():
    question = questions.QUESTIONS[0]
    assert "neither ran" in questions.answer(question, ARCH, lambda *_: {}, lambda *_: True)
