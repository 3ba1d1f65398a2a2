"""The CUDA C++ kernels as nvcc compiles them for sm_80, run by the emulator of PTX: tests of their own, and the suite."""

import shutil

import pytest

from tests.support.other_rows import assert_passes_over

pytestmark = [
    pytest.mark.promise("compiled code"),
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here"),
]


ROW = "CUDA C++ compiled for sm_80, emulated"


def assert_as_compiled(*arguments):
    """Nothing may fail, be skipped or run on another backend."""
    assert_passes_over("compiled_cuda", f"0 skipped on cpu, where {ROW} must run", *arguments, TRITON_INTERPRET="0")


def test_on_compiled_kernels():
    assert_as_compiled("tests/gpu_emulator/test_cuda.py")


@pytest.mark.promise("exact", "dtypes", "any shape")
def test_the_suite_on_compiled_kernels():
    chosen = "all_five_gradients or gradient_through_lse or options or head_sizes or map_of_many_queries or weights_of_backward"
    assert_as_compiled("-k", chosen, "tests/promises/test_exact.py", "tests/promises/test_rounding.py")


@pytest.mark.promise("defined", "dropout")
def test_padding_and_dropout_on_compiled_kernels():
    chosen = "padded or without_keys or philox_words"
    assert_as_compiled("-k", chosen, "tests/promises/test_defined.py", "tests/promises/test_dropout.py")
