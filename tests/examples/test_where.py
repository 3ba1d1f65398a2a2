"""Rows of the examples' studies say where they come from."""

from __future__ import annotations

import subprocess

import pytest
import torch

from examples.shared import where
from examples.shared.where import Where
from examples.vos import study
from smattn.__main__ import processor

pytestmark = pytest.mark.promise("examples")


def test_the_commit_has_a_plus_where_the_code_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(where, "ROOT", tmp_path)
    code = tmp_path / "examples" / "one.py"
    code.parent.mkdir()
    code.write_text("a = 1\n")
    assert where.here().commit == "unknown", "there is no repository"
    assert where.here().machine == f"{processor()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    for command in (["init"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    commit = where.here().commit
    assert len(commit) == 10
    (tmp_path / "rows.csv").write_text("results are no code")
    assert where.here().commit == commit
    code.write_text("a = 2\n")
    assert where.here().commit == f"{commit}+"


def test_a_note_counts_the_runs_of_every_commit_by_machine():
    rows = [Where("one", "abc"), Where("two", "abc"), Where("one", "abc"), Where("one", "def")]
    lines = where.note(rows).splitlines()
    assert lines == ["Machine 1: one; runs by commit: abc (2), def (1).", "Machine 2: two; runs by commit: abc (1)."]


def test_differences_of_a_study_are_of_runs_that_are_not_paired():
    """soft, 1 2 3, is 2 ahead of hard, 0 0 0, with a standard error of sqrt(1 / 3); where there is one run there is no error."""
    there = Where("one", "abc")
    runs = {"soft": (1.0, 2.0, 3.0), "hard": (0.0, 0.0, 0.0), "copy": (1.0,)}
    scored = [(name, seed, JF) for name, of_seeds in runs.items() for seed, JF in enumerate(of_seeds)]
    rows = [study.Row(name, seed, 9, frame, JF, 0.0, 0.0, *there) for name, seed, JF in scored for frame in (-1, 1)]
    rows += [study.Row("hard", seed, 9, -1, 5.0, 0.0, 0.0, "two", "abc") for seed in range(2)]
    assert study.differences(rows).splitlines()[2:] == ["| hard | 1 | +2.0 ± 0.6 | 3, 3 |"]
