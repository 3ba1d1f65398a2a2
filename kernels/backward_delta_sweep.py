"""The first step of backward where forward left no remainder of its output: delta is summed over the keys as P*dP, reference.py (5).

Two products more for each tile of scores, and no memory: for calls whose queries outweigh everything else. What is stored is what
backward_delta.py stores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Saved
from . import backward_dq, descriptors
from .backward_delta import store_dalpha_rows
from .launch import launch
from .operands import attention_arguments, strides
from .primitives.load import head_of, live_keys, live_span, load_alpha, load_block, load_mask, load_tile, mask_offset, query_program
from .primitives.rows import load_dlse, load_softmax, store_rows
from .primitives.score import of_rows, score_gradient
from .tiles import cdiv


@triton.jit(do_not_specialize=["Nq", "drop_threshold"])
def _delta_sweep_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, lse_ptr, normalizer_ptr,
    dl_ptr, mbar_ptr, rows_ptr, dalpha_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod, stride_dlb, stride_dlh, stride_dlm,
    H, Nq, Nk, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    HAS_DLSE: tl.constexpr, NEED_DALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    h, m_block, offs_m, _whole, b, bh = query_program(H, Nq, 1, BLOCK_M)
    g = h // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < Nq
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, offs_m, offs_d, stride_qm, stride_qd, row_ok, offs_d < D)
    do = load_tile(do_ptr + b * stride_dob + h * stride_doh, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV)
    shift, factor, dead = load_softmax(lse_ptr, normalizer_ptr, bh * Nq, offs_m, row_ok)
    alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    delta = tl.zeros([BLOCK_M], tl.float32)
    pad_batch = pad_ptr + b * stride_pb if HAS_PADDING else None
    lo, hi = live_span(pad_batch, 0, Nk, stride_pn, HAS_PADDING, BLOCK_N)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        live = live_keys(pad_batch, offs_n, Nk, stride_pn, HAS_PADDING)
        k_head, v_head = head_of(k_ptr, b, g, stride_kb, stride_kh), head_of(v_ptr, b, g, stride_vb, stride_vh)
        k = load_block(k_head, b, g, start_n, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
        v = load_block(v_head, b, g, start_n, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
        mask_tile = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) + h * stride_mh if MASK_KIND else None
        m = load_mask(mask_tile, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
        _, p_dp = score_gradient(  # with a delta of 0
            q, k, do, v, None, m, live[None, :], shift[:, None], of_rows(factor), 0.0, offs_m[:, None], offs_n[None, :], bh,
            scale, alpha, seed, drop_threshold, keep_scale, MASK_KIND, HAS_DROPOUT, ALLOW_TF32, BLOCK_M, BLOCK_N, tl.constexpr(False),
        )  # fmt: skip
        delta += tl.sum(p_dp, 1)
    dl = load_dlse(dl_ptr + b * stride_dlb + h * stride_dlh if HAS_DLSE else None, stride_dlm, offs_m, row_ok, HAS_DLSE)
    store_rows(rows_ptr, normalizer_ptr, bh * Nq, shift, tl.where(dead, 0.0, delta - dl), offs_m, row_ok)
    if NEED_DALPHA:
        dalpha_rows = dalpha_ptr + m_block * (tl.num_programs(0) // tl.cdiv(Nq, BLOCK_M)) + bh
        store_dalpha_rows(dalpha_rows, mbar_ptr + bh * Nq, dl, dead, offs_m, row_ok)


def run(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, rows: Tensor, dalpha: Tensor | None) -> None:
    """Fill rows (room_for_rows) and, where given, dalpha partials (backward_dq.partials(call), B, H): zeros without dlse."""
    t, tile = call.problem, backward_dq.tile_of(call)
    arguments = attention_arguments(call, tile) | strides("do", "bhmd", dout) | strides("dl", "bhm", dlse) | dict(
        **descriptors.blocks(tile, k_ptr=call.key, v_ptr=call.value),
        do_ptr=dout, lse_ptr=saved.lse, normalizer_ptr=saved.normalizer, dl_ptr=dlse, mbar_ptr=saved.mbar, rows_ptr=rows, dalpha_ptr=dalpha,
        HAS_DLSE=dlse is not None, NEED_DALPHA=dalpha is not None,
    )  # fmt: skip
    launch(_delta_sweep_kernel, t.B * t.H * cdiv(t.Nq, tile.block_m), arguments, tile)
