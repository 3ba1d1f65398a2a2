"""The error budget can fail: small but real mistakes fall out of it, and an honest computation never does."""

from dataclasses import replace

import pytest
import torch

from smattn.testing import assert_dead_rows, assert_within_budget, dead_queries, errors, make_case, plain, run, run_plain

pytestmark = pytest.mark.promise("the budget can fail")
CALLS = 40
HALF = [torch.float16, torch.bfloat16]
LOWEST = [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, float("-inf")]  # scores that count as -inf


def random_case(rng, dtype=torch.float32):
    """The mask is float32 whatever the dtype of query, key and value."""
    g = torch.Generator().manual_seed(rng)
    B, Nq, Nk, D = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 4), (1, 20), (17, 120), (4, 65)))
    return make_case(B, 8, Nq, Nk, D, rng=rng, mask="blob" if rng % 2 else "uniform", dtype=dtype, with_lse=dtype in HALF)


def honest(case):
    return run(case, "reference")


def relative_error(case):
    results = run(case, "reference")
    return results | {"out": results["out"] * (1 + 2e-5)}


def two_alphas_swapped(case):
    alpha = case.alpha.clone()
    alpha[[1, 2]] = alpha[[2, 1]]
    return run(replace(case, alpha=alpha), "reference")


def last_key_block_dropped(case):
    padding = torch.zeros(case.key.shape[0], case.key.shape[2], dtype=torch.bool)
    padding[:, -16:] = True
    return run(replace(case, key_padding_mask=padding), "reference", needs=["query"])


def tf32_inputs(case):
    def rounded(x):  # to the nearest number with 10 bits of mantissa
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return run(replace(case, query=rounded(case.query), key=rounded(case.key), value=rounded(case.value)), "reference")


def first_head_left_out_of_the_mask_gradient(case):
    first_head = (torch.arange(8) == 0)[:, None, None].float()
    only_first = run(replace(case, dout=case.dout * first_head), "reference", needs=["mask"])["dmask"]
    return {"dmask": run(case, "reference", needs=["mask"])["dmask"] - only_first}


def lse_off_by_a_fiftieth(case):
    return {"lse": run(case, "reference")["lse"] + 0.02}


def dalpha_off_by_four_thousandths(case):
    return {"dalpha": run(case, "reference")["dalpha"] * 1.004}


def mask_rounded_to_bfloat16(case):
    return run(replace(case, mask=case.mask.bfloat16().float()), "reference")


MUTATIONS = [relative_error, two_alphas_swapped, last_key_block_dropped, tf32_inputs, first_head_left_out_of_the_mask_gradient]
MUTATIONS_OF_HALF = [lse_off_by_a_fiftieth, dalpha_off_by_four_thousandths, mask_rounded_to_bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_an_honest_computation_always_passes(dtype):
    for rng in range(CALLS):
        case = random_case(rng, dtype)
        assert_within_budget(honest(case), case)


def calls_caught(mutation, dtype):
    caught = 0
    for rng in range(CALLS):
        case = random_case(rng, dtype)
        caught += not all(row.within for row in errors(mutation(case), case))
    return caught


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_mistake_is_caught_in_more_than_half_of_random_calls(mutation):
    assert calls_caught(mutation, torch.float32) > CALLS / 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS_OF_HALF, ids=lambda m: m.__name__)
def test_a_mistake_in_16_bits_under_a_float32_mask_is_caught_in_more_than_half_of_random_calls(mutation, dtype):
    assert calls_caught(mutation, dtype) > CALLS / 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_gradient_of_a_float32_mask_need_not_be_finer_than_query(dtype):
    case = random_case(0, dtype)
    rounded = honest(case)["dmask"].to(torch.bfloat16 if dtype == torch.float32 else dtype).float()
    assert errors({"dmask": rounded}, case)[0].within == (dtype != torch.float32)


def partly_at(value, dtype=torch.float32, mask_dtype=torch.float32, **kw):
    """A case whose last 15 of 40 keys have no weight: their mask is `value`, and alpha is 1."""
    case = make_case(2, 4, 6, 40, 16, dtype=dtype, mask_dtype=mask_dtype, **kw)
    case.mask[..., 25:] = value
    return replace(case, alpha=torch.ones(4))


@pytest.mark.parametrize("as_map", [False, True], ids=["attention", "map"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [-1e9, *LOWEST])
def test_zeros_do_not_pass_under_a_mask_that_rules_keys_out(value, dtype, as_map):
    case = partly_at(value, dtype, with_lse=True, as_map=as_map)
    results = honest(case)
    assert_within_budget(results, case)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in results.items()}
    assert not any(row.within for row in errors(zeros, case))


def with_dead_rows(value=float("-inf"), **kw):
    """A case where all keys of batch element 1 are padding and the mask rules out every key for query 2 of element 0."""
    case = make_case(2, 4, 6, 40, 16, Hkv=2, **kw)
    case.mask[0, 2] = value
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[1] = True
    return replace(case, alpha=torch.ones(4), key_padding_mask=padding)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", LOWEST)
