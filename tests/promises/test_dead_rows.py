"""Defined: a query that padding, or scores that count as -inf, leave without a key is zeros."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import assert_dead_rows, assert_within_budget, dead_queries, make_case, run
from tests.support.expected import BACKENDS, INTERPRETED
from tests.support.odd_weights import leading_keys_out_of_range

pytestmark = pytest.mark.promise("defined")
PAIRS = [(name, dtype) for name in BACKENDS for dtype in BACKENDS[name].dtypes]
SLOW = [pytest.mark.slow] if INTERPRETED else []  # an interpreter takes minutes for all of these; `test_in_every_dtype` is in the fast tier
on_every_backend = pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name == "triton" else []) for name in BACKENDS])
on_every_backend_and_dtype = pytest.mark.parametrize("name, dtype", PAIRS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in PAIRS])
attention_and_map = pytest.mark.parametrize("as_map", [False, True], ids=["attention", "map"])
few_and_many_queries = pytest.mark.parametrize("Nq", [5, 40, 131])
of_few_and_many_queries = pytest.mark.parametrize("Nq, lowest", [(5, "float32"), (40, "-inf"), (131, "float32")])

INF = float("inf")
LOWEST = {  # what rules a key out at alpha = 1, and the dtype of the mask it is written in
    "float32": (torch.finfo(torch.float32).min, torch.float32),
    "bfloat16": (torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "bfloat16's in float32": (torch.finfo(torch.bfloat16).min, torch.float32),
    "-inf": (-INF, torch.float32),
    "-inf in float16": (-INF, torch.float16),
}
every_lowest = pytest.mark.parametrize("lowest", LOWEST)
of_few_queries_in_every_way_and_of_many = pytest.mark.parametrize(
    "Nq, lowest", [*((5, lowest) for lowest in LOWEST), (40, "-inf"), (131, "float32"), (131, "-inf")]
)
FINITE = [name for name, (value, _) in LOWEST.items() if value != -INF]
NK = 35


def a_case(lowest="float32", Nq=5, *, rows=(1,), keys=slice(None), shape=None, device="cpu", **kw):
    """A case with alpha 1 whose mask rules out `keys` for the queries `rows`, in batch element 0 or wherever the mask is shared."""
    value, mask_dtype = LOWEST[lowest]
    case = make_case(2, 4, Nq, NK, 8, Hkv=2, mask_shape=shape, mask_dtype=mask_dtype, with_lse=True, device=device, **kw)
    for row in rows:
        case.mask[0, ..., row, keys] = value
    return replace(case, alpha=torch.ones(4, device=device, dtype=torch.float32))


def without_dalpha(case):
    """dalpha has no promise where the mask is -inf, so that alpha is a number there."""
    return replace(case, alpha=1.0) if case.mask.isneginf().any() else case


def queries(case, *at):
    """(B, H, Nq) bool, True at the given index."""
    dead = torch.zeros(case.query.shape[:3], dtype=torch.bool, device=case.query.device)
    dead[at] = True
    return dead


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@of_few_queries_in_every_way_and_of_many
@attention_and_map
@on_every_backend
def test_a_row_that_the_mask_rules_out(name, device, as_map, Nq, lowest):
    case = without_dalpha(a_case(lowest, Nq, rows=(1, Nq - 1), as_map=as_map, device=device))
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), [1, Nq - 1]))
    results = run(case, name)
    assert_within_budget(results, case)
    assert all(tensor.isfinite().all() for key, tensor in results.items() if key != "lse")


@every_lowest
@attention_and_map
@on_every_backend_and_dtype
def test_in_every_dtype(name, dtype, device, as_map, lowest):
    case = without_dalpha(a_case(lowest, dtype=dtype, as_map=as_map, device=device))
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), 1))
    assert_within_budget(run(case, name), case)


@attention_and_map
@pytest.mark.parametrize("name", [name for name, dtype in PAIRS if dtype == torch.float64])
def test_the_lowest_float64_of_a_float64_mask(name, device, as_map):
    case = a_case(dtype=torch.float64, as_map=as_map, device=device)
    mask = case.mask.double().masked_fill(case.mask < -1e38, torch.finfo(torch.float64).min)
    case = replace(case, mask=mask)
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), 1))
    assert_within_budget(run(case, name), case)


@of_few_queries_in_every_way_and_of_many
@attention_and_map
@on_every_backend
def test_a_row_that_the_mask_rules_out_in_part(name, device, as_map, Nq, lowest):
    case = without_dalpha(a_case(lowest, Nq, rows=range(Nq), keys=slice(3, 30), as_map=as_map, device=device))
    assert torch.equal(dead_queries(case), queries(case, []))
    results = run(case, name)
    assert_within_budget(results, case)
    assert not results["dmask"][0, :, 3:30].any()


@attention_and_map
@pytest.mark.parametrize("keys", [slice(None), slice(20)], ids=["all keys", "some"])
def test_the_lowest_float64_under_float32_by_the_reference(device, as_map, keys):
    """Such a mask is -inf once it is float32, and still makes no NaN in dalpha."""
    case = a_case(keys=keys, as_map=as_map, device=device)
    case = replace(case, mask=case.mask.double().masked_fill(case.mask < -1e38, torch.finfo(torch.float64).min))
    results = run(case, "reference")
    assert_within_budget(results, case)
    assert results["dalpha"].isfinite().all()


@attention_and_map
@pytest.mark.parametrize("lowest", ["float32", "-inf"])
@pytest.mark.parametrize("name", [name for name, dtype in PAIRS if dtype == torch.float64])
def test_gradients_are_finite_differences_where_rows_are_dead(name, device, as_map, lowest):
    case = a_case(lowest, rows=(1,), dtype=torch.float64, device=device)
    case.mask[1, 3, 5:] = LOWEST[lowest][0]
    tensors = [case.query, case.key, *([] if as_map else [case.value]), case.mask.double()]
    inputs = [t.requires_grad_() for t in tensors]
    inputs += [case.alpha.double().requires_grad_()] if lowest in FINITE else [1.0]

    def call(*inputs):
        if as_map:
            return attention_map(*inputs, enable_gqa=True, backend=name)
        out, lse = soft_masked_attention(*inputs, enable_gqa=True, return_lse=True, backend=name)
        return out, lse.masked_fill(lse.isinf(), 0)  # the difference of two infinities is NaN

    assert dead_queries(case).any()
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


SHAPES = [*product((1, 2), (1, 4), (1, 2)), *product((1, 2), (1, 2))]


@pytest.mark.parametrize(
    "shape, Nq, lowest",
    [*product(SHAPES, [5], ["float32", "-inf"]), *product([(1, 1, 1), (1, 4, 2), (2, 1, 2), (2, 4, 1)], [131], ["float32"])],
    ids=str,
)
@attention_and_map
@on_every_backend
def test_a_mask_and_padding_that_leave_no_key_together_in_every_broadcast(name, device, as_map, shape, Nq, lowest):
    """The mask rules out the first 20 keys for its first batch element, head and query; the other keys of batch element 0 are padding."""
    sizes = (*shape[:-1], Nq if shape[-1] == 2 else 1, NK)
    case = a_case(lowest, Nq, rows=(), shape=sizes, as_map=as_map, device=device)
    case.mask[(0,) * (len(sizes) - 1)][:20] = LOWEST[lowest][0]
    padding = torch.zeros(2, NK, dtype=torch.bool, device=device)
    padding[0, 20:] = True
    case = without_dalpha(replace(case, key_padding_mask=padding))
    heads = [0] if len(sizes) == 4 and sizes[1] > 1 else slice(None)
    assert torch.equal(dead_queries(case), queries(case, 0, heads, [0] if shape[-1] == 2 else slice(None)))
    assert_within_budget(run(case, name), case)


@few_and_many_queries
@attention_and_map
@on_every_backend
def test_a_boolean_window_whose_keys_are_all_padding(name, device, as_map, Nq):
    """The mask as transformers write it: 0 where a query may look and finfo.min elsewhere."""
    case = a_case(Nq=Nq, rows=(), as_map=as_map, device=device)
    i, j = torch.arange(Nq, device=device)[:, None] % NK, torch.arange(NK, device=device)
    mask = torch.zeros(Nq, NK, device=device).masked_fill((i - j).abs() > 2, torch.finfo(torch.float32).min).expand(1, Nq, NK).clone()
    padding = torch.stack([j < 4, j < 0])
    case = replace(case, mask=mask, key_padding_mask=padding)
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), i[:, 0] < 2))
    assert_within_budget(run(case, name), case)


@pytest.mark.parametrize("lowest", FINITE)
@pytest.mark.parametrize("alpha", [[32.0, 16.0, 8.0, 4.0], [1.0, 0.7, 1.5, 1e30]], ids=str)
@attention_and_map
@on_every_backend
def test_a_learned_alpha(name, device, as_map, alpha, lowest):
    case = replace(a_case(lowest, as_map=as_map, device=device), alpha=torch.tensor(alpha, device=device))
    if max(alpha) > 1e6:  # otherwise the scores of that head would be as large
        case.mask[case.mask > 0] = 0
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), 1))
    results = run(case, name)
    assert_within_budget(results, case)
    assert results["dalpha"].isfinite().all()


@pytest.mark.parametrize("rows", [[1], range(5)], ids=["one row", "every row"])
@pytest.mark.parametrize("lowest", FINITE)
@attention_and_map
@on_every_backend
def test_an_alpha_of_zero_makes_no_nan_but_in_its_own_gradient(name, device, as_map, lowest, rows):
    case = a_case(lowest, rows=rows, keys=slice(0, NK) if len(rows) == 1 else slice(0, 30), as_map=as_map, device=device)
    case = replace(case, alpha=torch.tensor([0.0, 1.0, 2.0, 0.0], device=device))
    results = run(case, name)
    dalpha = results.pop("dalpha")
    assert dalpha[1:3].isfinite().all()
    assert torch.equal(dead_queries(case), queries(case, 0, slice(1, 3), 1) if len(rows) == 1 else queries(case, []))
    assert_within_budget(results, case)


@pytest.mark.parametrize("Nq", [5, 70])
@attention_and_map
def test_leading_keys_whose_sum_of_m_is_out_of_range(backend, device, as_map, Nq):
    case = leading_keys_out_of_range(Nq, as_map=as_map, device=device)
    results = run(case, backend)
    assert results["dalpha"].isfinite().all()
    assert_within_budget(results, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@attention_and_map
@on_every_backend
def test_the_lowest_float16_is_an_ordinary_number(name, device, as_map, dtype):
    case = make_case(2, 4, 5, NK, 8, dtype=dtype, mask_dtype=torch.float16, with_lse=True, as_map=as_map, device=device)
    case.mask[0, 1] = torch.finfo(torch.float16).min
    case = replace(case, alpha=torch.ones(4, device=device))
    assert torch.equal(dead_queries(case), queries(case, []))
    results = run(case, name)
    assert_within_budget(results, case)
    if as_map:
        assert results["map"][0, 1].any()
    else:
        assert results["out"][0, :, 1].any() and results["lse"][0, :, 1].sub(-65504).abs().le(10).all()


@few_and_many_queries
@on_every_backend
def test_logits_under_an_alpha_that_is_out_of_range(name, device, Nq):
    """M is exactly 1 or 0, and 1 rules a key out. Incoming gradients are small, so that alpha * dS stays in range."""
    case = make_case(2, 4, Nq, NK, 8, mask="logits", with_lse=True, device=device)
    case = replace(case, dout=case.dout / 1000, dlse=case.dlse / 1000)
    logits = torch.full_like(case.mask_logits, -200.0)
    logits[0, 1] = INF
    logits[1, :, ::3] = INF
    case = replace(case, mask_logits=logits, alpha=-3e38)
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), 1))
    results = run(case, name)
    assert_within_budget(results, case)
    assert not results["dmask_logits"].any()


@of_few_and_many_queries
@on_every_backend
def test_dropout(name, device, Nq, lowest):
    case = without_dalpha(a_case(lowest, Nq, dropout_p=0.5, padded=0.3, device=device))
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), 1))
    assert_within_budget(run(case, name), case)


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@of_few_and_many_queries
@on_every_backend
def test_the_gradient_fed_to_a_dead_lse_may_be_anything(name, device, Nq, lowest, bad):
    case = without_dalpha(a_case(lowest, Nq, device=device))
    clean = run(case, name)
    assert_dead_rows(clean, case)
    assert same_bits(clean, run(replace(case, dlse=case.dlse.masked_fill(dead_queries(case), bad)), name))


@of_few_and_many_queries
@attention_and_map
@on_every_backend
def test_a_dead_row_changes_nothing_else(name, device, as_map, Nq, lowest):
    """Except for the row's own output, results have the bits of a call in which the row is alive and its gradients are 0."""
    case = without_dalpha(a_case(lowest, Nq, as_map=as_map, device=device))
    dead = dead_queries(case)
    rows = dead[..., None] if not as_map else dead.all(1)[..., None]
    case = replace(case, dout=case.dout.masked_fill(rows, 0), dlse=None if as_map else case.dlse.masked_fill(dead, 0))
    alive = replace(case, mask=case.mask.masked_fill(dead[:, 0, :, None], 0.5))
    results, expected = run(case, name), run(alive, name)
    for key in ("map",) if as_map else ("out", "lse"):
        at = dead.all(1) if as_map else dead
        assert expected[key][at].isfinite().all() and not torch.equal(results[key][at], expected[key][at])
        results[key], expected[key] = results[key][~at], expected[key][~at]
    assert same_bits(results, expected)


