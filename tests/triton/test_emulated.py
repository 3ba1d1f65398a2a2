"""Compiled kernels on emulated chips: the tests of tests/gpu_emulator and the suite, in processes that compile and do not interpret."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise("compiled code")
ROOT = Path(__file__).resolve().parents[2]


def on_emulated_chips(*arguments):
    """The run's output. Nothing may fail, be skipped or run on another backend."""
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # `python -m pytest` would find a bare `kernels`
    command = [sys.executable, "-c", code, "-p", "tests.support.emulated_triton", "-q", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "0 skipped on cpu, where triton compiled for sm_80, emulated, triton compiled for sm_90, emulated must run" in result.stdout
    return result.stdout


def test_on_emulated_chips():
    assert re.search(r"\d+ passed", on_emulated_chips("-m", "not slow", "tests/gpu_emulator"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["units", "sums", "calls", "mutations", "counters"])
def test_more_on_emulated_chips(name):
    assert re.search(r"\d+ passed", on_emulated_chips("-m", "slow", f"tests/gpu_emulator/test_{name}.py"))


@pytest.mark.promise("exact", "dtypes")
@pytest.mark.slow
def test_the_suite_on_emulated_chips():
    """What of the suite takes `backend` and `dtype` and needs few compilations."""
    chosen = "all_five_gradients or gradient_through_lse or map_of_many_queries"
    assert re.search(r"\d+ passed", on_emulated_chips("-k", chosen, "tests/promises/test_exact.py"))
