"""The CUDA kernels on a machine without a GPU: a build for the host over csrc/cuda/emulator that takes the place of the real one.

As a pytest plugin (`pytest -p tests.support.emulated_cuda`) it runs the suite over backend="cuda" only.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from smattn import cuda

ROOT = Path(__file__).resolve().parents[2]


def build(name: str, *options: str) -> Path:
    """Compiles what changed since the last time, one process at a time, and returns build/<name>/csrc/cuda/_cuda.so."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pip's cmake and ninja are there
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    options = (f"-DTORCH_ROOT={Path(torch.__file__).parent}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *options)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [str(shutil.which("cmake", path=path)), "-S", str(ROOT), "-B", str(folder), *generator, *options],
            [str(shutil.which("cmake", path=path)), "--build", str(folder), "--target", "_cuda", "--parallel", str(os.cpu_count() or 1)],
        ):
            result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
    return folder / "csrc" / "cuda" / "_cuda.so"


@functools.cache
def machine() -> cuda.Machine:
    torch.ops.load_library(str(build("cuda-emulated", "-DSMATTN_CUDA=EMULATED", "-DCMAKE_BUILD_TYPE=None")))
    return cuda.Machine("smattn_cuda_emulated", "cpu", tuple, lambda device: 0)


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """Inside the block no kernel runs. What remains of a call is what it allocates, so that it may have any size."""
    torch.ops.smattn_cuda_emulated.run_kernels(False)
    try:
        yield
    finally:
        torch.ops.smattn_cuda_emulated.run_kernels(True)


def pytest_configure() -> None:
    from tests.support import expected

    cuda.machine = machine()
    expected.BACKENDS.clear()
    expected.BACKENDS["cuda"] = expected.Expected(expected.HALF_AND_SINGLE, attention_map=True, fused=True)
