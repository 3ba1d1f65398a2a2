"""What contributors are told: pre-commit and `make lint` are the same checks, and the files that CONTRIBUTING.md names are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_pre_commit_runs_what_make_lint_runs():
    checks = re.search(r"^lint: (.*?)  ##", (ROOT / "Makefile").read_text(), re.M)[1].split()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^ +entry: make -o \.venv/smattn\.stamp (\S+)$", hooks, re.M) == checks
    assert re.findall(r"repo: (.*)", hooks) == ["local"] and hooks.count("language: system") == len(checks)  # works offline


def test_files_that_contributing_names_are_there():
    named = set(re.findall(r"`([\w./]+\.(?:py|cpp|h|cu|md|toml))`", (ROOT / "CONTRIBUTING.md").read_text()))
    folders = ("bench", "csrc", "docs", "examples", "kernels", "smattn", "tests")
    there = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    there += [f"/{path.name}" for path in ROOT.glob("*.*")]
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in there)}
    assert missing == {"kernels/map_weights.py"}  # which the walk-through adds
