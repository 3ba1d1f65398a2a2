"""Backward with few queries, all gradients in one pass: a program owns blocks of keys and goes over all heads, reference.py (5)-(8).

The queries fit one tile, so dK and dV are stored once, and dM once after its sum over heads (and over the batch, where M is shared by it)
in registers. dQ is summed per split of the keys in a float32 buffer, which a second kernel adds up in a fixed order; dalpha leaves one
partial per key block.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import TileConfig
from .launch import Inputs, launch, strides
from .primitives import (
    dot,
    dropout_keep,
    gradient_tile,
    live_keys,
    load_alpha,
    load_mask,
    load_queries,
    load_tile,
    matmul,
    score_tile,
    store_tile,
)

REDUCE = TileConfig(block_m=1, block_n=256, num_warps=4, num_stages=1)


def serves(inputs: Inputs, need_dmask: bool) -> bool:
    """Few queries, but for one case: dM summed over the batch for each head of a kv group would need dK and dV of the whole batch."""
    t = inputs.problem
    if not configs.one_tile(t):
        return False
    return not (need_dmask and t.mask_shape is not None and t.B > t.mask_shape[0] and t.mask_shape[1] > 1 and t.H > t.Hkv)


@triton.jit(do_not_specialize=["Nq", "drop_threshold", "n_splits", "split_blocks"])
def _few_queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, rows_ptr, mbar_ptr, dq_ptr, dk_ptr, dv_ptr, dmask_ptr, dalpha_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod,
    B, H, Nq, Nk, n_splits, split_blocks, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DMASK: tl.constexpr, NEED_DALPHA: tl.constexpr,
    MASK_PER_HEAD: tl.constexpr, MASK_PER_QUERY: tl.constexpr,  # M has the axis
    SUM_B: tl.constexpr, SUM_H: tl.constexpr,  # dM is summed over the axis here
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % n_splits
    groups = 1 if SUM_H else H // GROUP
    g_lo = pid // n_splits % groups
    g_hi = H // GROUP if SUM_H else g_lo + 1
    b_lo = pid // n_splits // groups
    b_hi = B if SUM_B else b_lo + 1
    # dM of one head leaves at once, unless it is summed over the batch: then the program has one head
    DMASK_EACH_HEAD: tl.constexpr = tl.constexpr(MASK_PER_HEAD and not SUM_B)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < Nq
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    first_block = split * split_blocks
    for n_block in range(first_block, tl.minimum(first_block + split_blocks, tl.cdiv(Nk, BLOCK_N))):
        offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        started = row_ok & (tl.full([BLOCK_M], n_block, tl.int32) > first_block)  # this split's dQ already holds a sum
        dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for batch in range(b_lo, b_hi):
            b = tl.cast(batch, tl.int64)
            live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
            mask_batch = mask_ptr + b * stride_mb if HAS_MASK else None
            if not MASK_PER_HEAD:
                m = load_mask(mask_batch, offs_m, offs_n, stride_mm, stride_mn, row_ok, live, HAS_MASK)
            for group in range(g_lo, g_hi):
                g = tl.cast(group, tl.int64)
                k = load_tile(k_ptr + b * stride_kb + g * stride_kh, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
                v = load_tile(v_ptr + b * stride_vb + g * stride_vh, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
                dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
                dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
                for r in range(0, GROUP):
                    h = g * GROUP + r
                    bh = b * H + h
                    alpha = load_alpha(alpha_ptr, h, stride_ah, HAS_MASK)
                    q, do, lse_log2, delta = load_queries(
                        q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh, rows_ptr + 2 * bh * Nq,
                        offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING,
                    )  # fmt: skip
                    if MASK_PER_HEAD:
                        m = load_mask(mask_batch + h * stride_mh, offs_m, offs_n, stride_mm, stride_mn, row_ok, live, HAS_MASK)
                    qk = matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, ALLOW_TF32)
                    s = score_tile(qk, m, live[None, :], scale, alpha, HAS_MASK)  # [BLOCK_M, BLOCK_N]
                    dp = matmul(do, tl.trans(v), BLOCK_M, BLOCK_N, ALLOW_TF32)
                    keep = dropout_keep(seed, offs_m[:, None], offs_n[None, :], bh.to(tl.int32), drop_threshold) if HAS_DROPOUT else None
                    p, ds = gradient_tile(s, dp, lse_log2[:, None], delta[:, None], keep, keep_scale, HAS_DROPOUT)
                    if NEED_DV:
                        dv = dot(tl.trans(p.to(do.dtype)), do, dv, ALLOW_TF32)
                    if NEED_DK:
                        dk = dot(tl.trans(ds.to(q.dtype)), q, dk, ALLOW_TF32)
                    if NEED_DQ:
                        dq = matmul(ds.to(k.dtype), k, BLOCK_M, BLOCK_D, ALLOW_TF32)
                        partial = dq_ptr + ((split * B + b) * H + h) * Nq * D + offs_m[:, None] * D + offs_d[None, :]
                        dq += tl.load(partial, mask=started[:, None] & (offs_d < D)[None, :], other=0.0)
                        tl.store(partial, dq, mask=row_ok[:, None] & (offs_d < D)[None, :])
                    if NEED_DALPHA:
                        mbar = tl.load(mbar_ptr + bh * Nq + offs_m, mask=row_ok, other=0.0)
                        tl.store(dalpha_ptr + tl.cast(n_block, tl.int64) * B * H + bh, tl.sum(tl.sum(ds * (m - mbar[:, None]), 1), 0))
                    if NEED_DMASK:
                        dm += tl.where(live[None, :], alpha * ds, 0.0)
                        if DMASK_EACH_HEAD:
                            _store_dmask(dmask_ptr, dm, bh, offs_n, offs_m, Nq, Nk, MASK_PER_QUERY)
                            dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                # a padded key's gradient is exactly 0 even where a NaN elsewhere in the row made P NaN
                bg = b * (H // GROUP) + g
                if NEED_DK:
                    dk = tl.where(live[:, None], dk * scale, 0.0)
                    store_tile(dk_ptr + bg * Nk * D, dk, offs_n, offs_d, D, offs_n < Nk, offs_d < D)
                if NEED_DV:
                    dv = tl.where(live[:, None], dv * keep_scale, 0.0)
                    store_tile(dv_ptr + bg * Nk * DV, dv, offs_n, offs_dv, DV, offs_n < Nk, offs_dv < DV)
        if NEED_DMASK and not DMASK_EACH_HEAD:
            mask_bh = b_lo * groups + g_lo if MASK_PER_HEAD else b_lo
            _store_dmask(dmask_ptr, dm, mask_bh.to(tl.int64), offs_n, offs_m, Nq, Nk, MASK_PER_QUERY)
        if NEED_DQ:
            tl.debug_barrier()  # the next key block adds to what other threads of this program stored


@triton.jit
def _store_dmask(dmask_ptr, dm, mask_bh, offs_n, offs_m, Nq, Nk, MASK_PER_QUERY: tl.constexpr):
    """Store a finished [BLOCK_M, BLOCK_N] tile of dM, or its sum over queries where M has no query axis."""
    if MASK_PER_QUERY:
        store_tile(dmask_ptr + mask_bh * Nq * Nk, dm, offs_m, offs_n, Nk, offs_m < Nq, offs_n < Nk)
    else:
        tl.store(dmask_ptr + mask_bh * Nk + offs_n, tl.sum(dm, 0).to(dmask_ptr.dtype.element_ty), mask=offs_n < Nk)


@triton.jit(do_not_specialize=["n_splits"])
def _reduce_kernel(partial_ptr, dq_ptr, n_splits, n_elements, scale, BLOCK: tl.constexpr):
    """dQ = scale * sum of the splits' partials, in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < n_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, n_splits):
        total += tl.load(partial_ptr + tl.cast(split, tl.int64) * n_elements + offs, mask=ok, other=0.0)
    tl.store(dq_ptr + offs, (total * scale).to(dq_ptr.dtype.element_ty), mask=ok)


