"""Stores of tiles, each rounded once to the dtype of what it is stored to."""

from __future__ import annotations

import triton
import triton.language as tl

from ...call import REMAINDER_SCALE as _REMAINDER_SCALE
from .load import LOGITS, load_tile
from .score import INTERPRETED, LOG2E, rounded_product

REMAINDER_SCALE = tl.constexpr(_REMAINDER_SCALE)


@triton.jit
def store_tile(ptr, tile, rows, cols, n_cols, row_ok, col_ok):
    """Store a tile to a contiguous matrix of n_cols columns, rounded once to its dtype."""
    offsets = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def store_output(out_ptr, remainder_ptr, out, first_row, rows, cols, row_ok, DV: tl.constexpr):
    """Store a block of the output, and what rounding takes from it where backward wants that. first_row: the row that row 0 is."""
    rounded = round_to(out, out_ptr.dtype.element_ty)
    store_tile(out_ptr + first_row * DV, rounded, rows, cols, DV, row_ok, cols < DV)
    if remainder_ptr is not None:
        if remainder_ptr.dtype.element_ty == tl.int16:  # see with_remainder of call.py
            distance = out.to(tl.int32, bitcast=True) - upper_half(rounded)
            remainder = tl.minimum(tl.maximum(distance, -0x8000), 0x7FFF)
        else:
            remainder = (out - rounded.to(tl.float32)) * REMAINDER_SCALE
        store_tile(remainder_ptr + first_row * DV, remainder, rows, cols, DV, row_ok, cols < DV)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32s to the nearest of a dtype. The interpreter cuts bfloat16 off instead, and a remainder has no room for all of that."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def upper_half(x):
    """The bits of bfloat16s as those of the same numbers in float32."""
    return x.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def through_sigmoid(dm, logits):
    """The gradient of the logits from that of M, reference.py (8). A 0 stays 0, because the logits of a padded key may be NaN."""
    e = tl.exp2(tl.abs(logits.to(tl.float32)) * -LOG2E)
    return tl.where(dm == 0.0, 0.0, dm * (e / ((1.0 + e) * (1.0 + e))))


@triton.jit
def store_mask_tile(
    dmask_ptr, dm, mask_bh, mask_ptr, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, MASK_KIND: tl.constexpr, SHARED_M: tl.constexpr
):  # fmt: skip
    """Store a finished [BLOCK_M, BLOCK_N] tile of dM, summed over queries where M has no query axis. mask_ptr: of this (batch, head)."""
    if SHARED_M:
        row = tl.sum(dm, 0)
        if MASK_KIND >= LOGITS:
            row = through_sigmoid(row, tl.load(mask_ptr + offs_n.to(tl.int64) * stride_mn, mask=offs_n < Nk, other=0.0))
        tl.store(dmask_ptr + mask_bh * Nk + offs_n, row.to(dmask_ptr.dtype.element_ty), mask=offs_n < Nk)
    else:
        if MASK_KIND >= LOGITS:
            dm = through_sigmoid(dm, load_tile(mask_ptr, offs_m, offs_n, stride_mm, stride_mn, offs_m < Nq, offs_n < Nk))
        store_tile(dmask_ptr + mask_bh * Nq * Nk, dm, offs_m, offs_n, Nk, offs_m < Nq, offs_n < Nk)


@triton.jit
def store_dalpha(ptr, ds, m, mbar_ptr, offs_m, row_ok):
    """Store the share of a tile of dS in dalpha, reference.py (8). mbar_ptr: of this (batch, head)."""
    mbar = tl.load(mbar_ptr + offs_m, mask=row_ok, other=0.0)
    tl.store(ptr, tl.sum(tl.sum(rounded_product(ds, m - mbar[:, None]), 1), 0))


@triton.jit
def store_key_gradients(
    dk_ptr, dv_ptr, dk, dv, bg, offs_n, live, Nk, scale, keep_scale,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Store the finished dK and dV of a key block, reference.py (7). bg: b * Hkv + g.

    The gradient of a padded key is exactly 0, even where a NaN elsewhere in the row made P NaN.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    if NEED_DK:
        store_tile(dk_ptr + bg * Nk * D, tl.where(live[:, None], dk * scale, 0.0), offs_n, offs_d, D, offs_n < Nk, offs_d < D)
    if NEED_DV:
        store_tile(dv_ptr + bg * Nk * DV, tl.where(live[:, None], dv * keep_scale, 0.0), offs_n, offs_dv, DV, offs_n < Nk, offs_dv < DV)
