"""The CUDA kernels on an emulated device: small problems, through the source that nvcc compiles, stay inside the error budget."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from smattn import cuda, reference
from smattn.call import Needs
from smattn.testing import assert_within_budget, make_case, run
from tests.support import emulated_cuda
from tests.support.emulated_cuda import kernels_left_out
from tests.support.meters import peak_allocated, size
from tests.support.odd_weights import leading_keys_out_of_range, many_weights_below_float16
from tests.support.other_rows import assert_passes_over
from tests.support.zero_calls import CALLS, LAYOUTS, ZeroCall, calls

pytestmark = [pytest.mark.promise("CUDA kernels"), pytest.mark.slow]  # compiling takes a minute first
ROOT = Path(__file__).resolve().parents[2]
HALF_AND_SINGLE = [torch.float16, torch.bfloat16, torch.float32]
HEADS = [1, 32, 33, 48, 64, 96, 128, 200, 256]
OPTIONS = {
    "plain": {},
    "no mask": dict(mask=None),
    "everything": dict(dropout_p=0.3, padded=0.3, with_lse=True, Hkv=1, mask_dtype=torch.bfloat16),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(cuda, "machine", emulated_cuda.machine())


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("D", HEADS)
@pytest.mark.parametrize("Nq", [5, 37])
def test_head_sizes_in_every_dtype(dtype, D, Nq):
    case = make_case(1, 2, Nq, 70, D, Dv=257 - D if D > 128 else D, dtype=dtype, with_lse=True)
    assert_within_budget(run(case, "cuda"), case)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("Nq", [13, 70, 150])
@pytest.mark.parametrize("option", OPTIONS)
def test_both_regimes(dtype, Nq, option):
    """Few queries, where dM is a by-product of dK and dV, and many, with tiles that the ends cut."""
    case = make_case(2, 4, Nq, 101, 24, dtype=dtype, **OPTIONS[option])
    assert_within_budget(run(case, "cuda"), case)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("Nq", [3, 40])
def test_keys_in_several_ranges(dtype, Nq):
    """There are enough keys for forward and dQ to share them out among blocks and merge the parts."""
    case = make_case(1, 2, Nq, 1100, 16, dtype=dtype, padded=0.5, with_lse=True, dropout_p=0.1)
    assert_within_budget(run(case, "cuda"), case)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 1), (1, 1, 150), (2, 1, 150), (1, 4, 150), (2, 4, 150)], ids=str)
def test_every_broadcast_of_the_mask(shape):
    for Nq in (20, 150):
        case = make_case(2, 4, Nq, 70, 8, Hkv=2, mask_shape=(*shape[:2], min(shape[2], Nq), 70), dtype=torch.bfloat16)
        assert_within_budget(run(case, "cuda"), case)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("D", [32, 128])
@pytest.mark.parametrize("padded", [0.0, 0.4])
def test_attention_map(dtype, D, padded):
    for Nq in (7, 140):
        case = make_case(2, 4, Nq, 75, D, Hkv=2, dtype=dtype, as_map=True, padded=padded)
        assert_within_budget(run(case, "cuda"), case)


@pytest.mark.parametrize("D", [16, 128, 256])
@pytest.mark.parametrize("needed", ["query", "key", "value", "mask", "alpha"])
def test_only_what_is_asked_and_it_is_the_same(D, needed):
    case = make_case(1, 2, 20, 70, D, dtype=torch.float16)
    alone, all_five = run(case, "cuda", needs=[needed]), run(case, "cuda")
    assert set(alone) == {"out", f"d{needed}"}
    torch.testing.assert_close(alone[f"d{needed}"], all_five[f"d{needed}"], rtol=1e-5, atol=1e-5)


def tf32(x):
    """x rounded to the 10 bits of mantissa that TF32 has, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def with_tf32(case, allow_tf32):
    call = case.call()
    return call._replace(problem=call.problem._replace(allow_tf32=allow_tf32))


def test_tf32_is_used_where_allowed_and_only_there():
    case = make_case(1, 2, 20, 70, 64)
    rounded = replace(case, query=tf32(case.query), key=tf32(case.key), value=tf32(case.value))

    def lse(case, allow_tf32):
        return cuda.forward(with_tf32(case, allow_tf32), save_out=False, save_mbar=False)[1].lse

    exact = reference.softmax(case.call()).lse
    torch.testing.assert_close(lse(case, False), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse(case, True), lse(rounded, False), rtol=1e-6, atol=1e-6)
    assert (lse(case, True) - exact).abs().max() > 1e-5


