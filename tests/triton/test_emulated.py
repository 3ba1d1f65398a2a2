"""Compiled kernels on emulated chips: the tests of tests/gpu_emulator and the suite, in processes that compile and do not interpret."""

import pytest

from tests.support.other_rows import assert_passes_over

pytestmark = pytest.mark.promise("compiled code")
NONE_SKIPPED = "0 skipped on cpu, where triton compiled for sm_80, emulated, triton compiled for sm_90, emulated must run"


def assert_on_emulated_chips(*arguments):
    """Nothing may fail, be skipped or run on another backend."""
    assert_passes_over("emulated_triton", NONE_SKIPPED, *arguments, TRITON_INTERPRET="0")


def test_on_emulated_chips():
    assert_on_emulated_chips("-m", "not slow", "tests/gpu_emulator")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["units", "sums", "calls", "mutations", "counters"])
def test_more_on_emulated_chips(name):
    assert_on_emulated_chips("-m", "slow", f"tests/gpu_emulator/test_{name}.py")


@pytest.mark.promise("exact", "dtypes")
@pytest.mark.slow
def test_the_suite_on_emulated_chips():
    """What of the suite takes `backend` and `dtype` and needs few compilations."""
    chosen = "all_five_gradients or gradient_through_lse or map_of_many_queries or weights_of_backward or nan_score_far_below"
    assert_on_emulated_chips("-k", chosen, "tests/promises/test_exact.py", "tests/promises/test_rounding.py")
