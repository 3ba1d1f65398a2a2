"""Small: on the fused backends extra memory <= 0.25 * (inputs + outputs + gradients) + 16 MiB, and no mask is copied."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from smattn.call import Problem
from smattn.memory import bytes_kept, queries_with_remainder, share_kept
from smattn.testing import run
from tests.support.expected import BACKENDS, DEVICE
from tests.support.meters import extra_of_launchers, extra_on_cuda, extra_resident, peak_allocated, size
from tests.support.zero_calls import CALLS, LAYOUTS, MANY_THREADS, TRIANGLE, WITH_LOGITS, ZeroCall, calls

pytestmark = pytest.mark.promise("small")
SCORES = 8 * 1024 * 16384 * 4  # bytes of one score tensor of the first call
SLOW = [name for name in CALLS if name != "hodor_infer"]
ON_A_GPU = (pytest.mark.slow, pytest.mark.gpu)  # where they take next to no time
ARCHS = (80, 90)


def extras(backend, call):
    """[(extra, ceiling)], read by the meter that fits the backend and the device."""
    if DEVICE == "cuda":
        return [extra_on_cuda(call, backend)]
    if backend == "triton":
        return [extra_of_launchers(call, arch) for arch in ARCHS]
    return [extra_resident(call, backend)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_A_GPU if name in SLOW else ()) for name in CALLS])
def test_extra_memory_is_under_the_ceiling(fused_backend, name):
    for extra, ceiling in extras(fused_backend, CALLS[name]):
        assert extra <= ceiling, f"{extra / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}"


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in BACKENDS or DEVICE == "cuda", reason="the CPU's threads each have scratch of their own")
@pytest.mark.parametrize("name", MANY_THREADS)
def test_many_threads_stay_under_the_ceiling(name):
    extra, ceiling = extra_resident(MANY_THREADS[name], "cpu")
    assert extra <= ceiling, f"{extra / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}"


@pytest.mark.skipif(DEVICE == "cuda" or "triton" not in BACKENDS, reason="launchers are watched where no kernel runs")
@pytest.mark.parametrize("arch", ARCHS)
def test_no_shape_makes_the_launchers_allocate_more(arch):
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(calls())
    def under_the_ceiling(call):
        extra, ceiling = extra_of_launchers(call, arch)
        assert extra <= ceiling, f"{extra / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}: {call}"

    under_the_ceiling()
    assert extra_of_launchers(CALLS["half"], arch)[0] > 0  # the meter runs


@pytest.mark.skipif(DEVICE == "cuda" or "triton" not in BACKENDS, reason="launchers are watched where no kernel runs")
def test_the_partial_sums_of_dalpha_are_few_for_a_small_mask():
    call = ZeroCall(4, 32, 31350, 31350, 16, dtype="float16", Hkv=4, mask=(False, True, False))
    extra, ceiling = extra_of_launchers(call, 90)
    assert extra <= ceiling, f"{extra / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}"


@pytest.mark.parametrize("Nq", [13, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_not_copied_whatever_its_strides(fused_backend, layout, Nq):
    call = ZeroCall(2, 1, Nq, 2**25 // Nq, 4, dtype="float16", needs=("query", "alpha"), layout=layout)
    mask_bytes = 2 * Nq * call.Nk * 2
    for extra, _ in extras(fused_backend, call):
        assert extra < 0.5 * mask_bytes


def test_a_bias_that_rows_share_is_not_expanded(fused_backend):
    expanded = 2 * 64 * 16 * 64 * 64 * 4
    for extra, _ in extras(fused_backend, TRIANGLE):
        assert extra < 0.5 * expanded, f"{extra / 2**20:.1f} MiB, the expanded bias has {expanded / 2**20:.1f}"


PAIR384 = Problem(
    B=384, H=4, Hkv=4, Nq=384, Nk=384, D=32, Dv=32, dtype=torch.bfloat16, mask_dtype=torch.float32,
    mask_shape=(1, 1, 4, 384, 384), device_type="cuda",
)  # fmt: skip
PAIR512 = PAIR384._replace(B=512, Nq=512, Nk=512, mask_shape=(1, 1, 4, 512, 512))
NO_MASK = PAIR384._replace(B=16, H=16, Hkv=16, Nq=4096, Nk=4096, D=64, Dv=64, mask_dtype=None, mask_shape=None)
FEW_KEYS = NO_MASK._replace(Nk=64)


@pytest.mark.parametrize(
    "problem, kept, share, fits",
    [(PAIR384, 47.2, 52.0, True), (PAIR512, 83.9, 89.1, True), (NO_MASK, 151.0, 172.0, True), (FEW_KEYS, 151.0, 105.9, False)],
    ids=["pair384", "N 512", "16 batches of 4096 without a mask", "4096 queries of 16 batches over 64 keys"],
)
def test_the_remainder_is_kept_where_it_leaves_backward_room(problem, kept, share, fits):
    """In MB: what is kept is 2 bytes for each column of the output, 4 for each lse and each mbar, and 8 for backward's row."""
    assert bytes_kept(problem) / 1e6 == pytest.approx(kept, abs=0.05)
    assert share_kept(problem) / 1e6 == pytest.approx(share, abs=0.05)
    assert queries_with_remainder(problem) == (problem.Nq if fits else 0)


def test_the_meter_of_allocations_sees_a_score_tensor():
    call = ZeroCall(1, 8, 64, 16384, 32)
    peak, results = peak_allocated(lambda: run(call.case(), "reference"))
    scores = 8 * 64 * 16384 * 4
    assert peak - size(results) > max(2 * scores, call.ceiling(results))


def test_the_meter_of_allocations_counts_what_is_freed_once():
    def twice():
        for _ in range(2):
            torch.empty(2**20, dtype=torch.uint8)
        return torch.empty(10, dtype=torch.uint8)

    peak, result = peak_allocated(twice)
    assert 2**20 <= peak < 1.5 * 2**20 and result.numel() == 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_the_meter_of_resident_memory_sees_a_score_tensor():
    call = ZeroCall(1, 8, 64, 16384, 32)
    extra, ceiling = extra_resident(call, "plain")
    assert extra > 2 * 8 * 64 * 16384 * 4 and extra > ceiling


@pytest.mark.slow
def test_plain_pytorch_is_far_above_the_ceiling():
    extra, ceiling = extra_resident(CALLS["B1 H8 Nq1024 Nk16384 D32"], "plain")
    assert extra > 2 * SCORES and extra > 10 * ceiling


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in BACKENDS or DEVICE == "cuda", reason="resident memory is the CPU's")
def test_logits_save_m_and_its_gradient():
    call = ZeroCall(1, 8, 100, 65536, 32, **WITH_LOGITS)
    inside, outside = (extra_resident(call, how)[0] for how in ("cpu", "sigmoid first"))
    m = 100 * 65536 * 4
    assert outside - inside > 1.8 * m, f"{outside / 2**20:.1f} and {inside / 2**20:.1f} MiB, M is {m / 2**20:.1f}"
