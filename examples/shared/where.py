"""Where rows of results come from. Training is chaotic: another processor rounds differently, and a run of the same seed ends elsewhere."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smattn.__main__ import processor

ROOT = Path(__file__).resolve().parents[2]


class Where(NamedTuple):
    machine: str
    commit: str  # with + where the code differs from it


def here() -> Where:
    """This machine, and this repository's commit; "unknown" outside a repository."""
    threads = torch.get_num_threads()
    machine = f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "smattn", "kernels", "csrc", "examples/*.py")
        return Where(machine, _git("rev-parse", "--short=10", "HEAD") + "+" * bool(changed))
    except (OSError, subprocess.CalledProcessError):
        return Where(machine, "unknown")


def note(rows: Iterable[Any]) -> str:
    """Lines for below a table of rows that have `machine` and `commit`: how many come from where."""
    counts = Counter(Where(row.machine, row.commit) for row in rows)
    lines = []
    for number, machine in enumerate(dict.fromkeys(where.machine for where in counts), 1):
        commits = ", ".join(f"{where.commit} ({count})" for where, count in counts.items() if where.machine == machine)
        lines.append(f"Machine {number}: {machine}; runs by commit: {commits}.")
    return "\n".join(lines)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
