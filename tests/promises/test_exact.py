"""Exact: on every backend the output and all gradients of any call are inside the error budget."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from smattn import ops, soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run, run_plain, workload_case
from tests.support.odd_weights import assert_weights_of_nearly_uniform_rows
from tests.support.strategies import cases

pytestmark = pytest.mark.promise("exact")
MANY, FEW = 60, 10  # random calls per dtype; Triton gets few: its kernels are interpreted, or compiled anew for each shape
no_check = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
GRADIENTS = {"dquery", "dkey", "dvalue", "dmask", "dalpha"}


def hypothesize(backend, dtype, device, examples, **kw):
    @settings(no_check, max_examples=examples)
    @given(st.data())
    def within_budget(data):
        case = data.draw(cases(dtype, device, **kw))
        note(f"{case.problem()}, strides { ({name: t.stride() for name, t in case.inputs().items()}) }")
        assert_within_budget(run(case, backend), case)

    within_budget()
    return True


def test_random_calls(backend, dtype, device):
    assert hypothesize(backend, dtype, device, FEW if backend == "triton" else MANY)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_random_calls_without_the_remainder(backend, half, device, monkeypatch):
    """Large calls may drop what rounding took from the output to save memory. Random calls are never so large, so the test drops it."""
    monkeypatch.setattr(ops, "queries_with_remainder", lambda problem: 0)
    assert hypothesize(backend, half, device, FEW if backend == "triton" else MANY)


def test_random_maps(map_backend, dtype, device):
    assert hypothesize(map_backend, dtype, device, FEW if map_backend == "triton" else MANY, as_map=True)


@pytest.mark.slow
def test_more_random_calls(backend, dtype, device):
    interpreted = backend == "triton" and device == "cpu"
    assert hypothesize(backend, dtype, device, 8 if interpreted else 300, largest=100 if interpreted else 300)


def test_all_five_gradients_come_back(backend, dtype, device):
    case = make_case(2, 4, 5, 33, 8, dtype=dtype, with_lse=True, device=device)
    results = run(case, backend)
    assert set(results) == {"out", "lse"} | GRADIENTS
    assert {name: t.dtype for name, t in results.items()} == {
        **dict.fromkeys(("out", "dquery", "dkey", "dvalue"), dtype),
        **dict.fromkeys(("lse", "dalpha"), torch.promote_types(dtype, torch.float32)),
        "dmask": torch.float32,
    }  # fmt: skip
    assert_within_budget(results, case)


def test_a_gradient_through_lse_alone(backend, dtype, device):
    case = make_case(2, 4, 5, 33, 8, dtype=dtype, with_lse=True, device=device)
    case = replace(case, dout=torch.zeros_like(case.dout))
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs().items()}
    _, lse = soft_masked_attention(**leaves, return_lse=True, backend=backend)
    grads = torch.autograd.grad(lse, list(leaves.values()), case.dlse)
    assert_within_budget({"lse": lse.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}, case)
    assert not grads[2].any()


@pytest.mark.promise("any shape")
@pytest.mark.parametrize("D", [1, 2, 3, 17, 32, 48, 64, 72, 128, 200, 256])
def test_head_sizes(backend, device, D):
    case = make_case(1, 2, 5, 40, D, Dv=257 - D, with_lse=True, device=device)
    assert_within_budget(run(case, backend), case)


@pytest.mark.promise("any shape")
@pytest.mark.parametrize("Nq, Nk", [(1, 1), (1, 2), (7, 1), (1, 97), (16, 32), (17, 33), (31, 64), (128, 16), (129, 16), (130, 33)])
def test_lengths(backend, device, Nq, Nk):
    """With one key some gradients are exactly 0. The other lengths lie at and next to the edges of tiles and of the few-queries regime."""
    case = make_case(1, 2, Nq, Nk, 8, mask_shape=(1, 2, Nq, Nk), with_lse=True, device=device)
    assert_within_budget(run(case, backend), case)


@pytest.mark.promise("any shape")
@pytest.mark.parametrize("Nk", [1, 35])
@pytest.mark.parametrize("Nq", [7, 131])
def test_a_map_over_one_key(map_backend, dtype, device, Nq, Nk):
    """One that is attended to: dalpha is exactly 0, since the mean of one key's M is that M."""
    case = make_case(1, 2, Nq, Nk, 8, Hkv=1, dtype=dtype, as_map=True, mask_shape=(1, 2, Nq, Nk), device=device)
    if Nk > 1:
        case = replace(case, key_padding_mask=torch.arange(Nk, device=device)[None] != 20)
    assert_within_budget(run(case, map_backend), case)


