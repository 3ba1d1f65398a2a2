"""Tests over other backends than this process has: pytest in a process of its own, where a plugin puts other rows in their places."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def assert_passes_over(plugin: str, said: str, *arguments: str, **environment: str) -> None:
    """Asserts that tests run and pass, and that the run's last words are on these rows: "0 skipped on cpu, where ... must run"."""
    # The root comes last, behind the installed package: `python -m pytest` would find the source, and a bare `kernels`.
    code = f"import sys; sys.path.append({str(ROOT)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-p", f"tests.support.{plugin}", "-q", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert said in result.stdout and re.search(r"\d+ passed", result.stdout), result.stdout[-2000:]
