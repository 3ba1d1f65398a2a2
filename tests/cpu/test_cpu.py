"""backend="cpu": every set of kernels that this processor runs, with any strides."""

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smattn import soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run
from tests.support.cpu_kernels import ALL_DTYPES, KERNELS, SHAPES, differing, forced

pytestmark = pytest.mark.promise("CPU kernels")
HALF_WIDTH = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


# Vendor, family and model of processors whose bfloat16 dot product is slower than float products (csrc/cpu/isa/processor.cpp).
SLOW_BFLOAT16_DOT = {("GenuineIntel", 6, 0x8F), ("GenuineIntel", 6, 0xCF)}


def cpu_info():
    """The first processor's lines of /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_the_kernels_offered_are_those_of_the_processor_the_fastest_first():
    expected = ["baseline"]
    if platform.machine() == "x86_64":
        info = cpu_info()
        flags = set(info["flags"].split())
        avx512 = {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"}
        needed = {"avx2": {"avx2", "fma", "f16c"}, "avx512": avx512, "avx512bf16": {*avx512, "avx512_bf16"}}
        in_software = "in software" in torch.ops.smattn_cpu.cpu_kernels_reason()  # built with SMATTN_AMX=EMULATED
        needed["amx"] = needed["avx512bf16"] if in_software else {*needed["avx512bf16"], "amx_tile", "amx_bf16"}
        slow_dot = (info["vendor_id"], int(info["cpu family"]), int(info["model"])) in SLOW_BFLOAT16_DOT
        order = ["amx", *(["avx512", "avx512bf16"] if slow_dot else ["avx512bf16", "avx512"]), "avx2"]
        expected = [name for name in order if needed[name] <= flags] + expected
    assert expected == KERNELS


def test_the_reason_names_the_first_set():
    assert torch.ops.smattn_cpu.cpu_kernels_reason().startswith(f"{KERNELS[0]}: ")


def test_a_set_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=f"name: expected one of {' '.join(KERNELS)}, got no-such-set"):
        torch.ops.smattn_cpu.select_cpu_kernels("no-such-set")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_set_is_within_the_budget_and_repeats_its_bits(name, dtype, shape):
    case = make_case(**SHAPES[shape], dtype=dtype)
    with forced(name):
        results = run(case, "cpu")
        assert differing(results, run(case, "cpu")) == []
    assert_within_budget(results, case)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("Nk", [1, 6])
@HALF_WIDTH
def test_rounded_probabilities_do_not_reach_delta(dtype, name, Nk, mask_dtype):
    """With one key P is 1, and 1/(1-p) is no 16-bit number. Yet delta must cancel dP as dropout scales it."""
    case = make_case(1, 4, 40, Nk, 32, dtype=dtype, mask_dtype=mask_dtype, dropout_p=0.3)
    with forced(name):
        assert_within_budget(run(case, "cpu"), case)


@pytest.mark.parametrize("name", KERNELS)
def test_an_expanded_mask_gives_the_bits_of_a_shared_one(name):
    case = make_case(2, 4, 64, 576, 64, mask_shape=(1, 4, 64, 576))
    expanded = replace(case, mask=case.mask.expand(2, -1, -1, -1))
    with forced(name):
        assert differing(run(case, "cpu", needs=[]), run(expanded, "cpu", needs=[])) == []


@pytest.mark.parametrize("name", KERNELS)
def test_large_numbers_in_padded_rows_change_no_bit(name):
    """Products with them overflow. No remainder of out is kept at this size: forward's kernels sum delta as P*dP."""
    case = make_case(1, 8, 32768, 64, 32, dtype=torch.bfloat16, mask=None, padded=0.2)
    padded = case.key_padding_mask[:, None, :, None]
    large = replace(case, key=case.key.masked_fill(padded, 1e38), value=case.value.masked_fill(padded, 1e38))
    with forced(name):
        assert differing(run(case, "cpu"), run(large, "cpu")) == []


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mask_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@HALF_WIDTH
def test_equal_values_leave_scores_no_gradient(dtype, name, mask_dtype):
    """dP is then the same for all keys, and delta must cancel it, however P is rounded."""
    for seed in range(40):
        case = make_case(1, 1, 1, 8, 32, dtype=dtype, mask="uniform" if mask_dtype else None, mask_dtype=mask_dtype, rng=seed)
        case = replace(case, alpha=0.01 * case.alpha if mask_dtype else None, value=case.value[:, :, :1].expand_as(case.value).contiguous())
        with forced(name):
            assert_within_budget(run(case, "cpu"), case)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("as_map", [False, True])
@pytest.mark.parametrize("dtype, bits", [(torch.float64, 20), (torch.float32, 7)], ids=str)
def test_scores_are_products_of_the_queries_themselves(name, as_map, dtype, bits):
    """Not of queries times scale * log2(e): terms that are large and cancel would leave the roundings of that."""
    case = make_case(1, 2, 40, 150, 256, dtype=dtype, mask=None, with_lse=not as_map, as_map=as_map)
    of_queries, of_keys = (
        torch.randint(-(2**bits), 2**bits, (1, 2, N, 127), generator=torch.Generator().manual_seed(N)).to(dtype) for N in (40, 150)
    )
    few = case.query[..., :2].round(), case.key[..., :2].round()  # all that is left of a score
    query, key = torch.cat([of_queries, few[0], of_queries], -1), torch.cat([of_keys, few[1], -of_keys], -1)
    case = replace(case, query=query, key=key)
    with forced(name):
        assert_within_budget(run(case, "cpu"), case)