MASK_SHAPES = [*product((1, 2), repeat=3), *product((1, 2), repeat=2)]
MANY_QUERIES = [(shape, 131) for shape in MASK_SHAPES if len(shape) == 3]


@pytest.mark.parametrize("shape, Nq", [*product(MASK_SHAPES, [5, 40]), *MANY_QUERIES], ids=str)
def test_mask_broadcasts(backend, device, shape, Nq):
    """`shape` has the axes batch, head (absent in a 3-D mask) and query; 2 stands for the full size."""
    sizes = (*shape[:-1], Nq if shape[-1] == 2 else 1, 35)
    case = make_case(2, 2, Nq, 35, 8, Hkv=1, mask_shape=sizes, device=device)
    assert_within_budget(run(case, backend), case)


@pytest.mark.parametrize("shape, Nq", [*product(MASK_SHAPES, [5]), *MANY_QUERIES], ids=str)
def test_mask_broadcasts_of_a_map(map_backend, device, shape, Nq):
    sizes = (*shape[:-1], Nq if shape[-1] == 2 else 1, 35)
    case = make_case(2, 2, Nq, 35, 8, Hkv=1, mask_shape=sizes, as_map=True, padded=0.3, device=device)
    assert_within_budget(run(case, map_backend), case)


@pytest.mark.parametrize("Nq", [5, 40, 131])
@pytest.mark.parametrize("option", ["no mask", "dropout", "padding", "lse", "gqa", "blob", "all"])
def test_options(backend, dtype, device, Nq, option):
    chosen = {
        "no mask": dict(mask=None), "dropout": dict(dropout_p=0.4), "padding": dict(padded=0.4), "lse": dict(with_lse=True),
        "gqa": dict(Hkv=1), "blob": dict(mask="blob"),
        "all": dict(dropout_p=0.2, padded=0.3, with_lse=True, Hkv=1, mask_dtype=torch.bfloat16),
    }[option]  # fmt: skip
    case = make_case(2 if Nq == 5 else 1, 2, Nq, 35, 8, dtype=dtype, device=device, rng=3, **chosen)
    assert_within_budget(run(case, backend), case)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, "uniform"])
@pytest.mark.parametrize("Nk", [1, 5])
def test_dropout_of_the_one_key_attended_to(backend, half, device, Nk, mask):
    """O is V/(1-p) where the key is kept, which 16 bits rarely hold, and delta is to cancel a dP made of it: dquery and dkey are 0."""
    for rng in range(3):
        case = make_case(2, 4, 13, Nk, 16, Dv=5, rng=rng, dtype=half, mask=mask, dropout_p=0.3, device=device)
        if Nk > 1:
            case = replace(case, key_padding_mask=torch.arange(Nk, device=device).ne(2).expand(2, -1).contiguous())
        assert_within_budget(run(case, backend), case)


def test_many_queries_and_many_keys(backend, dtype, device):
    """Several blocks of both, under every option."""
    case = make_case(1, 2, 140, 130, 8, Dv=5, Hkv=1, dtype=dtype, padded=0.2, dropout_p=0.2, with_lse=True, device=device)
    assert_within_budget(run(case, backend), case)


def test_a_map_of_many_queries_and_many_keys(map_backend, dtype, device):
    case = make_case(1, 2, 140, 130, 8, Hkv=1, dtype=dtype, padded=0.2, as_map=True, device=device)
    assert_within_budget(run(case, map_backend), case)


@pytest.mark.parametrize("size, seed", [(1e-3, 0), (1e-3, 1), (0.1, 2)])
def test_the_weights_of_nearly_uniform_rows(backend, dtype, device, size, seed):
    assert_weights_of_nearly_uniform_rows(backend, dtype, size=size, seed=seed, device=device)


@pytest.mark.parametrize("size", [1e-30, 30.0, 1000.0])
def test_masks_out_of_their_usual_range(backend, dtype, device, size):
    case = make_case(2, 2, 5, 35, 8, dtype=dtype, with_lse=True, device=device)
    case = replace(case, mask=(case.mask - 0.5) * size)
    assert_within_budget(run(case, backend), case)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -7.5, 1000.0])
def test_a_float_alpha(backend, dtype, device, alpha):
    case = replace(make_case(2, 2, 5, 35, 8, dtype=dtype, device=device), alpha=alpha)
    results = run(case, backend)
    assert "dalpha" not in results
    assert_within_budget(results, case)


