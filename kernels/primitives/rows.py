"""The lse and delta of each query row, which every pass of backward reads: one buffer, (B, H, Nq, 2) float32."""

from __future__ import annotations

import triton
import triton.language as tl

from .load import load_tile
from .score import lse_to_rebuild, rounded_product
from .store import REMAINDER_SCALE, upper_half


@triton.jit
def finish_rows(lse, delta, dead):
    """The lse in base 2 and the delta that backward reads. In dead rows they are +inf and 0, which makes P and dS exactly 0."""
    return lse_to_rebuild(lse), tl.where(dead, 0.0, delta)


@triton.jit
def load_dlse(dl_ptr, stride_dlm, offs_m, row_ok, HAS_DLSE: tl.constexpr):
    """dL of a query block; without one 0. dl_ptr: of this (batch, head)."""
    if HAS_DLSE:
        return tl.load(dl_ptr + offs_m.to(tl.int64) * stride_dlm, mask=row_ok, other=0.0)
    else:
        return 0.0


@triton.jit
def rows_of(out, do, lse, dl):
    """lse in base 2 and delta, from the unrounded output and its gradient, reference.py (5), and which rows are dead."""
    dead = lse == float("-inf")
    lse_log2, delta = finish_rows(lse, tl.sum(rounded_product(out, do), 1) - dl, dead)
    return lse_log2, delta, dead


@triton.jit
def load_unrounded(out_ptr, remainder_ptr, bh, offs_m, offs_dv, row_ok, Nq, DV: tl.constexpr):
    """The output of a query block in float32: what forward stored, and what rounding took from it. bh: b * H + h."""
    out = load_tile(out_ptr + bh * Nq * DV, offs_m, offs_dv, DV, 1, row_ok, offs_dv < DV)
    if remainder_ptr is None:
        return out.to(tl.float32)
    else:
        remainder = load_tile(remainder_ptr + bh * Nq * DV, offs_m, offs_dv, DV, 1, row_ok, offs_dv < DV)
        if remainder_ptr.dtype.element_ty == tl.int16:
            return (upper_half(out) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            return out.to(tl.float32) + remainder.to(tl.float32) * (1.0 / REMAINDER_SCALE)


@triton.jit
def first_rows(do_ptr, out_ptr, remainder_ptr, lse_ptr, dl_ptr, bh, offs_m, offs_dv, stride_dom, stride_dod, stride_dlm,
               Nq, DV: tl.constexpr, HAS_DLSE: tl.constexpr):  # fmt: skip
    """rows_of a query block, for backward's first pass. The pointers to do and dl are those of this (batch, head)."""
    row_ok = offs_m < Nq
    do = load_tile(do_ptr, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV).to(tl.float32)
    out = load_unrounded(out_ptr, remainder_ptr, bh, offs_m, offs_dv, row_ok, Nq, DV)
    lse = tl.load(lse_ptr + bh * Nq + offs_m, mask=row_ok, other=float("-inf"))
    lse_log2, delta, _ = rows_of(out, do, lse, load_dlse(dl_ptr, stride_dlm, offs_m, row_ok, HAS_DLSE))
    return lse_log2, delta


@triton.jit
def load_rows(rows_ptr, offs_m, Nq):
    """Load the lse and delta that store_rows stored. Past the end lse is +inf, so that P is 0 there."""
    row_ok = offs_m < Nq
    return tl.load(rows_ptr + 2 * offs_m, mask=row_ok, other=float("inf")), tl.load(rows_ptr + 2 * offs_m + 1, mask=row_ok, other=0.0)


@triton.jit
def store_rows(rows_ptr, lse_log2, delta, offs_m, row_ok):
    """Store lse and delta of a query block for the passes that follow. rows_ptr: of this (batch, head)."""
    tl.store(rows_ptr + 2 * offs_m, lse_log2, mask=row_ok)
    tl.store(rows_ptr + 2 * offs_m + 1, delta, mask=row_ok)
