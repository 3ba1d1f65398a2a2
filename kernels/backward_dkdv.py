"""dK and dV with many queries: one program per (batch, kv head, key block) goes over the queries of its group's heads, reference.py (7).

Tiles are transposed, [BLOCK_N, BLOCK_M], which is how the products want them. The gradient of a mask that broadcasts over queries is a sum
over the columns of these tiles: a row per head, or per kv head where M has no heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from . import descriptors
from .launch import launch
from .operands import Rows, gradient_arguments
from .primitives.load import head_of, live_keys, load_alpha, load_map_gradient, load_mask, load_queries, load_tile, mask_offset
from .primitives.rows import load_rows
from .primitives.score import dot, of_columns, score_gradient
from .primitives.store import store_key_gradients
from .tiles import cdiv


@triton.jit(do_not_specialize=["Nq", "drop_threshold"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr, normalizer_ptr, dk_ptr, dv_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod,
    H, Nq, Nk, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DMASK: tl.constexpr, MASK_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    Hkv = H // GROUP
    g = pid % Hkv
    n_blocks = tl.cdiv(Nk, BLOCK_N)
    offs_n = (pid // Hkv % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // Hkv // n_blocks).to(tl.int64)
    bg = b * Hkv + g
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
    k = load_tile(k_ptr + b * stride_kb + g.to(tl.int64) * stride_kh, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
    v = load_tile(v_ptr + b * stride_vb + g.to(tl.int64) * stride_vh, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dm = tl.zeros([BLOCK_N], tl.float32)
    Nq_seen = tl.where(tl.max(live.to(tl.int32), 0) > 0, Nq, 0) if HAS_PADDING else Nq  # a block of padding reads no query
    for r in range(0, GROUP):
        h = (g * GROUP + r).to(tl.int64)
        bh = b * H + h
        alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
        q_head, do_head = head_of(q_ptr, b, h, stride_qb, stride_qh), head_of(do_ptr, b, h, stride_dob, stride_doh)
        for start_m in range(0, Nq_seen, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            # Counted from the block's first row, so that the loads of a thread share an address.
            shift, factor, delta = load_rows(rows_ptr, normalizer_ptr, bh * Nq + start_m, tl.arange(0, BLOCK_M), Nq - start_m)
            q, do = load_queries(
                q_head, do_head, b, h, shift, start_m,
                offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING,
            )  # fmt: skip
            mask_tile = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) + h * stride_mh if MASK_KIND else None
            m = load_mask(mask_tile, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
            if MASK_KIND:
                m = tl.trans(m)
            dp = load_map_gradient(do_head, weights_ptr, h, offs_n, offs_m, stride_dod, stride_dom, live, offs_m < Nq, DV)
            p, ds = score_gradient(  # [BLOCK_N, BLOCK_M]
                k, q, v, do, dp, m, None, shift[None, :], of_columns(factor), delta[None, :], offs_m[None, :], offs_n[:, None], bh,
                scale, alpha, seed, drop_threshold, keep_scale, MASK_KIND, HAS_DROPOUT, ALLOW_TF32, BLOCK_N, BLOCK_M, tl.constexpr(True),
            )  # fmt: skip
            if NEED_DV:
                dv = dot(p.to(do.dtype), do, dv, ALLOW_TF32)
            if NEED_DK:
                dk = dot(ds.to(q.dtype), q, dk, ALLOW_TF32)
            if NEED_DMASK:
                dm += alpha * tl.sum(ds, 1)
        if NEED_DMASK and MASK_PER_HEAD:
            tl.store(dmask_ptr + bh * Nk + offs_n, tl.where(live, dm, 0.0).to(dmask_ptr.dtype.element_ty), mask=offs_n < Nk)
            dm = tl.zeros([BLOCK_N], tl.float32)
    if NEED_DMASK and not MASK_PER_HEAD:
        tl.store(dmask_ptr + bg * Nk + offs_n, tl.where(live, dm, 0.0).to(dmask_ptr.dtype.element_ty), mask=offs_n < Nk)
    store_key_gradients(dk_ptr, dv_ptr, dk, dv, bg, offs_n, live, Nk, scale, keep_scale, NEED_DK, NEED_DV, D, DV, BLOCK_D, BLOCK_DV)


def run(call: Call, dout: Tensor, rows: Rows, dkey: Tensor | None, dvalue: Tensor | None, dmask: Tensor | None) -> None:
    """Fill, where given, dkey (B, Hkv, Nk, D), dvalue (B, Hkv, Nk, Dv) and a key-only mask's dmask (B, H|Hkv, 1, Nk), any dtype."""
    t, tile = call.problem, descriptors.tile(call, "dkdv", call.query, dout, takes_padding=True)
    arguments = gradient_arguments(call, tile, dout, rows) | descriptors.blocks(tile, q_ptr=call.query, do_ptr=dout) | dict(
        dk_ptr=dkey, dv_ptr=dvalue, dmask_ptr=dmask,
        NEED_DK=dkey is not None, NEED_DV=dvalue is not None, NEED_DMASK=dmask is not None,
        MASK_PER_HEAD=dmask is not None and dmask.shape[1] == t.H,
    )  # fmt: skip
    launch(_dkdv_kernel, t.B * t.Hkv * cdiv(t.Nk, tile.block_n), arguments, tile)
