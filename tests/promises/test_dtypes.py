"""dtypes: which dtype each result has, and what autocast casts."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run

pytestmark = pytest.mark.promise("dtypes")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("mask_dtype, alpha_dtype", [*product(FLOATS, FLOATS[1:])])
def test_mask_and_alpha_keep_their_own_dtype(backend, device, mask_dtype, alpha_dtype):
    case = make_case(2, 2, 3, 35, 8, mask_dtype=mask_dtype, device=device)
    case = replace(case, alpha=case.alpha.to(alpha_dtype))
    results = run(case, backend)
    assert results["dmask"].dtype == mask_dtype and results["dalpha"].dtype == alpha_dtype
    assert_within_budget(results, case)


def test_a_mask_more_precise_than_the_scores_is_not_rounded_to_them(backend, device):
    """In float32 M is just below 1, under alpha = 32. In bfloat16 it would be 1."""
    query, key = torch.zeros(1, 1, 1, 8, device=device).bfloat16(), torch.zeros(1, 1, 2, 8, device=device).bfloat16()
    value = torch.eye(2, 8, device=device).bfloat16()[None, None]
    mask = torch.tensor([[[1.0, 0.998]]], device=device)
    out = soft_masked_attention(query, key, value, mask, 32.0, backend=backend)[0, 0, 0]
    assert abs(out[0].item() - torch.tensor(32 * 0.002).sigmoid().item()) < 2**-9
    assert out[0] > out[1]


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_query_key_and_value_alone(backend, device, autocast_dtype):
    case = make_case(2, 2, 3, 9, 4, with_lse=True, device=device)
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs().items()}
    with torch.autocast(device, dtype=autocast_dtype):
        out, lse = soft_masked_attention(**leaves, return_lse=True, backend=backend)
    assert out.dtype == autocast_dtype and lse.dtype == torch.float32
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [case.dout.to(out.dtype), case.dlse])
    cast = replace(case, **{name: getattr(case, name).to(autocast_dtype) for name in ("query", "key", "value", "dout")})
    explicit = run(cast, backend)
    assert torch.equal(out, explicit["out"]) and torch.equal(lse, explicit["lse"])
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, explicit[f"d{name}"].float()), name


def test_autocast_leaves_double_alone(device):
    case = make_case(1, 2, 3, 9, 4, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = soft_masked_attention(case.query, case.key, case.value, case.mask, case.alpha, backend="reference")
    assert out.dtype == torch.float64


def test_autocast_makes_mixed_inputs_one_dtype(backend, device):
    """A half query with float32 keys is an error outside autocast and allowed inside."""
    case = make_case(1, 2, 3, 9, 4, device=device)
    arguments = (case.query.bfloat16(), case.key, case.value, case.mask, case.alpha)
    with pytest.raises(ValueError, match="key: expected query's dtype"):
        soft_masked_attention(*arguments, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert soft_masked_attention(*arguments, backend=backend).dtype == torch.bfloat16


def test_backward_runs_as_forward_did_inside_or_outside_autocast(backend, device):
    case = make_case(1, 2, 3, 9, 4, device=device)
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs().items()}
    out = soft_masked_attention(**leaves, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, list(leaves.values()), case.dout)
    expected = run(case, backend)
    assert all(torch.equal(grad, expected[f"d{name}"]) for name, grad in zip(leaves, grads, strict=True))


def test_a_map_is_float32_under_autocast_and_for_half_inputs(map_backend, device):
    case = make_case(1, 2, 3, 9, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        amap = attention_map(case.query, case.key, case.mask, case.alpha, backend=map_backend)
    assert amap.dtype == torch.float32
    half = attention_map(case.query.bfloat16(), case.key.bfloat16(), case.mask, case.alpha, backend=map_backend)
    assert torch.equal(amap, half)


def test_lse_is_in_the_dtype_of_accumulation(backend, dtype, device):
    case = make_case(1, 2, 3, 9, 4, dtype=dtype, with_lse=True, device=device)
    results = run(case, backend)
    assert results["out"].dtype == dtype
    assert results["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
