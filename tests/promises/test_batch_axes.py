"""Leading batch axes: query, key and value (*batch, H, N, D), and a mask that is shared along some of the axes."""

from dataclasses import replace

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run
from tests.support.expected import MANY

pytestmark = pytest.mark.promise("any shape")
H, NQ, NK, D = 2, 5, 21, 8
SHARED = {  # by which axes the mask is shared -> its shape, and what else the call has
    "the inner axis": ((2, 1, H, NQ, NK), {"with_lse": True}),
    "the outer axis": ((1, 3, H, NQ, NK), {"padded": 0.3, "dropout_p": 0.2}),
    "the inner axis and the heads": ((2, 1, 1, NQ, NK), {"mask": "logits", "padded": 0.3}),
    "the outer axis and the heads": ((1, 3, NQ, NK), {"as_map": True}),
    "the inner axis and the queries": ((2, 1, H, 1, NK), {"Hkv": 1}),
    "the outer axis and the queries": ((1, 3, 1, 1, NK), {"mask": "logits"}),
    "all": ((1, 1, H, NQ, NK), {"with_lse": True, "padded": 0.3}),
    "none": ((2, 3, H, NQ, NK), {"dropout_p": 0.2}),
}


def a_case(shape, device, **more):
    return make_case(6, H, NQ, NK, D, batch=(2, 3), mask_shape=shape, device=device, **more)


@pytest.mark.parametrize("shape, more", SHARED.values(), ids=SHARED)
def test_a_mask_shared_along_some_batch_axes(backend, device, shape, more):
    case = a_case(shape, device, **more)
    assert_within_budget(run(case, backend), case)


@pytest.mark.parametrize("shape", [(2, 1, 1, MANY, NK), (1, 3, 1, MANY, NK), (1, 3, 1, 1, NK)], ids=["inner", "outer", "key-only"])
def test_many_queries(backend, device, shape):
    case = make_case(6, 1, MANY, NK, D, batch=(2, 3), mask_shape=shape, with_lse=True, device=device)
    assert_within_budget(run(case, backend), case)


def test_every_dtype(backend, dtype, device):
    case = a_case(SHARED["the outer axis"][0], device, dtype=dtype, with_lse=True)
    assert_within_budget(run(case, backend), case)


def test_three_batch_axes_are_merged_where_the_mask_treats_them_alike(backend, device):
    case = make_case(8, 1, NQ, NK, D, batch=(2, 2, 2), mask_shape=(2, 2, 1, 1, NQ, NK), device=device)
    assert_within_budget(run(case, backend), case)


def test_the_batch_is_in_row_major_order(backend, device):
    """The same call with one batch axis has the same bits, dropout included."""
    case = make_case(6, H, NQ, NK, D, batch=(2, 3), mask_shape=(2, 3, H, NQ, NK), dropout_p=0.3, device=device)
    flat = replace(
        case, query=case.query.flatten(0, 1), key=case.key.flatten(0, 1), value=case.value.flatten(0, 1), mask=case.mask.flatten(0, 1),
        dout=case.dout.flatten(0, 1),
    )  # fmt: skip
    results, expected = run(case, backend), run(flat, backend)
    assert all(torch.equal(results[name].flatten(), expected[name].flatten()) for name in expected)


def test_any_strides_are_read(backend, device):
    case = a_case(SHARED["the inner axis"][0], device)
    mask = case.mask.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    transposed = replace(case, mask=mask, query=case.query.transpose(0, 1).contiguous().transpose(0, 1))
    assert not transposed.mask.is_contiguous()
    assert_within_budget(run(transposed, backend), transposed)
    both = a_case(SHARED["none"][0], device)
    swapped = replace(both, mask=both.mask.transpose(0, 1).contiguous().transpose(0, 1))  # two own axes that do not merge
    assert_within_budget(run(swapped, backend), swapped)


@pytest.mark.parametrize("nothing", [(0, 3), (2, 0)])
def test_an_empty_batch_axis(backend, device, nothing):
    query = torch.randn(*nothing, H, NQ, D, device=device, requires_grad=True)
    mask = torch.rand(nothing[0], 1, H, NQ, NQ, device=device, requires_grad=True)
    out = soft_masked_attention(query, query, query, mask, backend=backend)
    out.sum().backward()
    assert out.shape == query.shape and not mask.grad.any() and mask.grad.shape == mask.shape


def test_alpha_is_1_unless_given(backend, device):
    case = a_case(SHARED["the inner axis"][0], device)
    left_out, given = replace(case, alpha=None), replace(case, alpha=1.0)
    results, expected = run(left_out, backend), run(given, backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_a_map_has_the_batch_axes(backend, device):
    case = a_case(SHARED["the inner axis"][0], device)
    assert attention_map(case.query, case.key, case.mask, backend=backend).shape == (2, 3, NQ, NK)


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 3, 1)])
def test_more_than_one_change_between_shared_and_own_axes_is_refused(shape):
    query = torch.randn(2, 3, 2, H, NQ, D)
    if shape == (1, 3, 1):
        with pytest.raises(ValueError, match="mask: expected batch axes that are all of size 1 up to one place"):
            soft_masked_attention(query, query, query, torch.rand(*shape, H, NQ, NQ))
        return
    with pytest.raises(ValueError, match="mask: expected batch axes"):
        soft_masked_attention(query, query, query, torch.rand(*shape, H, NQ, NQ))


def test_a_mask_with_another_number_of_batch_axes_is_refused():
    query = torch.randn(2, 3, H, NQ, D)
    for shape in ((NQ, NQ), (H, NQ, NQ), (1, 1, 1, H, NQ, NQ), (3, 1, H, NQ, NQ)):
        with pytest.raises(ValueError, match="mask: expected shape"):
            soft_masked_attention(query, query, query, torch.rand(shape))
