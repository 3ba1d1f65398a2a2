"""A Triton forward that leaves out the tiles which the mask has already decided: a study, by the bound of tile_skipping.py.

A row's L so far, m_i + log l_i, stands in for the final one, which is not smaller: P_ij = exp(S_ij - L_i) <= exp(U_i - L_i so far), so of a
row's weights each one that is left out is at most u / Nk. How soon L is large is up to the order of visits: by default the largest M first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from tile_skipping import highest
from torch import Tensor

from smattn.kernels import primitives as shared
from smattn.kernels.configs import block_of
from smattn.kernels.primitives import LOG2E
from smattn.testing import Case


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, norms_ptr, order_ptr, out_ptr, lse_ptr, left_out_ptr,
    stride_mb, stride_mm, stride_om, H, Nq, Nk, scale, margin,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """norms: max |k| of (batch, key head, key block); order: the key blocks of (batch, query block); left_out: tiles, of each program."""
    h, m_block, offs_m, _, b, bh = shared.query_program(H, Nq, 1, BLOCK_M)
    g, n_blocks = bh // GROUP, tl.cdiv(Nk, BLOCK_N)
    offs_d, offs_dv, row_ok = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), offs_m < Nq
    alpha = shared.load_alpha(alpha_ptr, h, 1, True)
    q = shared.load_tile(q_ptr + bh * Nq * D, offs_m, offs_d, D, 1, row_ok, offs_d < D)
    q_norms = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)) * (tl.abs(scale) * LOG2E)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    left_out = 0
    for n in range(n_blocks):
        block = tl.load(order_ptr + (b * tl.cdiv(Nq, BLOCK_M) + m_block) * stride_om + n)
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        live = offs_n < Nk
        m = shared.load_mask(mask_ptr + b * stride_mb, offs_m, offs_n, stride_mm, 1, Nq, Nk, live[None, :], True, False)
        bound = q_norms * tl.load(norms_ptr + g * n_blocks + block) + tl.max(m * (alpha * LOG2E), 1)
        counts = row_ok & ((bound <= m_i + tl.log2(l_i) - margin) == 0)  # so does a NaN
        if tl.max(counts.to(tl.int32), 0) > 0:
            k = shared.load_tile(k_ptr + g * Nk * D, offs_n, offs_d, D, 1, live, offs_d < D)
            s = shared.score_tile(shared.matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, False), m, live[None, :], scale, alpha, True)
            p, rescale, m_i, l_i = shared.softmax_step(s, m_i, l_i)
            v = shared.load_tile(v_ptr + g * Nk * DV, offs_n, offs_dv, DV, 1, live, offs_dv < DV)
            acc = shared.dot(p.to(v.dtype), v, acc * rescale[:, None], False)
        else:
            left_out += 1
    out, _, lse = shared.softmax_finish(acc, l_i, m_i, l_i, 1.0)
    shared.store_tile(out_ptr + bh * Nq * DV, out, offs_m, offs_dv, DV, row_ok, offs_dv < DV)
    tl.store(lse_ptr + bh * Nq + offs_m, lse, mask=row_ok)
    tl.store(left_out_ptr + tl.program_id(0), left_out)


def visits(mask: Tensor, queries: int, keys: int) -> Tensor:
    """The key blocks of each query block, that with the largest M first: (B, query blocks|1, key blocks) of a mask (B, Nq|1, Nk)."""
    peaks = highest(highest(mask, keys).mT, min(queries, mask.shape[1])).mT
    return peaks.argsort(dim=2, descending=True, stable=True)


def forward(case: Case, queries: int, keys: int, u: float, ordered: bool = True) -> tuple[dict[str, Tensor], float]:
    """Out and lse of a case, in tiles of so many queries and keys, and the share of these left out.

    Tensors are contiguous, the mask is (B, Nq|1, Nk), and no key is padding.
    """
    (B, H, Nq, D), (_, Hkv, Nk, Dv) = case.query.shape, case.value.shape
    assert case.mask is not None and isinstance(case.alpha, Tensor)
    m_blocks, n_blocks = -(-Nq // queries), -(-Nk // keys)
    norms = highest(case.key.float().norm(dim=3), keys)  # (B, Hkv, n_blocks)
    order = visits(case.mask, queries, keys) if ordered else torch.arange(n_blocks, device=norms.device)
    order = order.expand(B, m_blocks, n_blocks).contiguous()
    out, lse = case.query.new_empty(B, H, Nq, Dv), case.query.new_empty((B, H, Nq), dtype=torch.float32)
    left_out = torch.empty(B * m_blocks * H, dtype=torch.int32, device=norms.device)
    arguments = dict(
        q_ptr=case.query, k_ptr=case.key, v_ptr=case.value, mask_ptr=case.mask, alpha_ptr=case.alpha, norms_ptr=norms, order_ptr=order,
        out_ptr=out, lse_ptr=lse, left_out_ptr=left_out,
        stride_mb=case.mask.stride(0), stride_mm=case.mask.stride(1) if case.mask.shape[1] > 1 else 0, stride_om=n_blocks,
        H=H, Nq=Nq, Nk=Nk, scale=D**-0.5, margin=math.log2(Nk / u), GROUP=H // Hkv, D=D, DV=Dv,
        BLOCK_M=queries, BLOCK_N=keys, BLOCK_D=block_of(D), BLOCK_DV=block_of(Dv),
    )  # fmt: skip
    _forward_kernel[(left_out.numel(),)](**arguments)
    return {"out": out, "lse": lse}, left_out.sum().item() / (left_out.numel() * n_blocks)
