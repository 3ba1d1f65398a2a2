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
from .launch import Inputs, launch
from .primitives import (
    dot,
    live_keys,
    load_alpha,
    load_map_gradient,
    load_mask,
    load_queries,
    load_tile,
    matmul,
    score_gradient,
    store_dalpha,
    store_key_gradients,
    store_mask_tile,
)

REDUCE = TileConfig(block_m=1, block_n=256, num_warps=4, num_stages=1)


def serves(inputs: Inputs, gradients: list[Tensor | None]) -> bool:
    """Few queries, but for two cases: dM summed over the batch for each head of a kv group would need dK and dV of the whole batch, and
    queries that outweigh everything else leave no memory for dQ in float32.
    """
    t, (dquery, *_, dmask) = inputs.problem, gradients
    if not configs.one_tile(t) or (dquery is not None and _affordable(inputs, gradients) == 0):
        return False
    return not (dmask is not None and t.B > dmask.shape[0] and dmask.shape[1] > 1 and t.H > t.Hkv)


@triton.jit(do_not_specialize=["Nq", "drop_threshold", "n_splits", "split_blocks"])
def _few_queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr,
    mbar_ptr, dq_ptr, dk_ptr, dv_ptr, dmask_ptr, dalpha_ptr,
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
    SHARED_B: tl.constexpr, SHARED_H: tl.constexpr, SHARED_M: tl.constexpr,  # M lacks the axis
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % n_splits
    SUM_B: tl.constexpr = tl.constexpr(NEED_DMASK and SHARED_B)  # dM is summed over the axis here
    SUM_H: tl.constexpr = tl.constexpr(NEED_DMASK and SHARED_H)
    SHARED_MASK: tl.constexpr = tl.constexpr(HAS_MASK if SHARED_H else 0)  # the kind of a mask that one load serves all heads of
    groups = 1 if SUM_H else H // GROUP
    g_lo = pid // n_splits % groups
    g_hi = H // GROUP if SUM_H else g_lo + 1
    b_lo = pid // n_splits // groups
    b_hi = B if SUM_B else b_lo + 1
    offs_m = tl.arange(0, BLOCK_M)
    first_block = split * split_blocks
    for n_block in range(first_block, tl.minimum(first_block + split_blocks, tl.cdiv(Nk, BLOCK_N))):
        offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        started = (offs_m < Nq) & (tl.full([BLOCK_M], n_block, tl.int32) > first_block)  # this split's dQ already holds a sum
        dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for batch in range(b_lo, b_hi):
            b = tl.cast(batch, tl.int64)
            live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
            mask_batch = mask_ptr + b * stride_mb if HAS_MASK else None
            m = load_mask(mask_batch, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], SHARED_MASK, HAS_PADDING)
            for group in range(g_lo, g_hi):
                dm = _kv_head(
                    q_ptr + b * stride_qb, k_ptr + b * stride_kb, v_ptr + b * stride_vb, mask_batch, alpha_ptr, seed_ptr,
                    do_ptr + b * stride_dob, weights_ptr, rows_ptr, mbar_ptr,
                    dq_ptr + (split * B + b) * H * Nq * D if NEED_DQ else None, dk_ptr, dv_ptr, dmask_ptr,
                    dalpha_ptr + tl.cast(n_block, tl.int64) * B * H if NEED_DALPHA else None,
                    stride_qh, stride_qm, stride_qd, stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd,
                    stride_mh, stride_mm, stride_mn, stride_ah, stride_doh, stride_dom, stride_dod,
                    b, tl.cast(group, tl.int64), offs_m, offs_n, live, started, m, dm, H, Nq, Nk, scale, drop_threshold, keep_scale,
                    GROUP, D, DV, HAS_MASK, HAS_PADDING, HAS_DROPOUT, ALLOW_TF32, NEED_DQ, NEED_DK, NEED_DV, NEED_DMASK, NEED_DALPHA,
                    SUM_B, SHARED_H, SHARED_M, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        if NEED_DMASK and (SUM_B or SHARED_H):
            mask_bh = b_lo if SHARED_H else b_lo * groups + g_lo
            store_mask_tile(
                dmask_ptr, dm, mask_bh.to(tl.int64), mask_ptr + b_lo.to(tl.int64) * stride_mb + (0 if SHARED_H else g_lo) * stride_mh,
                stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, HAS_MASK, SHARED_M,
            )  # fmt: skip
        if NEED_DQ:
            tl.debug_barrier()  # the next key block adds to what other threads of this program stored


@triton.jit
def _kv_head(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr, mbar_ptr,
    dq_ptr, dk_ptr, dv_ptr, dmask_ptr, dalpha_ptr,
    stride_qh, stride_qm, stride_qd, stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd,
    stride_mh, stride_mm, stride_mn, stride_ah, stride_doh, stride_dom, stride_dod,
    b, g, offs_m, offs_n, live, started, m, dm, H, Nq, Nk, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
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
    for r in range(0, GROUP):
        h = g * GROUP + r
        bh = b * H + h
        alpha = load_alpha(alpha_ptr, h, stride_ah, HAS_MASK)
        q, do, lse_log2, delta = load_queries(
            q_ptr + h * stride_qh, do_ptr + h * stride_doh, rows_ptr + 2 * bh * Nq,
            offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING,
        )  # fmt: skip
        if HAS_MASK and not SHARED_H:
            m_head = load_mask(mask_ptr + h * stride_mh, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], HAS_MASK, HAS_PADDING)
        else:
            m_head = m
        dp = load_map_gradient(do_ptr, weights_ptr, h, offs_m, offs_n, stride_dom, stride_dod, offs_m < Nq, live, DV)
        p, ds = score_gradient(
            q, k, do, v, dp, m_head, live[None, :], lse_log2[:, None], delta[:, None], offs_m[:, None], offs_n[None, :], bh,
            scale, alpha, seed, drop_threshold, keep_scale, HAS_MASK, HAS_DROPOUT, ALLOW_TF32, BLOCK_M, BLOCK_N,
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
                store_mask_tile(dmask_ptr, dm, bh, mask_tile, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, HAS_MASK, SHARED_M)
                dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bg = b * (H // GROUP) + g
    store_key_gradients(dk_ptr, dv_ptr, dk, dv, bg, offs_n, live, Nk, scale, keep_scale, NEED_DK, NEED_DV, D, DV, BLOCK_D, BLOCK_DV)
    return dm


@triton.jit
def _add_tile(ptr, tile, rows, cols, n_cols, row_started, row_ok, col_ok):
    """Add a tile to a contiguous float32 matrix of n_cols columns, whose rows hold nothing yet unless started."""
    offsets = rows[:, None] * n_cols + cols[None, :]
    tile += tl.load(ptr + offsets, mask=row_started[:, None] & col_ok[None, :], other=0.0)
    tl.store(ptr + offsets, tile, mask=row_ok[:, None] & col_ok[None, :])


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
    mbar: Tensor | None,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dmask: Tensor | None,
    dalpha: Tensor | None,
) -> None:
    """Fill the gradients that are given, contiguous, in their own shapes and dtypes; dalpha as partials (partials(inputs), B, H)."""
    t, tile, gradients = inputs.problem, inputs.tile("few"), [dquery, dkey, dvalue, dmask]
    mask_batches, mask_heads, mask_queries, _ = t.mask_shape or (t.B, t.H, t.Nq, t.Nk)
    shared = dict(SHARED_B=mask_batches < t.B, SHARED_H=mask_heads == 1, SHARED_M=mask_queries == 1)
    owners = t.B * t.Hkv
    if dmask is not None:
        owners = (1 if shared["SHARED_B"] else t.B) * (1 if shared["SHARED_H"] else t.Hkv)
    split_blocks, splits = _splits(inputs, tile, owners, gradients)
    partial = inputs.accumulator(splits, *dquery.shape) if dquery is not None else None
    arguments: dict[str, Any] = inputs.gradient_arguments(tile, dout, rows) | shared | dict(
        mbar_ptr=mbar, dq_ptr=partial, dk_ptr=dkey, dv_ptr=dvalue, dmask_ptr=dmask, dalpha_ptr=dalpha,
        B=t.B, n_splits=splits, split_blocks=split_blocks,
        NEED_DQ=dquery is not None, NEED_DK=dkey is not None, NEED_DV=dvalue is not None,
        NEED_DMASK=dmask is not None, NEED_DALPHA=dalpha is not None,
    )  # fmt: skip
    launch(_few_queries_kernel, owners * splits, arguments, tile)
    if dquery is not None:
        n = dquery.numel()
        reduce = dict(partial_ptr=partial, dq_ptr=dquery, n_splits=splits, n_elements=n, scale=t.scale, BLOCK=REDUCE.block_n)
        launch(_reduce_kernel, triton.cdiv(n, REDUCE.block_n), reduce, REDUCE)


def _splits(inputs: Inputs, tile: TileConfig, owners: int, gradients: list[Tensor | None]) -> tuple[int, int]:
    """Key blocks per split and number of splits, from the shape alone."""
    blocks = triton.cdiv(inputs.problem.Nk, tile.block_n)
    wanted = blocks
    if gradients[0] is not None:
        wanted = min(blocks, max(1, configs.SPLIT_PROGRAMS // owners), _affordable(inputs, gradients))
    split_blocks = triton.cdiv(blocks, wanted)
    return split_blocks, triton.cdiv(blocks, split_blocks)


def _affordable(inputs: Inputs, gradients: list[Tensor | None]) -> int:
    """How many dQ in float32 fit in a fifth of inputs and gradients and 6 MiB, beside what forward kept."""
    t = inputs.problem
    held = t.bytes_of_inputs() + sum(x.numel() * x.element_size() for x in gradients if x is not None)
    return max(0, held // 5 + (6 << 20) - t.bytes_kept()) // (4 * t.B * t.H * t.Nq * t.D)
