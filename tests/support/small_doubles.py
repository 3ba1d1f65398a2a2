"""Small cases in float64, for finite differences."""

from __future__ import annotations

import torch

from smattn.testing import make_case

SHAPES = [None, (2, 3, 5), (1, 1, 5), (2, 1, 5), (2, 4, 3, 5), (1, 4, 1, 5), (1, 1, 3, 5)]
B, H, HKV, NQ, NK, D, DV = 2, 4, 2, 3, 5, 3, 2


def a_case(shape, **kw):
    mask = None if shape is None else "uniform"
    double = dict(dtype=torch.float64, mask_dtype=torch.float64)
    return make_case(B, H, NQ, NK, D, Dv=DV, Hkv=HKV, mask=mask, mask_shape=shape, rng=1, **double, **kw)


def leaves(case):
    tensors = [case.query, case.key] + ([] if case.is_map else [case.value])
    tensors += [] if case.mask is None else [case.mask, case.alpha / 8]  # finite differences need a softmax that is not saturated
    return [t.clone().requires_grad_() for t in tensors]
