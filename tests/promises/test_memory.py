"""Small: extra memory <= 0.25 * (inputs + outputs + gradients) + 16 MiB on the fused backends; a mask is never copied."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from smattn.testing import run
from tests.support.expected import BACKENDS, DEVICE
from tests.support.meters import LAYOUTS, Call, extra_of_launchers, extra_on_cuda, extra_resident, peak_allocated, size

SCORES = 8 * 1024 * 16384 * 4  # bytes of one score tensor of the first call
MAP_GRADIENTS = ("query", "key", "mask", "alpha", "head_weights")
WITH_LOGITS = dict(logits=True, needs=("query", "key", "value", "mask_logits", "alpha"))
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
    "half, many queries for few keys": Call(1, 8, 262144, 13, 64, dtype="float16"),
    "half, many queries for few keys, mask and alpha only": Call(1, 8, 262144, 13, 64, dtype="float16", needs=("mask", "alpha")),
    "half, many batches of few queries and fewer keys": Call(1024, 8, 100, 10, 64, dtype="bfloat16"),
    "half, no mask": Call(1024, 8, 72, 48, 64, dtype="float16", mask=None),
    "half, no mask, grouped heads": Call(256, 16, 96, 128, 64, dtype="float16", mask=None, Hkv=1),
    "half, no mask, one batch and kv head": Call(1, 256, 1024, 1100, 64, dtype="float16", mask=None, Hkv=1),
    "half, key-only mask, grouped heads": Call(2, 32, 130, 262144, 32, dtype="float16", mask=(True, False, False), Hkv=1),
    "half, key-only mask a head, grouped heads": Call(2, 32, 130, 262144, 32, dtype="float16", mask=(True, True, False), Hkv=1),
    "half, key-only mask a head for the batch, grouped": Call(4, 32, 130, 131072, 32, dtype="float16", mask=(False, True, False), Hkv=1),
    "half, one mask for many batches": Call(512, 8, 64, 96, 64, dtype="float16", mask=(False, False, True)),
    "map": Call(1, 8, 1024, 16384, 32, needs=MAP_GRADIENTS, as_map=True),
    "half, map, few queries": Call(4, 8, 100, 65536, 32, dtype="bfloat16", needs=MAP_GRADIENTS, as_map=True),
    "half, map, many queries for few keys": Call(1, 8, 262144, 13, 64, dtype="float16", needs=MAP_GRADIENTS, as_map=True),
    "logits": Call(1, 8, 1024, 16384, 32, **WITH_LOGITS),
    "half, logits, many queries for as many keys": Call(1, 8, 4096, 4096, 64, dtype="float16", **WITH_LOGITS),
    "half, logits, few queries": Call(4, 8, 100, 65536, 32, dtype="bfloat16", **WITH_LOGITS),
    "logits, map": Call(1, 8, 1024, 16384, 32, as_map=True, logits=True, needs=("query", "key", "mask_logits", "alpha", "head_weights")),
    "half, one mask a head for many batches": Call(512, 8, 64, 96, 64, dtype="float16", mask=(False, True, True)),
}
MANY_THREADS = {
    "many heads": Call(1, 32, 64, 1024, 128, threads=8),
    "half, many heads": Call(1, 32, 64, 1024, 128, dtype="float16", threads=8),
    "bfloat16, many heads": Call(1, 32, 64, 1024, 128, dtype="bfloat16", threads=8),
    "many batches and heads": Call(8, 32, 64, 64, 128, threads=8),
    "wide": Call(16, 8, 64, 64, 256, threads=64),
    "double": Call(32, 8, 64, 64, 128, dtype="float64", threads=128),
    "self1k": Call(1, 8, 1024, 1024, 64, threads=128),
    "half, much kept, one mask row": Call(4, 16, 1045, 1045, 48, dtype="float16", mask=(False, False, False), threads=64),
}
SLOW = [name for name in CALLS if name != "hodor_infer"]
ON_A_GPU = (pytest.mark.slow, pytest.mark.gpu)  # where they take no time
ARCHS = (80, 90)


def extras(backend, call):
    """[(extra, ceiling)] by the meter that fits the backend and device."""
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


@st.composite
def calls(draw):
    """Of 32 to 512 MB, with what all shapes have in common but little: sizes by their order of magnitude, heads of 16 and more."""
    size = st.floats(0, 18).map(lambda exponent: round(2**exponent))
    Hkv, group, dtype = draw(st.integers(1, 16)), draw(st.sampled_from([1, 1, 2, 8, 32])), draw(st.sampled_from(["float16", "float32"]))
    mask = draw(st.sampled_from([None, *product((False, True), repeat=3)]))
    names = ["query", "key", "value", *(["mask", "alpha"] if mask else [])]
    needs = draw(st.one_of(st.just(names), st.lists(st.sampled_from(names), min_size=1, unique=True)))
    D = draw(st.sampled_from([16, 32, 48, 64, 128, 256]))
    call = Call(
        draw(st.integers(1, 512)), Hkv * group, draw(size), draw(size), D,
        dtype=dtype, needs=tuple(needs), options=draw(st.booleans()), Hkv=Hkv, mask=mask,
    )  # fmt: skip
    elements = call.B * D * (call.H * call.Nq + Hkv * call.Nk)
    if mask:
        B, H, Nq = (n if has else 1 for n, has in zip((call.B, call.H, call.Nq), mask, strict=True))
        elements += B * H * Nq * call.Nk
    assume(2**24 < elements < 2**27)
    return call


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


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in BACKENDS or DEVICE == "cuda", reason="resident memory is the CPU's")
def test_logits_save_m_and_its_gradient():
    call = Call(1, 8, 100, 65536, 32, **WITH_LOGITS)
    inside, outside = (extra_resident(call, how)[0] for how in ("cpu", "sigmoid first"))
    m = 100 * 65536 * 4
    assert outside - inside > 1.8 * m, f"{outside / 2**20:.1f} and {inside / 2**20:.1f} MiB, M is {m / 2**20:.1f}"
