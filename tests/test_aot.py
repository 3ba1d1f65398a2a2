"""Every Triton kernel goes through the real compiler, in a process without TRITON_INTERPRET, inside its chip's shared memory."""

import json
import os
import re
import subprocess
import sys

import pytest

ROWS = re.compile(r"^(\w+) +sm_(\d+) (\w+) +D=(\d+) +Nq=(\d+) .* (\d+) regs +(\d+) spill +(\d+) shared *(.*)$", re.MULTILINE)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have: CUDA C++ programming guide, table of compute capabilities
KERNELS = {"forward", "partial", "merge", "delta", "few_queries", "dkdv", "dq", "dmask"}
MAP_KERNELS = {"map", "map_means", "map_rows"}

ONE_OF_EACH_REGIME = """
import json, torch
from smattn.kernels import aot
jobs = [aot.Job(90, torch.float16, 64, Nq, aot.FEATURES) for Nq in (13, 1045)]
rows = [row for job in jobs for row in aot.compile_job(job)]
larger = [row._replace(shared=2**20).failure() for row in rows]
spilling = [row._replace(job=row.job._replace(variant=aot.PLAIN), spill_bytes=8).failure() for row in rows]
print(json.dumps([(row.kernel, row.shared, row.registers, row.failure(), *fails) for row, *fails in zip(rows, larger, spilling)]))
"""


def without_interpreter(*command, **more):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_one_of_each_regime_compiles():
    result = without_interpreter("-c", ONE_OF_EACH_REGIME)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    kernels = {kernel for kernel, *_ in rows}
    assert {"forward", "partial", "merge", "delta"} < kernels and len(kernels) >= 7
    for kernel, shared, registers, failure, failure_if_larger, failure_if_spilling in rows:
        assert failure == "" and shared <= SHARED_MEMORY[90] and registers > 0, kernel
        assert "1048576 bytes of shared memory" in failure_if_larger and failure_if_spilling == "spills 8 bytes"  # the checks can fail


def test_it_refuses_to_run_under_the_interpreter():
    result = without_interpreter("-m", "smattn.kernels.aot", TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr


@pytest.mark.slow
def test_every_kernel_dtype_and_head_size_compiles():
    result = without_interpreter("-m", "smattn.kernels.aot")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [match.groups() for match in ROWS.finditer(result.stdout)]
    counted = int(re.search(r"^(\d+) kernels compiled for sm_80, sm_90, 0 failed$", result.stdout, re.MULTILINE)[1])
    assert len(rows) == counted
    over = [row for row in rows if int(row[7]) > SHARED_MEMORY[int(row[1])]]
    assert over == []
    compiled = {(kernel, arch, dtype, D) for kernel, arch, dtype, D, *_ in rows}
    for arch in ("80", "90"):
        for dtype in ("float16", "bfloat16", "float32"):
            for D in ("32", "48", "64", "128"):
                missing = {kernel for kernel in KERNELS if (kernel, arch, dtype, D) not in compiled}
                assert missing == set(), (arch, dtype, D)
            assert {kernel for kernel in MAP_KERNELS if (kernel, arch, dtype, "64") not in compiled} == set(), (arch, dtype)
