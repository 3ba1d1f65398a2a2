"""16-bit numbers as the CPU kernels read and store them: one key has the weight 1, so that attention only converts."""

import pytest
import torch

from smattn import soft_masked_attention
from tests.support.cpu_kernels import KERNELS, forced

pytestmark = [pytest.mark.promise("CPU kernels"), pytest.mark.parametrize("name", KERNELS)]

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Rows of whole cache lines, of whole vectors, and of neither: each is stored in another way.
SIZES = pytest.mark.parametrize("D", [64, 16, 13])


def every_number(dtype, D):
    """All 65536 of the dtype, and 0 to fill the rows: [1, 1, n, D]."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % D)).view(1, 1, -1, D)


def normal(numbers):
    """0 in place of what the matrix instructions for bfloat16 may take for 0."""
    return torch.where(numbers.abs() < torch.finfo(numbers.dtype).tiny, 0, numbers)


@DTYPES
@SIZES
def test_every_number_is_read_and_stored_as_it_is(name, dtype, D):
    value = every_number(dtype, D).transpose(0, 2)  # a batch of single keys
    value = value if dtype == torch.float16 else normal(value)
    query = key = torch.zeros(len(value), 1, 1, 8, dtype=dtype)
    with forced(name):
        out = soft_masked_attention(query, key, value, backend="cpu")
    torch.testing.assert_close(out, value, rtol=0, atol=0, equal_nan=True)


@DTYPES
@SIZES
def test_a_sum_is_rounded_to_the_nearest(name, dtype, D):
    """dV of one key is the sum of dO over the query heads that share it."""
    finite = every_number(dtype, D)
    finite = torch.where(finite.abs() < 2**14, finite, 0)
    finite = finite if dtype == torch.float16 else normal(finite)
    mixed = finite.flatten()[torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(0))].view_as(finite)
    dout = torch.cat([finite, mixed / 64 if dtype == torch.float16 else normal(mixed / 64)]).permute(2, 0, 1, 3).contiguous()
    value = torch.zeros(len(dout), 1, 1, D, dtype=dtype, requires_grad=True)
    query, key = torch.zeros(len(dout), 2, 1, D, dtype=dtype), torch.zeros(len(dout), 1, 1, D, dtype=dtype)
    with forced(name):
        (dvalue,) = torch.autograd.grad(soft_masked_attention(query, key, value, enable_gqa=True, backend="cpu"), value, dout)
    expected = dout.float().sum(1, keepdim=True).to(dtype)
    if dtype == torch.bfloat16:
        dvalue, expected = normal(dvalue), normal(expected)
    assert torch.equal(dvalue, expected)