def partials(inputs: Inputs) -> int:
    """How many rows of dalpha partials `run` fills."""
    return triton.cdiv(inputs.problem.Nk, inputs.tile("few").block_n)


def run(
    inputs: Inputs,
    dout: Tensor,
    rows: Tensor,
    mbar: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dmask: Tensor | None,
    dalpha: Tensor | None,
) -> None:
    """Fill the gradients that are given, contiguous, in their own shapes and dtypes; dalpha as partials (partials(inputs), B, H)."""
    t, tile = inputs.problem, inputs.tile("few")
    mask_batches, mask_heads, mask_queries, _ = t.mask_shape or (t.B, t.H, t.Nq, t.Nk)
    sum_b = dmask is not None and mask_batches < t.B
    sum_h = dmask is not None and mask_heads < t.H
    owners = (1 if sum_b else t.B) * (1 if sum_h else t.Hkv)
    split_blocks, splits = _splits(inputs, tile, owners, [dquery, dkey, dvalue, dmask])
    partial = inputs.accumulator(splits, *dquery.shape) if dquery is not None else None
    arguments: dict[str, Any] = inputs.arguments(tile) | strides("do", "bhmd", dout) | dict(
        do_ptr=dout, rows_ptr=rows, mbar_ptr=mbar, dq_ptr=partial, dk_ptr=dkey, dv_ptr=dvalue, dmask_ptr=dmask, dalpha_ptr=dalpha,
        B=t.B, n_splits=splits, split_blocks=split_blocks,
        NEED_DQ=dquery is not None, NEED_DK=dkey is not None, NEED_DV=dvalue is not None,
        NEED_DMASK=dmask is not None, NEED_DALPHA=dalpha is not None,
        MASK_PER_HEAD=t.mask_shape is not None and mask_heads > 1, MASK_PER_QUERY=mask_queries > 1, SUM_B=sum_b, SUM_H=sum_h,
    )  # fmt: skip
    launch(_few_queries_kernel, owners * splits, arguments, tile)
    if dquery is not None:
        n = dquery.numel()
        reduce = dict(partial_ptr=partial, dq_ptr=dquery, n_splits=splits, n_elements=n, scale=t.scale, BLOCK=REDUCE.block_n)
        launch(_reduce_kernel, triton.cdiv(n, REDUCE.block_n), reduce, REDUCE)


def _splits(inputs: Inputs, tile: TileConfig, owners: int, gradients: list[Tensor | None]) -> tuple[int, int]:
    """Key blocks per split and number of splits, from the shape alone.

    Each split holds a dQ in float32, so their number is bounded by memory: a fifth of inputs and gradients, and 6 MiB.
    """
    t = inputs.problem
    blocks = triton.cdiv(t.Nk, tile.block_n)
    wanted = blocks
    if gradients[0] is not None:
        held = [inputs.key, inputs.value, inputs.query, *gradients]
        affordable = (sum(x.numel() * x.element_size() for x in held if x is not None) // 5 + (6 << 20)) // (4 * t.B * t.H * t.Nq * t.D)
        wanted = min(blocks, max(1, configs.SPLIT_PROGRAMS // owners), max(1, affordable))
    split_blocks = triton.cdiv(blocks, wanted)
    return split_blocks, triton.cdiv(blocks, split_blocks)