@pytest.mark.parametrize("slope", [128, -128, 4096])
@pytest.mark.parametrize("name", KERNELS)
def test_scores_that_grow_from_key_to_key(name, slope):
    """By more than float32 holds as exponents, while the kernels go from one block of keys to the next."""
    case = make_case(1, 2, 40, 700, 32, dtype=torch.bfloat16, mask_dtype=torch.float32)
    ramp = torch.linspace(0, slope, 700) + case.mask
    case = replace(case, mask=ramp, alpha=torch.ones(2))
    with forced(name):
        assert_within_budget(run(case, "cpu"), case)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_score_is_nan_though_its_key_is_dropped(name, dtype):
    query, key = torch.ones(1, 1, 8, 32, dtype=dtype), torch.ones(1, 1, 4, 32, dtype=dtype)
    key[0, 0, 2] = float("inf")
    with forced(name):
        assert soft_masked_attention(query, key, torch.ones_like(key), dropout_p=0.5, backend="cpu").isnan().all()


@pytest.mark.skipif(len(KERNELS) < 2, reason="there is one set of CPU kernels on this processor")
def test_a_forced_set_is_the_one_that_runs():
    case = make_case(1, 2, 40, 200, 32)
    results = run(case, "cpu")
    with forced(KERNELS[-1]):
        assert differing(results, run(case, "cpu"))  # it sums in vectors of another length
    assert differing(results, run(case, "cpu")) == []


def moved(t, offset):
    """The same values, `offset` elements into a longer storage."""
    storage = torch.full((t.numel() + offset,), float("nan"), dtype=t.dtype)
    return storage[offset:].view(t.shape).copy_(t)


def every_second(t):
    """The same values as every second element of a longer last axis."""
    longer = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    longer[..., ::2] = t
    return longer[..., ::2]


def in_longer_rows(t):
    """The same values as the first of a longer last axis."""
    longer = torch.full((*t.shape[:-1], t.shape[-1] + 6), float("nan"), dtype=t.dtype)
    longer[..., :-6] = t
    return longer[..., :-6]


def turned(t):
    """The same values with the last two axes swapped in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


@pytest.mark.parametrize("shape", ["three queries", "few queries", "many queries", "more queries than keys", "every option", "a map"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "lay_out",
    [lambda t: moved(t, 1), lambda t: moved(t, 3), every_second, in_longer_rows, turned],
    ids=["1", "3", "every second", "longer rows", "turned"],
)
def test_where_and_how_tensors_lie_changes_no_bit(lay_out, dtype, shape):
    case = make_case(**SHAPES[shape], dtype=dtype)
    laid_out = {name: lay_out(t) for name, t in case.inputs().items()}
    other = replace(case.with_inputs(laid_out), dout=lay_out(case.dout), dlse=None if case.dlse is None else lay_out(case.dlse))
    if case.key_padding_mask is not None:
        padding = torch.ones(*case.key_padding_mask.shape, 3, dtype=torch.bool)
        padding[..., 1] = case.key_padding_mask
        other = replace(other, key_padding_mask=padding[..., 1])
    assert any(t.storage_offset() or not t.is_contiguous() for t in laid_out.values())
    assert differing(run(case, "cpu"), run(other, "cpu")) == []


FAULTS = """
import resource, torch
from smattn.testing import make_case, run
torch.set_num_threads(1)
run(make_case(1, 8, 1, 8, 32, mask=None), "cpu", needs=("key",))
case = make_case(1, 8, 1, 1 << 17, 32, mask=None)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
results = run(case, "cpu", needs=("key",))
print(faults() - before, results["dkey"].nbytes)
"""


def test_a_large_gradient_is_faulted_in_by_huge_pages():
    """Faults page by page can take longer than the computation."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    faults, size = map(int, result.stdout.split())
    assert faults < size / 4096 / 4


# Backward's scratch memory cannot hold these at once: groups of batches and heads take turns, and so do batches that share a mask.
TURNS = {
    "one mask": dict(B=96, H=8, Nq=40, Nk=56, D=64, mask_shape=(1, 40, 56)),
    "one mask a head": dict(B=96, H=8, Nq=40, Nk=56, D=64, mask_shape=(1, 8, 40, 56)),
    "more queries than keys": dict(B=96, H=8, Nq=56, Nk=40, D=64, mask_shape=(1, 56, 40)),
    "no mask": dict(B=384, H=8, Nq=40, Nk=48, D=64, mask=None),
    "keys alone": dict(B=24, H=32, Hkv=1, Nq=3, Nk=8192, D=8, mask_shape=(1, 32, 1, 8192)),
    "keys alone, heads share them": dict(B=768, H=2, Nq=3, Nk=4096, D=2, mask_shape=(1, 1, 4096)),
}


@pytest.mark.parametrize("name", TURNS)
def test_taking_turns_changes_no_gradient(name):
    case = make_case(**TURNS[name], dtype=torch.float16, padded=0.1)
    together = run(case, "cpu")

    def one(b):
        rows = {field: getattr(case, field)[b : b + 1] for field in ("query", "key", "value", "dout", "key_padding_mask")}
        return run(replace(case, **rows), "cpu")

    alone = [one(b) for b in range(case.query.shape[0])]
    for result in ("out", "dquery", "dkey", "dvalue"):
        torch.testing.assert_close(together[result], torch.cat([results[result] for results in alone]))
    for result in {"dmask", "dalpha"} & together.keys():
        total = sum(results[result].double() for results in alone)
        magnitude = sum(results[result].double().abs() for results in alone)
        assert ((together[result] - total).abs() <= 1e-5 * magnitude).all()
