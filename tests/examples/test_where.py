"""Rows of the examples' studies say where they come from."""

from __future__ import annotations

import subprocess

import pytest
import torch

from examples.shared import where
from examples.shared.where import Where
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
