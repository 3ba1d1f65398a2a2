"""With 16-bit inputs forward makes one product of P rounded and V, and what it keeps of it is good enough for delta, reference.py (5)."""

from dataclasses import replace

import pytest
import torch

from smattn import reference
from smattn.call import Needs, Saved, with_remainder, without_rounding
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
    return without_rounding(Saved(*with_remainder(out, dtype), lse=out, mbar=None))


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
