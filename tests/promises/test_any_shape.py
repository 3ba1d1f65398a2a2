"""Any shape: element offsets past 2^31, and tensors in any layout."""

import mmap
from dataclasses import replace

import pytest
import torch

from smattn import soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run

pytestmark = pytest.mark.promise("any shape")


def huge(elements, dtype, device):
    """A tensor of so many elements. On a CPU memory is committed only where it is written."""
    if device != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def spread(tensor, strides):
    """The same values with these strides, in a storage that is just large enough."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    far = huge(last + 1, tensor.dtype, tensor.device.type).as_strided(tensor.shape, strides)
    return far.copy_(tensor)


FAR = 2**31 + 2**20


def far_strides(shape, axis):
    """Strides under which elements do not overlap and the last one of this axis lies past 2^31."""
    order = [a for a in range(len(shape)) if a != axis][::-1]
    strides, step = [0] * len(shape), 1
    for a in order:
        strides[a], step = step, step * shape[a]
    strides[axis] = FAR // (shape[axis] - 1) + 1
    return strides


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "query", "key"])
@pytest.mark.parametrize("Nq", [4, 132])
def test_mask_offsets_past_2_to_the_31(backend, device, axis, Nq):
    case = make_case(2, 1, Nq, 33, 8, mask_dtype=torch.float16, device=device)
    far = replace(case, mask=spread(case.mask, far_strides(case.mask.shape, axis)))
    assert far.mask[-1, -1, -1].data_ptr() - far.mask.data_ptr() > 2**32  # bytes: 2^31 elements
    expected, results = run(case, backend), run(far, backend)
    assert [name for name in expected if not torch.equal(expected[name], results[name])] == []


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_query_key_and_value_offsets_past_2_to_the_31(backend, device, name, axis):
    case = make_case(2, 2, 5, 33, 8, dtype=torch.float16, device=device)
    tensor = getattr(case, name)
    far = replace(case, **{name: spread(tensor, far_strides(tensor.shape, axis))})
    assert_within_budget(run(far, backend), case)


def test_padding_offsets_past_2_to_the_31(backend, device):
    case = make_case(2, 2, 5, 33, 8, padded=0.4, device=device)
    far = replace(case, key_padding_mask=spread(case.key_padding_mask, (FAR, 1)))
    expected, results = run(case, backend), run(far, backend)
    assert [name for name in expected if not torch.equal(expected[name], results[name])] == []


def test_an_incoming_gradient_of_stride_zero(backend, device):
    """The gradient that .sum().backward() sends has stride zero on every axis."""
    case = make_case(2, 2, 5, 33, 8, with_lse=True, device=device)
    ones = torch.ones((), device=device)
    case = replace(case, dout=ones.expand(case.dout.shape), dlse=ones.expand(case.dlse.shape))
    assert_within_budget(run(case, backend), case)


def test_one_tensor_for_query_key_and_value(backend, device):
    case = make_case(2, 2, 9, 9, 8, device=device)
    leaf = case.query.clone().requires_grad_()
    out = soft_masked_attention(leaf, leaf, leaf, case.mask, case.alpha, backend=backend)
    (grad,) = torch.autograd.grad(out, leaf, case.dout)
    results = run(replace(case, key=case.query, value=case.query), backend)
    torch.testing.assert_close(grad, results["dquery"] + results["dkey"] + results["dvalue"])


def test_query_key_and_value_cut_from_one_projection(backend, device):
    """A transformer's (B, N, 3, H, D) projection, permuted and not copied."""
    case = make_case(2, 2, 9, 9, 8, device=device)
    packed = torch.stack([case.query, case.key, case.value]).permute(1, 3, 0, 2, 4).contiguous()  # (B, N, 3, H, D)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    assert query.data_ptr() != case.query.data_ptr() and not query.is_contiguous()
    assert_within_budget(run(replace(case, query=query, key=key, value=value), backend), case)