@few_and_many_queries
@on_every_backend
def test_a_row_with_a_nan_or_a_score_of_plus_infinity_is_never_dead(name, device, Nq):
    case = a_case("-inf", Nq, rows=(0, 1, 2, 3, 4), device=device)
    case.query[0, :, 0] = float("nan")
    case.mask[0, 1, 20] = float("nan")
    case.mask[0, 2, 20] = INF
    case.mask[0, 3, [7, 20]] = INF
    case = replace(case, alpha=1.0)
    assert torch.equal(dead_queries(case), queries(case, 0, slice(None), 4))
    results = run(case, name)
    for key in ("out", "dquery"):
        assert results[key][0, :, :4].isnan().all() and not results[key][0, :, 4].any(), key
        assert results[key][1].isfinite().all()
    assert results["lse"][0, :, :2].isnan().all() and results["lse"][0, :, 2:4].eq(INF).all()
    assert_dead_rows({"lse": results["lse"], "out": results["out"]}, case)


@on_every_backend
def test_a_nan_query_without_keys_is_dead_by_padding_and_nan_by_scores(name, device):
    case = replace(a_case("-inf", device=device), alpha=1.0)
    case.query[:, :, 1] = float("nan")
    padding = torch.zeros(2, NK, dtype=torch.bool, device=device)
    padding[1] = True
    case = replace(case, key_padding_mask=padding)
    results = run(case, name)
    assert results["out"][0, :, 1].isnan().all() and not results["out"][1].any()
    assert results["lse"][0, :, 1].isnan().all() and results["lse"][1].eq(-INF).all()


LARGE = [(1.0, -3e6), (1.0, -1e9), (32.0, -1e9), (32.0, -1e30), (1.0, 1e9), (36.594475, -945679700.0), (32.05659, -81284490.0)]


@pytest.mark.parametrize("alpha, value", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@attention_and_map
@on_every_backend
def test_a_row_whose_scores_are_all_large_makes_no_nan(name, device, as_map, dtype, alpha, value):
    """It is not dead. In 16 bits P is rebuilt from an lse whose last place is far above 1."""
    case = make_case(2, 2, 5, NK, 8, dtype=dtype, as_map=as_map, device=device)
    case.mask[0, 1] = value
    case = replace(case, alpha=torch.full((2,), alpha, device=device))
    results = run(case, name)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert_within_budget(results, case)
