"""The error budget can fail: small, real mistakes fall out of it, an honest computation never does."""

from dataclasses import replace

import pytest
import torch

from smattn.testing import assert_within_budget, errors, make_case, run

CALLS = 40


def random_case(rng):
    g = torch.Generator().manual_seed(rng)
    B, Nq, Nk, D = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 4), (1, 20), (17, 120), (4, 65)))
    return make_case(B, 8, Nq, Nk, D, rng=rng, mask="blob" if rng % 2 else "uniform")


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
    def rounded(x):  # to nearest in 10 bits of mantissa
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return run(replace(case, query=rounded(case.query), key=rounded(case.key), value=rounded(case.value)), "reference")


def first_head_left_out_of_the_mask_gradient(case):
    first_head = (torch.arange(8) == 0)[:, None, None].float()
    only_first = run(replace(case, dout=case.dout * first_head), "reference", needs=["mask"])["dmask"]
    return {"dmask": run(case, "reference", needs=["mask"])["dmask"] - only_first}


MUTATIONS = [relative_error, two_alphas_swapped, last_key_block_dropped, tf32_inputs, first_head_left_out_of_the_mask_gradient]


def test_an_honest_computation_always_passes():
    for rng in range(CALLS):
        case = random_case(rng)
        assert_within_budget(honest(case), case)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_mistake_is_caught_in_more_than_half_of_random_calls(mutation):
    caught = 0
    for rng in range(CALLS):
        case = random_case(rng)
        caught += not all(row.within for row in errors(mutation(case), case))
    assert caught > CALLS / 2, f"{caught} of {CALLS}"


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
    """plain() in float16 has scores of inf here."""
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


def test_what_is_no_result_of_the_call_is_refused():
    case = make_case(1, 2, 5, 40, 16, dtype=torch.float16)
    results = run(case, "reference")
    out = results["out"]
    for wrong in ({}, {"out": out.float()}, {"out": out[:, :1]}, {"lse": out}, {"dweights": out}):
        with pytest.raises(AssertionError, match="expected|not a result"):
            assert_within_budget(wrong, case)
