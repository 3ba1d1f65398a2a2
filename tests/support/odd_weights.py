"""Cases whose weights are at an end of what their dtypes hold, for the shared suite and for the CUDA kernels on an emulated device."""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch

from smattn import soft_masked_attention
from smattn.testing import Case, make_case


def leading_keys_out_of_range(Nq: int, *, as_map: bool, device: str = "cpu") -> Case:
    """At alpha = 0.5 a score of half finfo.min is in range. Such keys weigh 1 until a larger one comes, so M overflows in their sum."""
    case = make_case(1, 2, Nq, 1100, 8, with_lse=True, as_map=as_map, device=device)
    case.mask[..., :1000] = torch.finfo(torch.float32).min
    return replace(case, alpha=torch.full((2,), 0.5, device=device))


def many_weights_below_float16(Nq: int, *, device: str = "cpu") -> Case:
    """One key has nearly all the weight and a value of 0. The others weigh 1.5e-8 each, which float16 rounds to 0, and make the output."""
    case = make_case(1, 2, Nq, 1100, 8, dtype=torch.float16, mask_dtype=torch.float32, device=device)
    case.query.zero_(), case.mask.zero_(), case.value.fill_(30000.0)
    case.mask[..., 7], case.value[:, :, 7] = 1.0, 0.0
    return replace(case, alpha=torch.full((2,), 18.0, device=device), dout=case.dout / 30000)


def assert_weights_of_nearly_uniform_rows(backend: str, dtype: torch.dtype, *, size: float, seed: int, device: str = "cpu") -> None:
    """Of a value with one column and dO = 1, dvalue is P: here of one query over 9504 keys, whose scores are of the given size.

    lse is far larger than they are, and what rounding takes from it would make all weights wrong by as much. The bound is the error budget
    without plain PyTorch's part. float64 has no exact answer but in more digits, numpy's long double.
    """
    torch.manual_seed(seed)
    query, key = torch.ones(1, 1, 2, 1, dtype=dtype), size * torch.randn(1, 1, 9504, 1, dtype=dtype)
    value = torch.zeros(1, 1, 9504, 1, dtype=dtype, device=device, requires_grad=True)
    out = soft_masked_attention(query.to(device), key.to(device), value, scale=1.0, backend=backend)
    (weights,) = torch.autograd.grad(out[0, 0, 0], value)
    scores = key.double().flatten().numpy().astype(numpy.longdouble)
    exact = numpy.exp(scores - scores.max())
    exact /= exact.sum()
    difference = weights.double().flatten().cpu().numpy() - exact
    u = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    assert abs(difference / exact).max() <= torch.finfo(dtype).eps + 4 * u * (1 + abs(scores).max())
