"""dQ with many queries: one program per (batch, head, query block) goes over all keys, reference.py (7).

dalpha is a by-product, one partial sum per program, for calls in which no other pass has it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Inputs, launch
from .primitives import (
    dot,
    live_keys,
    load_alpha,
    load_map_gradient,
    load_mask,
    load_queries,
    load_tile,
    query_program,
    score_gradient,
    store_tile,
)


@triton.jit(do_not_specialize=["Nq", "drop_threshold"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr, mbar_ptr, dq_ptr, dalpha_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod,
    H, Nq, Nk, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    h, m_block, offs_m, b, bh = query_program(H, Nq, BLOCK_M)
    g = h // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < Nq
    q, do, lse_log2, delta = load_queries(
        q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh, rows_ptr + 2 * bh * Nq,
        offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING,
    )  # fmt: skip
    alpha = load_alpha(alpha_ptr, h, stride_ah, HAS_MASK)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if NEED_DALPHA:
        mbar = tl.load(mbar_ptr + bh * Nq + offs_m, mask=row_ok, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dalpha = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
        k = load_tile(k_ptr + b * stride_kb + g * stride_kh, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
        v = load_tile(v_ptr + b * stride_vb + g * stride_vh, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
        mask_tile = mask_ptr + b * stride_mb + h * stride_mh if HAS_MASK else None
        m = load_mask(mask_tile, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], HAS_MASK, HAS_PADDING)
        dp = load_map_gradient(do_ptr + b * stride_dob, weights_ptr, h, offs_m, offs_n, stride_dom, stride_dod, row_ok, live, DV)
        _, ds = score_gradient(
            q, k, do, v, dp, m, live[None, :], lse_log2[:, None], delta[:, None], offs_m[:, None], offs_n[None, :], bh,
            scale, alpha, seed, drop_threshold, keep_scale, HAS_MASK, HAS_DROPOUT, ALLOW_TF32, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if NEED_DQ:
            dq = dot(ds.to(k.dtype), k, dq, ALLOW_TF32)
        if NEED_DALPHA:
            dalpha += tl.sum(ds * (m - mbar[:, None]), 1)
    if NEED_DQ:
        store_tile(dq_ptr + bh * Nq * D, dq * scale, offs_m, offs_d, D, row_ok, offs_d < D)
    if NEED_DALPHA:
        tl.store(dalpha_ptr + m_block * (tl.num_programs(0) // tl.cdiv(Nq, BLOCK_M)) + bh, tl.sum(dalpha, 0))


def partials(inputs: Inputs) -> int:
    """How many rows of dalpha partials `run` fills."""
    return triton.cdiv(inputs.problem.Nq, inputs.tile("dq").block_m)


def run(inputs: Inputs, dout: Tensor, rows: Tensor, mbar: Tensor | None, dquery: Tensor | None, dalpha: Tensor | None) -> None:
    """Fill, where given, dquery (B, H, Nq, D) and the dalpha partials (partials(inputs), B, H)."""
    t, tile = inputs.problem, inputs.tile("dq")
    arguments = inputs.gradient_arguments(tile, dout, rows) | dict(
        mbar_ptr=mbar, dq_ptr=dquery, dalpha_ptr=dalpha,
        NEED_DQ=dquery is not None, NEED_DALPHA=dalpha is not None,
    )  # fmt: skip
    launch(_dq_kernel, t.B * t.H * triton.cdiv(t.Nq, tile.block_m), arguments, tile)
