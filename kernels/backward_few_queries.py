"""Backward with few queries: a program owns blocks of keys and goes over all heads, reference.py (5)-(8).

The queries fit one tile, so dK and dV are stored once, and dM once after its sum over heads (and over the batch, where M is shared by it)
in registers; dalpha leaves one partial per key block. dQ is summed per split of the keys in a float32 buffer: here where the queries are so
few that registers last (5 products), else by backward_dq.py first (7 products, and keys, values and mask are read twice). What runs first
works out delta. A last kernel adds up dQ and dalpha in a fixed order: two launches in all, or three.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Gradients, Needs
from . import backward_dmask, plan
from .launch import launch
from .operands import Rows, accumulator, gradient_arguments, sharing_arguments, tile_of
from .primitives.load import SOFT, live_keys, load_alpha, load_map_gradient, load_mask, load_queries, load_tile, mask_offset, unless_padding
from .primitives.rows import first_rows, load_rows
from .primitives.score import dot, matmul, of_rows, score_gradient
from .primitives.store import store_dalpha, store_key_gradients, store_mask_tile, store_tile
from .tiles import cdiv


@triton.jit(do_not_specialize=["Nq", "drop_threshold", "n_splits", "split_blocks"])
def _few_queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr,
    normalizer_ptr, mbar_ptr, dq_ptr, dk_ptr, dv_ptr, dmask_ptr, dalpha_ptr, out_ptr, remainder_ptr, lse_ptr, dl_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod, stride_dlb, stride_dlh, stride_dlm,
    B, H, Nq, Nk, owners, sharers, part_sharers, own_step, share_step, n_splits, split_blocks, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    FIRST_PASS: tl.constexpr, HAS_DLSE: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DMASK: tl.constexpr, NEED_DALPHA: tl.constexpr,
    SHARED_B: tl.constexpr, SHARED_H: tl.constexpr, SHARED_M: tl.constexpr,  # M lacks the axis
    IN_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % n_splits
    SUM_B: tl.constexpr = tl.constexpr(NEED_DMASK and SHARED_B)  # dM is summed over the axis here
    SUM_H: tl.constexpr = tl.constexpr(NEED_DMASK and SHARED_H)
    SHARED_MASK: tl.constexpr = tl.constexpr(MASK_KIND if SHARED_H else 0)  # the kind of a mask that one load serves all heads of
    STORED_KIND: tl.constexpr = tl.constexpr(SOFT if IN_PARTS else MASK_KIND)
    groups = 1 if SUM_H else H // GROUP
    outer = pid // n_splits // groups  # of M's batch axes, behind those of its parts
    owner = outer % owners  # the number of a mask, or of a batch element
    g_lo = pid // n_splits % groups
    g_hi = H // GROUP if SUM_H else g_lo + 1
    i_lo = outer // owners * part_sharers
    first_b = owner * own_step if SUM_B else owner
    offs_m = tl.arange(0, BLOCK_M)
    first_block = split * split_blocks
    for n_block in tl.range(first_block, tl.minimum(first_block + split_blocks, tl.cdiv(Nk, BLOCK_N)), disable_licm=True):
        offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        started = (offs_m < Nq) & (tl.full([BLOCK_M], n_block, tl.int32) > first_block)  # this split's dQ already holds a sum
        dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.range(i_lo, tl.minimum(sharers, i_lo + part_sharers) if SUM_B else i_lo + 1, disable_licm=True):
            b = tl.cast(first_b + i * share_step, tl.int64)
            live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
            mask_batch = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) if MASK_KIND else None
            m_rows = unless_padding(Nq, live, HAS_PADDING)
            m = load_mask(mask_batch, offs_m, offs_n, stride_mm, stride_mn, m_rows, Nk, live[None, :], SHARED_MASK, HAS_PADDING)
            for group in tl.range(g_lo, g_hi, disable_licm=True):
                dm = _kv_head(
                    q_ptr + b * stride_qb, k_ptr + b * stride_kb, v_ptr + b * stride_vb, mask_batch, alpha_ptr, seed_ptr,
                    do_ptr + b * stride_dob, weights_ptr, rows_ptr, normalizer_ptr, mbar_ptr,
                    dq_ptr + (split * B + b) * H * Nq * D if NEED_DQ else None, dk_ptr, dv_ptr, dmask_ptr,
                    dalpha_ptr + tl.cast(n_block, tl.int64) * B * H if NEED_DALPHA else None,
                    out_ptr, remainder_ptr, lse_ptr, dl_ptr + b * stride_dlb if HAS_DLSE else None,
                    stride_qh, stride_qm, stride_qd, stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd,
                    stride_mh, stride_mm, stride_mn, stride_ah, stride_doh, stride_dom, stride_dod, stride_dlh, stride_dlm,
                    b, tl.cast(group, tl.int64), offs_m, offs_n, live, started, m, dm, H, Nq, Nk, scale, drop_threshold, keep_scale,
                    GROUP, D, DV, MASK_KIND, HAS_PADDING, HAS_DROPOUT, ALLOW_TF32,
                    FIRST_PASS, HAS_DLSE, NEED_DQ, NEED_DK, NEED_DV, NEED_DMASK, NEED_DALPHA, SUM_B, SHARED_H, SHARED_M,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        if NEED_DMASK and (SUM_B or SHARED_H):
            mask_bh = outer if SHARED_H else outer * groups + g_lo
            mask_batch = mask_ptr + mask_offset(first_b.to(tl.int64), inner_batch, stride_mb, stride_mi)
            store_mask_tile(
                dmask_ptr, dm, mask_bh.to(tl.int64), mask_batch + (0 if SHARED_H else g_lo) * stride_mh,
                stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, STORED_KIND, SHARED_M,
            )  # fmt: skip
        if NEED_DQ:
            tl.debug_barrier()  # the next key block adds to what other threads of this program stored


@triton.jit
def _kv_head(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr, normalizer_ptr, mbar_ptr,
    dq_ptr, dk_ptr, dv_ptr, dmask_ptr, dalpha_ptr, out_ptr, remainder_ptr, lse_ptr, dl_ptr,
    stride_qh, stride_qm, stride_qd, stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd,
    stride_mh, stride_mm, stride_mn, stride_ah, stride_doh, stride_dom, stride_dod, stride_dlh, stride_dlm,
    b, g, offs_m, offs_n, live, started, m, dm, H, Nq, Nk, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    FIRST_PASS: tl.constexpr, HAS_DLSE: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DMASK: tl.constexpr, NEED_DALPHA: tl.constexpr,
    SUM_B: tl.constexpr, SHARED_H: tl.constexpr, SHARED_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One key block of batch b and kv head g: dK and dV stored, its share of dQ and dalpha too. Returns dm with its share added.

    Pointers of inputs are those of the batch, of dQ those of the batch in this split, of dalpha those of the key block. m: M's tile,
    where heads share it. dM of one head leaves at once, unless it is summed over the batch: then the program has one head.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    k = load_tile(k_ptr + g * stride_kh, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
    v = load_tile(v_ptr + g * stride_vh, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    seen = unless_padding(GROUP, live, HAS_PADDING)
    for r in tl.range(0, seen, disable_licm=True):
        h = g * GROUP + r
        bh = b * H + h
        alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
        do_head = do_ptr + h * stride_doh
        if FIRST_PASS:
            shift, factor, delta = first_rows(
                do_head, out_ptr, remainder_ptr, lse_ptr, normalizer_ptr, dl_ptr + h * stride_dlh if HAS_DLSE else None,
                bh, offs_m, offs_dv, stride_dom, stride_dod, stride_dlm, Nq, DV, HAS_DLSE,
            )  # fmt: skip
        else:
            shift, factor, delta = load_rows(rows_ptr, normalizer_ptr, bh * Nq, offs_m, Nq)
        q, do = load_queries(
            q_ptr + h * stride_qh, do_head, b, h, shift, 0,
            offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING,
        )  # fmt: skip
        if MASK_KIND and not SHARED_H:
            mask_head = mask_ptr + h * stride_mh
            m_head = load_mask(mask_head, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
        else:
            m_head = m
        dp = load_map_gradient(do_ptr, weights_ptr, h, offs_m, offs_n, stride_dom, stride_dod, offs_m < Nq, live, DV)
        p, ds = score_gradient(
            q, k, do, v, dp, m_head, live[None, :], shift[:, None], of_rows(factor), delta[:, None], offs_m[:, None], offs_n[None, :], bh,
            scale, alpha, seed, drop_threshold, keep_scale, MASK_KIND, HAS_DROPOUT, ALLOW_TF32, BLOCK_M, BLOCK_N, tl.constexpr(False),
        )  # fmt: skip
        if NEED_DV:
            dv = dot(tl.trans(p.to(do.dtype)), do, dv, ALLOW_TF32)
        if NEED_DK:
            dk = dot(tl.trans(ds.to(q.dtype)), q, dk, ALLOW_TF32)
        if NEED_DQ:
            dq = matmul(ds.to(k.dtype), k, BLOCK_M, BLOCK_D, ALLOW_TF32)
            _add_tile(dq_ptr + h * Nq * D, dq, offs_m, offs_d, D, started, offs_m < Nq, offs_d < D)
        if NEED_DALPHA:
            store_dalpha(dalpha_ptr + bh, ds, m_head, mbar_ptr + bh * Nq, offs_m, offs_m < Nq)
        if NEED_DMASK:
            dm += tl.where(live[None, :], alpha * ds, 0.0)
            if not (SHARED_H or SUM_B):
                mask_tile = mask_ptr + h * stride_mh
                store_mask_tile(dmask_ptr, dm, bh, mask_tile, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, MASK_KIND, SHARED_M)
                dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_PADDING:
        for r in range(seen, GROUP):
            h = g * GROUP + r
            bh = b * H + h
            if NEED_DQ:
                nothing = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                store_tile(dq_ptr + h * Nq * D, nothing, offs_m, offs_d, D, (offs_m < Nq) & ~started, offs_d < D)
            if NEED_DALPHA:
                tl.store(dalpha_ptr + bh, 0.0)
            if NEED_DMASK and not (SHARED_H or SUM_B):
                store_mask_tile(dmask_ptr, dm, bh, mask_ptr, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, SOFT, SHARED_M)
    bg = b * (H // GROUP) + g
    store_key_gradients(dk_ptr, dv_ptr, dk, dv, bg, offs_n, live, Nk, scale, keep_scale, NEED_DK, NEED_DV, D, DV, BLOCK_D, BLOCK_DV)
    return dm


@triton.jit
def _add_tile(ptr, tile, rows, cols, n_cols, row_started, row_ok, col_ok):
    """Add a tile to a contiguous float32 matrix of n_cols columns, whose rows hold nothing yet unless started."""
    offsets = rows[:, None] * n_cols + cols[None, :]
    tile += tl.load(ptr + offsets, mask=row_started[:, None] & col_ok[None, :], other=0.0)
    tl.store(ptr + offsets, tile, mask=row_ok[:, None] & col_ok[None, :])


def partials(call: Call) -> int:
    """How many rows of dalpha partials `run` fills."""
    return cdiv(call.problem.Nk, tile_of(call, "few").block_n)


def run(call: Call, dout: Tensor, rows: Rows, mbar: Tensor | None, grads: Gradients, dalpha_tiles: Tensor | None) -> Tensor | None:
    """Fill dkey, dvalue and dmask where they are given, contiguous, in their own shapes and dtypes, and dalpha_tiles (partials, B, H).

    Returns the parts of dQ / scale, float32 (splits, B, H, Nq, D), where this pass computes it.
    """
    t, tile = call.problem, tile_of(call, "few")
    needs = Needs(*(grad is not None for grad in grads))
    cut = plan.cut_of_few_queries(t, needs, tile.block_n)
    parts = accumulator(call, cut.n_splits, t.B, t.H, t.Nq, t.D) if cut.flags["NEED_DQ"] else None
    dmask_parts = None if grads.mask is None else backward_dmask.parts_for(call, cut.parts, grads.mask)
    arguments = gradient_arguments(call, tile, dout, rows)
    arguments.update(
        mbar_ptr=mbar, dq_ptr=parts, dk_ptr=grads.key, dv_ptr=grads.value, dalpha_ptr=dalpha_tiles,
        dmask_ptr=grads.mask if dmask_parts is None else dmask_parts,
        B=t.B, owners=cut.owners, part_sharers=cut.parts.sharers, **sharing_arguments(t),
        n_splits=cut.n_splits, split_blocks=cut.split_blocks, **rows.arguments(), **cut.flags,
    )  # fmt: skip
    launch(_few_queries_kernel, cut.programs, arguments, tile)
    backward_dmask.add_up(call, dmask_parts, grads.mask)
    return parts
