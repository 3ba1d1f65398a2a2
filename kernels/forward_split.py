"""Forward with few queries: the keys are split over programs, whose partial softmaxes a second kernel merges in a fixed order.

One program per (batch, split, query block, head), heads fastest; the number of splits follows from the shape alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Saved
from . import plan
from .launch import launch
from .operands import accumulator, attention_arguments, tile_of
from .primitives.load import head_of, load_alpha, load_tile, mask_offset, query_program
from .primitives.rows import store_normalizer
from .primitives.softmax import add_to_sum, attend, rescaled, softmax_finish, with_lost
from .primitives.store import store_output, store_tile
from .tiles import Tile, block_of, cdiv

MERGE = Tile(block_m=4, block_n=1, warps=4, stages=1)  # 4 rows a program


def cut_of(call: Call) -> plan.Forward:
    tile = tile_of(call, "split")
    return plan.forward(call.problem, tile.block_m, tile.block_n)


@triton.jit(do_not_specialize=["Nq", "drop_threshold", "n_splits", "split_blocks"])
def _partial_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, acc_ptr, rows_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    H, Nq, Nk, n_splits, split_blocks, n_rows, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    SAVE_MBAR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    h, _, offs_m, split, b, bh = query_program(H, Nq, n_splits, BLOCK_M)
    first_block = split * split_blocks
    g = h // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < Nq
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, offs_m, offs_d, stride_qm, stride_qd, row_ok, offs_d < D)
    acc, mbar, m_i, l_i, divisor = attend(
        q,
        head_of(k_ptr, b, g, stride_kb, stride_kh),
        head_of(v_ptr, b, g, stride_vb, stride_vh),
        b, g,
        mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) + h * stride_mh if MASK_KIND else None,
        pad_ptr + b * stride_pb if HAS_PADDING else None,
        seed_ptr, load_alpha(alpha_ptr, h, stride_ah, MASK_KIND),
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn, stride_pn,
        offs_m, bh.to(tl.int32), first_block * BLOCK_N, tl.minimum(Nk, (first_block + split_blocks) * BLOCK_N), Nq, Nk,
        scale, drop_threshold,
        D, DV, MASK_KIND, HAS_PADDING, HAS_DROPOUT, SAVE_MBAR, ALLOW_TF32, tl.constexpr(False), tl.constexpr(False),
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    row = split * n_rows + bh * Nq  # of the partial buffers [n_splits, B*H*Nq]
    store_tile(acc_ptr + row * DV, acc, offs_m, offs_dv, DV, row_ok, offs_dv < DV)
    rows = rows_ptr + 4 * row
    tl.store(rows + 4 * offs_m, m_i, mask=row_ok)
    tl.store(rows + 4 * offs_m + 1, l_i, mask=row_ok)
    tl.store(rows + 4 * offs_m + 2, divisor, mask=row_ok)
    tl.store(rows + 4 * offs_m + 3, mbar, mask=row_ok)


@triton.jit(do_not_specialize=["n_splits"])
def _merge_kernel(
    acc_ptr, rows_ptr, out_ptr, remainder_ptr, lse_ptr, mbar_ptr, normalizer_ptr, n_splits, n_rows, keep_scale,
    DV: tl.constexpr, SAVE_MBAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < n_rows
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, n_splits):
        m_i = tl.maximum(m_i, tl.load(rows_ptr + 4 * (split * n_rows + offs_m), mask=row_ok, other=0.0))
    l_i = tl.zeros([BLOCK_M], tl.float32)
    l_lost = tl.zeros([BLOCK_M], tl.float32)
    divisor = tl.zeros([BLOCK_M], tl.float32)
    mbar = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(0, n_splits):
        rows = rows_ptr + 4 * (split * n_rows + offs_m)
        m_split = tl.load(rows, mask=row_ok, other=0.0)
        weight = tl.where(m_split == m_i, 1.0, tl.exp2(m_split - m_i))  # 1 where both are -inf
        l_i, l_lost = add_to_sum(l_i, l_lost, 1.0, weight * tl.load(rows + 1, mask=row_ok, other=1.0))
        divisor += weight * tl.load(rows + 2, mask=row_ok, other=1.0)
        mbar += rescaled(weight, tl.load(rows + 3, mask=row_ok, other=0.0))
        acc += weight[:, None] * load_tile(acc_ptr, split * n_rows + offs_m, offs_dv, DV, 1, row_ok, offs_dv < DV)
    out, mbar, lse, l_i = softmax_finish(acc, mbar, m_i, with_lost(l_i, l_lost), divisor, keep_scale)
    store_output(out_ptr, remainder_ptr, out, 0, offs_m, offs_dv, row_ok, DV)
    tl.store(lse_ptr + offs_m, lse, mask=row_ok)
    if normalizer_ptr is not None:
        store_normalizer(normalizer_ptr, 0, m_i, l_i, offs_m, row_ok)
    if SAVE_MBAR:
        tl.store(mbar_ptr + offs_m, mbar, mask=row_ok)


def run(call: Call, cut: plan.Forward, out: Tensor, saved: Saved) -> None:
    """Fill out (B, H, Nq, Dv), and saved as far as it has tensors. cut: cut_of."""
    t, tile = call.problem, tile_of(call, "split")
    (splits, split_blocks), n_rows = cut, t.B * t.H * t.Nq
    acc = accumulator(call, splits, n_rows, t.Dv)
    rows = accumulator(call, splits, n_rows, 4)  # m_i, l_i, divisor, mbar
    partial = attention_arguments(call, tile)
    partial.update(
        acc_ptr=acc, rows_ptr=rows, n_splits=splits, split_blocks=split_blocks, n_rows=n_rows,
        SAVE_MBAR=saved.mbar is not None,
    )
    launch(_partial_kernel, t.B * t.H * cdiv(t.Nq, tile.block_m) * splits, partial, tile)
    merge = dict(
        acc_ptr=acc, rows_ptr=rows, out_ptr=out, remainder_ptr=saved.remainder, lse_ptr=saved.lse, mbar_ptr=saved.mbar,
        normalizer_ptr=saved.normalizer, n_splits=splits, n_rows=n_rows, keep_scale=partial["keep_scale"], DV=t.Dv,
        SAVE_MBAR=saved.mbar is not None, BLOCK_M=MERGE.block_m, BLOCK_DV=block_of(t.Dv),
    )  # fmt: skip
    launch(_merge_kernel, cdiv(n_rows, MERGE.block_m), merge, MERGE)
