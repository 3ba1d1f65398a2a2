"""Small: extra memory <= 0.25 * (inputs + outputs + gradients) + 16 MiB on the fused backends; a mask is never copied."""

from pathlib import Path

import pytest
import torch
from expected import DEVICE
from meters import LAYOUTS, Call, extra_of_launchers, extra_on_cuda, extra_resident, peak_allocated, size

from smattn.testing import run

SCORES = 8 * 1024 * 16384 * 4  # bytes of one score tensor of the first call
CALLS = {
    "B1 H8 Nq1024 Nk16384 D32": Call(1, 8, 1024, 16384, 32),
    "queries100 at Nk 65536": Call(4, 8, 100, 65536, 32),
    "one image": Call(1, 8, 100, 65536, 32),
    "hodor_infer": Call(1, 8, 13, 7424, 32),
    "video64k": Call(1, 8, 128, 65536, 64),
    "half": Call(1, 8, 1024, 16384, 32, dtype="float16"),
    "half, few queries": Call(4, 8, 100, 65536, 32, dtype="bfloat16"),
    "dropout padding lse": Call(1, 8, 1024, 16384, 32, options=True),
    "dropout padding lse, few queries": Call(1, 8, 13, 65536, 32, options=True),
    "mask and alpha only": Call(1, 8, 1024, 16384, 32, needs=("mask", "alpha")),
    "wide": Call(1, 8, 129, 16384, 256),
}
SLOW = [name for name in CALLS if name != "hodor_infer"]
ARCHS = (80, 90)


def extras(backend, call):
    """[(extra, ceiling)] by the meter that fits the backend and device."""
    if DEVICE == "cuda":
        return [extra_on_cuda(call, backend)]
    if backend == "triton":
        return [extra_of_launchers(call, arch) for arch in ARCHS]
    return [extra_resident(call, backend)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CALLS])
def test_extra_memory_is_under_the_ceiling(fused_backend, name):
    for extra, ceiling in extras(fused_backend, CALLS[name]):
        assert extra <= ceiling, f"{extra / 2**20:.1f} MiB, allowed {ceiling / 2**20:.1f}"


@pytest.mark.parametrize("Nq", [13, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_not_copied_whatever_its_strides(fused_backend, layout, Nq):
    call = Call(2, 1, Nq, 2**25 // Nq, 4, dtype="float16", needs=("query", "alpha"), layout=layout)
    mask_bytes = 2 * Nq * call.Nk * 2
    for extra, _ in extras(fused_backend, call):
        assert extra < 0.5 * mask_bytes


def test_the_meter_of_allocations_sees_a_score_tensor():
    call = Call(1, 8, 64, 16384, 32)
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
    call = Call(1, 8, 64, 16384, 32)
    extra, ceiling = extra_resident(call, "plain")
    assert extra > 2 * 8 * 64 * 16384 * 4 and extra > ceiling


@pytest.mark.slow
def test_plain_pytorch_is_far_above_the_ceiling():
    extra, ceiling = extra_resident(CALLS["B1 H8 Nq1024 Nk16384 D32"], "plain")
    assert extra > 2 * SCORES and extra > 10 * ceiling
