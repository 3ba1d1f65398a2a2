"""Cases whose weights are at an end of what their dtypes hold, for the shared suite and for the CUDA kernels on an emulated device."""

from __future__ import annotations

from dataclasses import replace

import torch

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
