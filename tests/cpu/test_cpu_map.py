"""The CPU kernels of the attention map: sums of many keys, small weights, and what memory holds of both."""

from dataclasses import replace

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run
from tests.support.cpu_kernels import KERNELS, differing, forced, threads

pytestmark = pytest.mark.promise("CPU kernels")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("alpha", [1.3, 3.3])
def test_rows_of_like_scores_are_summed_within_the_budget(name, alpha):
    """One sum of thousands of like weights would round them all the same way."""
    case = make_case(16, 1, 1, 8000, 8, as_map=True)
    mask = torch.zeros(1, 1, 8000)
    mask[..., ::100] = 1
    case = replace(case, query=torch.zeros_like(case.query), mask=mask, alpha=torch.tensor([alpha]))
    with forced(name):
        assert_within_budget(run(case, "cpu"), case)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("weight", [1e-36, -1e-38])
def test_a_map_of_tiny_head_weights_is_within_the_budget(name, weight):
    case = make_case(2, 4, 13, 1000, 32, as_map=True)
    case = replace(case, head_weights=weight * case.head_weights)
    with forced(name):
        assert_within_budget(run(case, "cpu", needs=()), case)


def test_a_map_of_tiny_head_weights_over_many_keys_is_within_the_budget():
    """So many that the weights of their softmax are not kept: P is made from lse, of which a part is in a factor of its own."""
    case = make_case(1, 1, 1, 140000, 4, as_map=True, dtype=torch.float16, mask=None)
    case.query.zero_(), case.key.zero_()
    case.query[..., 0], case.key[:, :, 7, 0] = 4.0, 5.5
    case = replace(case, head_weights=torch.full((1,), 1e-36))
    assert_within_budget(run(case, "cpu", needs=()), case)


@pytest.mark.parametrize("mask_shape", [(80, 70, 200), (1, 70, 200), (80, 2, 70, 200), (1, 1, 200), None], ids=str)
def test_a_map_whose_weights_are_kept_a_few_at_a_time_is_within_the_budget(mask_shape):
    """All batch elements' would take more than memory holds, and a query block is not all of an element."""
    options = {"mask": None} if mask_shape is None else {"mask_shape": mask_shape}
    case = make_case(80, 2, 70, 200, 8, padded=0.1, as_map=True, **options)
    results = run(case, "cpu")
    assert_within_budget(results, case)
    with threads(3):
        assert not differing(results, run(case, "cpu"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("Nk", [3000, 70000], ids=["rows", "tiles"])
def test_a_nan_score_makes_its_row_nan_though_its_keys_are_out_of_reach(name, Nk):
    case = make_case(1, 2, 70, Nk, 8)
    mask = torch.zeros(1, 1, Nk)
    mask[..., 10], mask[..., -10:] = float("nan"), 300.0
    with forced(name):
        out, lse = soft_masked_attention(case.query, case.key, case.value, mask, 1.0, return_lse=True, backend="cpu")
        amap = attention_map(case.query, case.key, mask, 1.0, backend="cpu")
    assert out.isnan().all() and lse.isnan().all() and amap.isnan().all()
