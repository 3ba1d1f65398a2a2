"""Triton's kernels as compiled code on a machine without a GPU: rows that take the places of the backends.

As a pytest plugin (`TRITON_INTERPRET=0 pytest -p tests.support.emulated_triton`) it runs the suite over the emulated chips only.
"""

from __future__ import annotations

from tests.gpu_emulator import backend

ROWS = backend.install(*backend.CHIPS)


def pytest_configure() -> None:
    from tests.support import expected

    expected.BACKENDS.clear()
    for arch in backend.CHIPS:
        expected.BACKENDS[backend.name_of(arch)] = expected.Expected(expected.HALF_AND_SINGLE, attention_map=True, fused=True)