def test_dead_queries_are_those_without_a_key_and_plain_has_zeros_there(value, dtype):
    case = with_dead_rows(value, dtype=dtype, with_lse=True)
    dead = torch.zeros(2, 4, 6, dtype=torch.bool)
    dead[0, :, 2] = dead[1] = True
    assert torch.equal(dead_queries(case), dead)
    heads = dict(key=case.key.repeat_interleave(2, 1), value=case.value.repeat_interleave(2, 1))
    for rows in plain(case.query, **heads, mask=case.mask[:, None], alpha=case.alpha, key_padding_mask=case.key_padding_mask):
        assert not rows[dead].any() and rows[~dead].any()
    results = run_plain(case)
    assert_dead_rows(results, case)
    assert all(tensor[results["lse"].isneginf()].eq(0).all() for tensor in (results["out"], results["dquery"]))


@pytest.mark.parametrize("as_map", [False, True], ids=["attention", "map"])
def test_a_dead_row_that_is_not_exactly_zero_is_caught(as_map):
    case = with_dead_rows(with_lse=True, as_map=as_map)
    results = honest(case)
    assert_within_budget(results, case)
    in_dead_row = {
        "out": (0, 1, 2, 3),
        "map": (0, 2, 3),
        "dquery": (0, 1, 2, 3),
        "dkey": (1, 1, 2, 3),
        "dvalue": (1, 1, 2, 3),
        "dmask": (0, 2, 3),
    }
    for name, at in in_dead_row.items():
        if name not in results:
            continue
        for small in (1e-30, float("nan")):
            wrong = results[name].clone()
            wrong[at] = small
            for check in (assert_dead_rows, assert_within_budget):
                with pytest.raises(AssertionError, match=f"{name}: expected exact zeros"):
                    check({name: wrong}, case)
    if not as_map:
        with pytest.raises(AssertionError, match="lse: expected -inf"):
            assert_dead_rows({"lse": results["lse"].nan_to_num(neginf=-1e30)}, case)


def test_heads_of_dead_queries_alone_have_no_gradient_of_alpha_or_of_their_weight():
    case = with_dead_rows(as_map=True)
    case = replace(case, key_padding_mask=torch.ones_like(case.key_padding_mask))
    results = honest(case)
    assert_dead_rows(results, case)
    for name in ("dalpha", "dhead_weights"):
        with pytest.raises(AssertionError, match=f"{name}: expected exact zeros"):
            assert_dead_rows({name: results[name] + 1e-30}, case)


def test_two_alphas_swapped_is_seen_in_the_output_alone():
    caught = 0
    for rng in range(CALLS):
        case = random_case(rng)
        caught += not errors({"out": two_alphas_swapped(case)["out"]}, case)[0].within
    assert caught > CALLS / 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["out", "dmask", "dalpha"])
def test_one_element_that_is_not_finite_is_caught_and_located(name, bad):
    case = random_case(0)
    results = honest(case)
    worst = tuple(n - 1 for n in results[name].shape)
    results[name][worst] = bad
    with pytest.raises(AssertionError, match="outside the error budget") as caught:
        assert_within_budget(results, case)
    assert f"worst at {worst}" in str(caught.value)


def test_a_gradient_of_another_shape_or_dtype_is_caught():
    case = random_case(0)
    results = honest(case)
    for wrong in (results["dmask"].sum(0), results["dmask"].half()):
        with pytest.raises(AssertionError, match="dmask: expected"):
            assert_within_budget(results | {"dmask": wrong}, case)


def overflowing():
    """In float16 plain() has scores of inf here."""
    case = make_case(1, 2, 5, 40, 16, dtype=torch.float16)
    return replace(case, query=case.query * 3000, key=case.key * 3000, scale=1e-6)


def test_a_yardstick_that_overflows_excuses_nothing():
    case = overflowing()
    results = run(case, "reference")
    assert_within_budget(results, case)
    for name, tensor in results.items():
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_within_budget({name: torch.full_like(tensor, float("nan"))}, case)
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_within_budget({name: tensor * 1.2 + tensor.abs().max() / 5}, case)


def test_a_yardstick_that_is_dead_where_the_exact_answer_is_not_excuses_nothing():
    """In float16 alpha * M is -inf here."""
    case = make_case(1, 2, 5, 40, 16, dtype=torch.float16, mask_dtype=torch.float16)
    case = replace(case, mask=torch.full_like(case.mask, -65504), alpha=torch.full((2,), 2.0))
    results = run(case, "reference")
    assert not run_plain(case)["out"].any() and not dead_queries(case).any()
    assert_within_budget(results, case)
    for name in ("out", "dquery", "dkey", "dvalue", "dmask"):
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_within_budget({name: torch.zeros_like(results[name])}, case)


def test_what_is_no_result_of_the_call_is_refused():
    case = make_case(1, 2, 5, 40, 16, dtype=torch.float16)
    results = run(case, "reference")
    out = results["out"]
    for wrong in ({}, {"out": out.float()}, {"out": out[:, :1]}, {"lse": out}, {"dweights": out}):
        with pytest.raises(AssertionError, match="expected|not a result"):
            assert_within_budget(wrong, case)
