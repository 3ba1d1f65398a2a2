"""The CUDA kernels on a machine without a GPU: built for the host, over csrc/cuda/emulator.h, and put in the place of the real ones.

As a pytest plugin (`pytest -p emulated_cuda`) it runs the suite over backend="cuda" alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch

from smattn import native_cuda

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-emulated"


@functools.cache
def build() -> Path:
    """The library that registers torch.ops.smattn_cuda_emulated; what changed since the last time is compiled."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [f"-DTORCH_ROOT={Path(torch.__file__).parent}", "-DSMATTN_CUDA=EMULATED", "-DCMAKE_BUILD_TYPE=None"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, *options],
        ["cmake", "--build", str(BUILD), "--target", "_cuda", "--parallel", str(os.cpu_count() or 1)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return BUILD / "csrc" / "cuda" / "_cuda.so"


@functools.cache
def machine() -> native_cuda.Machine:
    torch.ops.load_library(str(build()))
    return native_cuda.Machine("smattn_cuda_emulated", "cpu", tuple, lambda device: 0)


def pytest_configure() -> None:
    import expected

    native_cuda.machine = machine()
    expected.BACKENDS.clear()
    expected.BACKENDS["cuda"] = expected.Expected(expected.HALF_AND_SINGLE, attention_map=True, fused=True)