def test_a_nan_that_is_attended_to_comes_out_where_plain_torch_has_it(backend, device):
    case = make_case(2, 2, 3, 35, 8, device=device)
    case.key[0, 1, 20] = float("nan")
    case.mask[1, 2, 4] = float("nan")
    expected = torch.zeros(2, 2, 3, dtype=torch.bool, device=device)
    expected[0, 1] = expected[1, :, 2] = True
    assert torch.equal(run(case, backend)["out"].isnan(), expected[..., None].expand(2, 2, 3, 8))


def test_keys_ruled_out_by_minus_infinity_before_the_first_that_is_not(backend, device):
    case = make_case(1, 2, 3, 300, 8, with_lse=True, device=device)
    case.mask[0, 1, :200] = float("-inf")  # whole blocks of keys
    assert_within_budget(run(case, backend, ("query", "key", "value", "mask")), case)  # dalpha sums 0 * -inf


def set_infinite_scores(mask):
    mask[1, 1:, [5, 250]] = float("inf")
    mask[1, 2, 200] = float("nan")


@pytest.mark.parametrize("Nq", [3, 40])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_query_with_a_score_of_plus_infinity_is_nan_and_its_lse_infinite_as_in_plain_torch(backend, device, Nq, dropout_p):
    case = make_case(2, 2, Nq, 300, 8, with_lse=True, dropout_p=dropout_p, device=device)
    case = replace(case, alpha=case.alpha.abs())
    set_infinite_scores(case.mask)
    results, plainly = run(case, backend), run_plain(case)
    assert results["lse"][1, :, 1].eq(float("inf")).all() and results["lse"][1, :, 2].isnan().all()
    for name in results if dropout_p == 0 else ("out", "lse"):  # in a gradient, a dropped element may be selected out or be NaN times 0
        assert torch.equal(results[name].isnan(), plainly[name].isnan()), name
        assert torch.equal(results[name].isinf(), plainly[name].isinf()), name


def test_a_map_with_scores_of_plus_infinity_is_nan_where_it_is_in_plain_torch(map_backend, device):
    case = make_case(2, 2, 5, 300, 8, as_map=True, device=device)
    case = replace(case, alpha=case.alpha.abs())
    set_infinite_scores(case.mask)
    results, plainly = run(case, map_backend), run_plain(case)
    for name in results:
        assert torch.equal(results[name].isnan(), plainly[name].isnan()), name


def set_nan_scores_out_of_reach(case):
    """Beside the keys 100 to 119 the weight of a key whose score is NaN, or 0, would be 0 in float32 and fall out of every sum."""
    mask = torch.zeros_like(case.mask)
    mask[..., 100:120] = 300.0
    mask[1, 1, 5] = mask[1, 2, 250] = float("nan")
    return replace(case, mask=mask, alpha=torch.ones_like(case.alpha))


@pytest.mark.parametrize("Nq", [3, 20])
def test_a_nan_score_far_below_the_others_makes_its_row_nan_as_in_plain_torch(backend, dtype, device, Nq):
    case = set_nan_scores_out_of_reach(make_case(2, 2, Nq, 300, 8, dtype=dtype, with_lse=True, device=device))
    results, plainly = run(case, backend), run_plain(case)
    assert results["lse"][1, :, 1:3].isnan().all()
    for name in results:
        assert torch.equal(results[name].isnan(), plainly[name].isnan()), name


def test_a_map_with_a_nan_score_far_below_the_others_is_nan_where_it_is_in_plain_torch(map_backend, device):
    case = set_nan_scores_out_of_reach(make_case(2, 2, 5, 300, 8, as_map=True, device=device))
    results, plainly = run(case, map_backend), run_plain(case)
    assert results["map"][1, 1:3].isnan().all()
    for name in results:
        assert torch.equal(results[name].isnan(), plainly[name].isnan()), name


@pytest.mark.parametrize(
    "name, mask", [("pair128", "bias"), *product(["hodor_infer", "hodor_train", "vit_cls"], ["uniform", "blob"])]
)
@pytest.mark.slow
@pytest.mark.gpu
def test_named_workloads(backend, device, name, mask):
    if name == "vit_cls" and device == "cpu":
        pytest.skip("the float64 answer to vit_cls takes too much memory on a CPU")
    if backend == "triton" and device == "cpu":
        pytest.skip("interpreted Triton takes minutes at this size")
    case = workload_case(name, mask=mask, device=device)
    assert_within_budget(run(case, backend), case)
