"""First step of an attention map's backward: of each query row eta = sum_j dA_ij P_ij, reference.py (10), and mbar.

The sums over keys are split as forward's are where queries are few, and then a second kernel adds the splits in order. What is stored is
what backward_delta.py stores, delta = w_h eta.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Saved
from .forward_split import cut_of
from .launch import launch
from .operands import accumulator, score_arguments, strides, tile_of
from .primitives.load import live_keys, live_span, load_alpha, load_mask, load_tile, mask_offset, query_program
from .primitives.rows import load_softmax, store_rows
from .primitives.score import exponents, matmul, of_rows, rounded_product, weights
from .tiles import Tile, cdiv

FINISH = Tile(block_m=64, block_n=1, warps=2, stages=1)  # 64 rows a program


@triton.jit(do_not_specialize=["Nq", "n_splits", "split_blocks"])
def _map_means_kernel(
    q_ptr, k_ptr, mask_ptr, alpha_ptr, pad_ptr, do_ptr, lse_ptr, normalizer_ptr, sums_ptr, weights_ptr, rows_ptr, mbar_ptr, eta_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod,
    H, Nq, Nk, n_splits, split_blocks, n_rows, scale,
    GROUP: tl.constexpr, D: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, ALLOW_TF32: tl.constexpr,
    NEED_ROWS: tl.constexpr, NEED_MBAR: tl.constexpr, NEED_ETA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    h, _, offs_m, split, b, bh = query_program(H, Nq, n_splits, BLOCK_M)
    first_block = split * split_blocks
    offs_d = tl.arange(0, BLOCK_D)
    row_ok = offs_m < Nq
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, offs_m, offs_d, stride_qm, stride_qd, row_ok, offs_d < D)
    shift, factor, dead = load_softmax(lse_ptr, normalizer_ptr, bh * Nq, offs_m, row_ok)
    by_fma: tl.constexpr = tl.constexpr(q.dtype.primitive_bitwidth == 16)
    alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
    eta = tl.zeros([BLOCK_M], tl.float32)
    mbar = tl.zeros([BLOCK_M], tl.float32)
    lowest = tl.full([BLOCK_M], float("inf"), tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    pad_batch = pad_ptr + b * stride_pb if HAS_PADDING else None
    end = tl.minimum(Nk, (first_block + split_blocks) * BLOCK_N)
    lo, hi = live_span(pad_batch, first_block * BLOCK_N, end, stride_pn, HAS_PADDING, BLOCK_N)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        live = live_keys(pad_batch, offs_n, Nk, stride_pn, HAS_PADDING)
        k = load_tile(k_ptr + b * stride_kb + h // GROUP * stride_kh, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
        mask_tile = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) + h * stride_mh if MASK_KIND else None
        m = load_mask(mask_tile, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
        qk = matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, ALLOW_TF32)
        exponent = exponents(qk, m, live[None, :], shift[:, None], of_rows(factor), scale, alpha, MASK_KIND, by_fma)
        p = weights(exponent, of_rows(factor))
        do = load_tile(do_ptr + b * stride_dob, offs_m, offs_n, stride_dom, stride_dod, row_ok, live)
        eta += tl.sum(rounded_product(p, do), 1)
        if NEED_MBAR:
            mbar += tl.sum(rounded_product(p, m), 1)
            lowest = tl.minimum(lowest, tl.min(tl.where(live[None, :], m, float("inf")), 1))
            highest = tl.maximum(highest, tl.max(tl.where(live[None, :], m, float("-inf")), 1))
    if sums_ptr is not None:
        sums = sums_ptr + 4 * (split.to(tl.int64) * n_rows + bh * Nq + offs_m)
        tl.store(sums, eta, mask=row_ok)
        if NEED_MBAR:
            tl.store(sums + 1, mbar, mask=row_ok)
            tl.store(sums + 2, lowest, mask=row_ok)
            tl.store(sums + 3, highest, mask=row_ok)
    else:
        _store(
            rows_ptr, normalizer_ptr, mbar_ptr, eta_ptr, shift, dead, eta, mbar, lowest, highest, weights_ptr, h, bh, offs_m, row_ok, Nq,
            NEED_ROWS, NEED_MBAR, NEED_ETA,
        )  # fmt: skip


@triton.jit
def _store(
    rows_ptr, normalizer_ptr, mbar_ptr, eta_ptr, shift, dead, eta, mbar, lowest, highest, weights_ptr, h, bh, offs_m, row_ok, Nq,
    NEED_ROWS: tl.constexpr, NEED_MBAR: tl.constexpr, NEED_ETA: tl.constexpr,
):  # fmt: skip
    """Store what is needed of a query block's finished sums. lowest, highest: of M over the row."""
    if NEED_ROWS:
        delta = tl.where(dead, 0.0, tl.load(weights_ptr + h) * eta)
        store_rows(rows_ptr, normalizer_ptr, bh * Nq, shift, delta, offs_m, row_ok)
    if NEED_MBAR:  # A mean lies between what it is of, also when P, rebuilt, adds up to no exact 1. Of one key it is M itself.
        mbar = tl.where(dead, 0.0, tl.minimum(tl.maximum(mbar, lowest), highest))
        tl.store(mbar_ptr + bh * Nq + offs_m, mbar, mask=row_ok)
    if NEED_ETA:
        tl.store(eta_ptr + bh * Nq + offs_m, eta, mask=row_ok)


