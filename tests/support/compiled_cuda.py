"""The CUDA C++ kernels as nvcc compiles them, on a machine without a GPU: a row that takes the places of the backends.

As a pytest plugin (`pytest -p tests.support.compiled_cuda`) it runs the suite over that row only.
"""

from __future__ import annotations

from tests.gpu_emulator import cuda_backend

ROW = cuda_backend.install()


def pytest_configure() -> None:
    from tests.support import expected

    expected.BACKENDS.clear()
    expected.BACKENDS[cuda_backend.NAME] = expected.Expected(expected.HALF_AND_SINGLE, attention_map=True, fused=True)
