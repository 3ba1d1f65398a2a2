"""With 16-bit inputs forward makes one product of P rounded and V, and what it keeps of it is good enough for delta, reference.py (5)."""

from dataclasses import replace

import pytest
import torch

from smattn import reference
from smattn.call import Needs, Saved, remainder_dtype, with_remainder, without_rounding
from smattn.testing import assert_within_budget, errors, make_case, run
from tests.support.odd_weights import many_weights_below_float16

pytestmark = pytest.mark.promise("exact")
HALF = [torch.float16, torch.bfloat16]
CALLS = 40
NEEDS = ["query", "key", "mask"]  # the gradients that are made of dS


def random_case(rng, dtype):
    g = torch.Generator().manual_seed(rng)
    B, Nq, Nk, D = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 3), (1, 20), (17, 120), (4, 65)))
    return make_case(B, 4, Nq, Nk, D, rng=rng, mask="blob" if rng % 2 else "uniform", dtype=dtype)


def with_equal_values(case):
    """Every key has the first one's value, so that dP is the same for all keys and dS is 0."""
    return replace(case, value=case.value[:, :, :1].expand_as(case.value).contiguous())


def with_large_values(case):
    """V + 64: delta is large beside what dS is of it."""
    return replace(case, value=case.value + 64)


def by_design(case, *, divided_by_rounded, kept):
    """Gradients by a kernel of such a design: what divides P rounded @ V, and what is kept of O for delta."""
    call = case.call()
    t = reference.softmax(call)
    p = (t.s - t.s.amax(-1, keepdim=True)).exp()
    rounded = p.to(case.query.dtype).float()
    value, dout = case.value.float(), case.dout.float()
    out = rounded @ value / (rounded if divided_by_rounded else p).sum(-1, keepdim=True)
    ds = t.p * (dout @ value.mT - (dout * kept(out, case.query.dtype)).sum(-1, keepdim=True))
    grads = reference.score_gradients(call, t, ds, torch.zeros_like(t.lse), Needs(True, True, False, True, False))
    named = {"dquery": grads.query, "dkey": grads.key, "dmask": grads.mask}
    return {name: grad.view(case.inputs()[name[1:]].shape) for name, grad in named.items()}


def in_float32(out, dtype):
    return out


def in_16_bits(out, dtype):
    return out.to(dtype).float()


def in_16_bits_and_their_remainder(out, dtype):
    return without_rounding(Saved(*with_remainder(out, dtype), lse=out, mbar=None, normalizer=None))


def bits_of(x):
    return x.view(torch.int32)


@pytest.mark.promise("dtypes")
def test_bfloat16_and_its_remainder_are_the_float32_they_were_made_of():
    """Whatever its size: a difference of bits has no exponent that might be too small or too large. NaN stays NaN."""
    g = torch.Generator().manual_seed(0)
    every_exponent = torch.randint(-(2**31), 2**31, (1 << 20,), generator=g).to(torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), largest, -largest, float("nan"), 1e-45, -1e-45, 2**-126, 2**-133])
    x = torch.cat([every_exponent, special])
    kept = in_16_bits_and_their_remainder(x, torch.bfloat16)
    away = bits_of(x) - bits_of(kept)
    tied_down = (bits_of(x) & 0x1FFFF) == 0x8000  # half a step above an even bfloat16: one more than int16 holds
    assert torch.equal(kept.isnan(), x.isnan()) and x.isnan().any() and tied_down.any()
    assert not away[~x.isnan() & ~tied_down].any()
    assert (away[~x.isnan() & tied_down] == 1).all()


def test_the_remainder_takes_the_bytes_of_the_output():
    for half in HALF:
        out, remainder = with_remainder(torch.randn(3, 5), half)
        assert remainder.dtype == remainder_dtype(half) and remainder.element_size() == out.element_size()


def calls_caught(of, dtype, **design):
    cases = [of(random_case(rng, dtype)) for rng in range(CALLS)]
    return sum(not all(row.within for row in errors(by_design(case, **design), case)) for case in cases)


@pytest.mark.promise("the budget can fail")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("of", [with_equal_values, with_large_values])
@pytest.mark.parametrize("kept", [in_float32, in_16_bits_and_their_remainder])
def test_a_design_that_divides_by_the_rounded_sum_and_keeps_all_of_the_output_always_passes(kept, of, dtype):
    assert calls_caught(of, dtype, divided_by_rounded=True, kept=kept) == 0


@pytest.mark.promise("the budget can fail")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_that_are_all_alike_catch_a_division_by_the_unrounded_sum(dtype):
    assert calls_caught(with_equal_values, dtype, divided_by_rounded=False, kept=in_float32) > CALLS / 2


@pytest.mark.promise("the budget can fail")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_values_catch_an_output_that_is_kept_in_16_bits(dtype):
    assert calls_caught(with_large_values, dtype, divided_by_rounded=True, kept=in_16_bits) > CALLS / 2


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("of", [with_equal_values, with_large_values])
def test_a_backend_is_of_the_design_that_passes(fused_backend, half, of):
    for rng in range(4 if fused_backend == "triton" else CALLS):  # where kernels are interpreted a call takes a second
        case = of(random_case(rng, half))
        assert_within_budget(run(case, fused_backend, needs=NEEDS), case)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("fine_mask", [True, False], ids=["float32 mask", "16-bit mask"])
@pytest.mark.parametrize("Nq, Nk", [(5, 400), (70, 90)], ids=["few queries", "many"])
def test_values_that_are_all_alike_leave_no_gradient_in_any_regime(fused_backend, half, fine_mask, Nq, Nk):
    """The keys of few queries are split and merged."""
    case = make_case(2, 4, Nq, Nk, 32, Hkv=2, dtype=half, mask_dtype=torch.float32 if fine_mask else half, padded=0.2)
    case = with_equal_values(case)
    assert_within_budget(run(case, fused_backend, needs=NEEDS), case)


@pytest.mark.parametrize("Nq", [5, 70])
def test_weights_that_are_small_for_float16_count(fused_backend, device, Nq):
    case = many_weights_below_float16(Nq, device=device)
    results = run(case, fused_backend)
    assert (results["out"] > 0.1).all()
    assert_within_budget(results, case)
