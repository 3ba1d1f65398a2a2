"""What contributors are told: pre-commit and `make lint` are the same checks, and the files that CONTRIBUTING.md names are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_pre_commit_runs_what_make_lint_runs():
    checks = re.search(r"^lint: (.*?)  ##", (ROOT / "Makefile").read_text(), re.M)[1].split()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^ +entry: make -o \.venv/smattn\.stamp (\S+)$", hooks, re.M) == checks
    assert re.findall(r"repo: (.*)", hooks) == ["local"] and hooks.count("language: system") == len(checks)  # works offline


def test_files_that_contributing_names_are_there():
    named = re.findall(r"`([\w./]+/[\w.]*|[\w/]+\.(?:py|cpp|h|md|toml))`", (ROOT / "CONTRIBUTING.md").read_text())
    folders = [ROOT, ROOT / "smattn", ROOT / "smattn" / "testing", ROOT / "kernels", ROOT / "csrc", ROOT / "tests"]
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert missing == {"kernels/map_weights.py"}  # which the walk-through adds