def test_a_sum_over_tf32_products_is_within_their_rounding():
    case = make_case(2, 2, 40, 90, 64)
    call, needs = with_tf32(case, True), Needs(True, True, True, True, True)
    _, saved = cuda.forward(call, save_out=True, save_mbar=True)
    grads = cuda.backward(call, saved, case.dout, None, needs)
    expected = reference.backward(call, saved, case.dout, None, needs)
    for got, exact in zip(grads[:5], expected[:5], strict=True):
        assert (got - exact).norm() <= 2e-3 * exact.norm()


def test_bits_do_not_depend_on_what_else_is_in_memory():
    """Uninitialised results and scratch hold what other calls left, and none of it may show."""
    case = make_case(2, 2, 20, 300, 24, dtype=torch.bfloat16, with_lse=True, padded=0.2)
    first = run(case, "cuda")
    run(make_case(2, 2, 20, 300, 24, dtype=torch.bfloat16, rng=7), "cuda")
    again = run(case, "cuda")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_error_of_a_launch_names_the_call():
    wide = torch.zeros(1, 2, 3, 300)
    options = (None, False, None, None, None, 1.0, 0.0, False, 0)
    out, lse, normalizer = torch.empty_like(wide), torch.empty(1, 2, 3), torch.empty(1, 2, 3, 2)
    with pytest.raises(RuntimeError, match=r"head size above 256; query \(1, 2, 3, 300\), key \(1, 2, 3, 300\)"):
        torch.ops.smattn_cuda_emulated.forward(wide, wide, wide, *options, out, lse, None, None, normalizer)


def extra(call):
    """(peak - results, ceiling) of all that a call allocates, scratch and what backward needs included."""
    case = call.case()
    with kernels_left_out():
        peak, results = peak_allocated(lambda: run(case, "cuda", call.needs))
    return peak - size(results), call.ceiling(results)


NEEDS = ("query", "key", "value", "mask_logits", "alpha")
LOGITS = ZeroCall(4, 32, 2, 262144, 16, dtype="float16", Hkv=1, mask=(True, True, False), logits=True, needs=NEEDS)


@pytest.mark.parametrize("call", [*CALLS.values(), LOGITS], ids=[*CALLS, "logits of keys and heads"])
def test_extra_memory_is_under_the_ceiling(call):
    allocated, ceiling = extra(call)
    assert 0 < allocated <= ceiling, f"{allocated / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}"


def test_no_shape_makes_it_allocate_more():
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(calls())
    def under_the_ceiling(call):
        allocated, ceiling = extra(call)
        assert allocated <= ceiling, f"{allocated / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}: {call}"

    under_the_ceiling()
    assert extra(CALLS["half"])[0] > 0  # the meter runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_not_copied_whatever_its_strides(layout):
    for Nq in (13, 1024):
        call = ZeroCall(2, 1, Nq, 2**25 // Nq, 4, dtype="float16", needs=("query", "alpha"), layout=layout)
        assert extra(call)[0] < 0.5 * 2 * Nq * call.Nk * 2


SUITE = [
    ("exact", "one_product"),
    ("defined", "rounding", "dead_rows", "dropout", "repeatable", "any_shape", "batch_axes"),
    ("ops", "dtypes", "compose", "second_derivatives", "mask_logits"),
]


@pytest.mark.parametrize("names", SUITE, ids="-".join)
def test_the_suite_over_the_emulated_device(names):
    files = [str(next((ROOT / "tests").rglob(f"test_{name}.py"))) for name in names]
    assert_passes_over("emulated_cuda", "where cuda must run", "-m", "not slow", *files)


@pytest.mark.parametrize("Nq", [5, 70])
@pytest.mark.parametrize("as_map", [False, True], ids=["attention", "map"])
def test_leading_keys_whose_sum_of_m_is_out_of_range(as_map, Nq):
    case = leading_keys_out_of_range(Nq, as_map=as_map)
    results = run(case, "cuda")
    assert results["dalpha"].isfinite().all()
    assert_within_budget(results, case)


@pytest.mark.parametrize("Nq", [5, 70])
def test_weights_that_are_small_for_float16_count(Nq):
    case = many_weights_below_float16(Nq)
    results = run(case, "cuda")
    assert (results["out"] > 0.1).all()
    assert_within_budget(results, case)
