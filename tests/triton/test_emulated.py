"""Compiled kernels on emulated chips: the tests of tests/gpu_emulator and the suite, in processes that compile and do not interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise("compiled code")
ROOT = Path(__file__).resolve().parents[2]


def on_emulated_chips(*arguments):
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # `python -m pytest` would find a bare `kernels`
    command = [sys.executable, "-c", code, "-p", "tests.support.emulated_triton", "-q", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["units", "sums"])
def test_on_emulated_chips(name):
    result = on_emulated_chips("-m", "not slow", f"tests/gpu_emulator/test_{name}.py")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "emulated must run" in result.stdout  # and no other