@triton.jit(do_not_specialize=["Nq", "n_splits"])
def _map_rows_kernel(
    sums_ptr, lse_ptr, normalizer_ptr, weights_ptr, rows_ptr, mbar_ptr, eta_ptr, H, Nq, n_splits, n_rows,
    NEED_ROWS: tl.constexpr, NEED_MBAR: tl.constexpr, NEED_ETA: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    offs_m = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    bh = (tl.program_id(0) // m_blocks).to(tl.int64)
    row_ok = offs_m < Nq
    eta = tl.zeros([BLOCK_M], tl.float32)
    mbar = tl.zeros([BLOCK_M], tl.float32)
    lowest = tl.full([BLOCK_M], float("inf"), tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, n_splits):
        sums = sums_ptr + 4 * (tl.cast(split, tl.int64) * n_rows + bh * Nq + offs_m)
        eta += tl.load(sums, mask=row_ok, other=0.0)
        if NEED_MBAR:
            mbar += tl.load(sums + 1, mask=row_ok, other=0.0)
            lowest = tl.minimum(lowest, tl.load(sums + 2, mask=row_ok, other=0.0))
            highest = tl.maximum(highest, tl.load(sums + 3, mask=row_ok, other=0.0))
    shift, _, dead = load_softmax(lse_ptr, normalizer_ptr, bh * Nq, offs_m, row_ok)
    _store(
        rows_ptr, normalizer_ptr, mbar_ptr, eta_ptr, shift, dead, eta, mbar, lowest, highest, weights_ptr, bh % H, bh, offs_m, row_ok, Nq,
        NEED_ROWS, NEED_MBAR, NEED_ETA,
    )  # fmt: skip


def sums_of_splits(call: Call) -> Tensor | None:
    """Room for what each of several splits of the keys knows of the rows: eta, mbar, and M's extremes, (splits, B * H * Nq, 4)."""
    t, splits = call.problem, cut_of(call).splits
    return accumulator(call, splits, t.B * t.H * t.Nq, 4) if splits > 1 else None


def run(
    call: Call, saved: Saved, dout: Tensor, sums: Tensor | None, rows: Tensor | None, mbar: Tensor | None, eta: Tensor | None
) -> None:
    """Fill, where given, rows (room_for_rows), mbar and eta (B, H, Nq). dout: the map's gradient, (B, 1, Nq, Nk). sums: sums_of_splits."""
    t, tile = call.problem, tile_of(call, "split")
    splits, split_blocks = cut_of(call)
    n_rows = t.B * t.H * t.Nq
    results = dict(
        sums_ptr=sums, lse_ptr=saved.lse, normalizer_ptr=saved.normalizer, weights_ptr=call.head_weights,
        rows_ptr=rows, mbar_ptr=mbar, eta_ptr=eta,
        H=t.H, Nq=t.Nq, n_splits=splits, n_rows=n_rows,
        NEED_ROWS=rows is not None, NEED_MBAR=mbar is not None, NEED_ETA=eta is not None,
    )  # fmt: skip
    means = score_arguments(call, tile) | strides("do", "bhmd", dout) | results
    means |= dict(do_ptr=dout, split_blocks=split_blocks)
    launch(_map_means_kernel, t.B * t.H * cdiv(t.Nq, tile.block_m) * splits, means, tile)
    if sums is not None:
        launch(_map_rows_kernel, t.B * t.H * cdiv(t.Nq, FINISH.block_m), results | dict(BLOCK_M=FINISH.block_m), FINISH)
