"""What every pass of backward reads of each query row: what P is rebuilt from, and delta."""

from __future__ import annotations

import triton
import triton.language as tl

from .load import load_tile
from .score import lse_to_rebuild, rounded_product
from .store import REMAINDER_SCALE, upper_half


@triton.jit
def load_softmax(lse_ptr, normalizer_ptr, row, offs_m, row_ok):
    """What P of the query rows row + offs_m is rebuilt from, see `exponents`: shift and factor; and which are dead. Past the end all are.

    The shift of a dead row is +inf, so that its P is 0. Else it is lse in base 2, or where there is a normalizer the largest score, and the
    factor 1/l.
    """
    if normalizer_ptr is None:
        lse = tl.load(lse_ptr + row + offs_m, mask=row_ok, other=float("-inf"))
        return lse_to_rebuild(lse), None, lse == float("-inf")
    else:
        pair = normalizer_ptr + 2 * (row + offs_m)
        factor = tl.load(pair + 1, mask=row_ok, other=0.0)
        return tl.load(pair, mask=row_ok, other=float("inf")), factor, factor == 0.0


@triton.jit
def store_normalizer(normalizer_ptr, row, m_i, l_i, offs_m, row_ok):
    """Store what load_softmax loads in float32, from finished rows. l_i: 0 in a dead row, NaN in one with a score of +inf."""
    inverse = 1.0 / l_i
    inverse = tl.fma(inverse, tl.fma(-inverse, l_i, 1.0), inverse)  # a quotient is off by as much as two units in its last place
    pair = normalizer_ptr + 2 * (row + offs_m)
    tl.store(pair, tl.where(l_i == 0.0, float("inf"), m_i), mask=row_ok)
    tl.store(pair + 1, tl.where(l_i == 0.0, 0.0, inverse), mask=row_ok)


@triton.jit
def load_dlse(dl_ptr, stride_dlm, offs_m, row_ok, HAS_DLSE: tl.constexpr):
    """dL of a query block; without one 0. dl_ptr: of this (batch, head)."""
    if HAS_DLSE:
        return tl.load(dl_ptr + offs_m.to(tl.int64) * stride_dlm, mask=row_ok, other=0.0)
    else:
        return 0.0


@triton.jit
def delta_of(out, do, dl, dead):
    """Delta from the unrounded output and its gradient, reference.py (5). In a dead row 0, and so is dS, whatever dL is there."""
    return tl.where(dead, 0.0, tl.sum(rounded_product(out, do), 1) - dl)


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
def first_rows(do_ptr, out_ptr, remainder_ptr, lse_ptr, normalizer_ptr, dl_ptr, bh, offs_m, offs_dv, stride_dom, stride_dod, stride_dlm,
               Nq, DV: tl.constexpr, HAS_DLSE: tl.constexpr):  # fmt: skip
    """What load_rows loads, for backward's first pass. The pointers to do and dl are those of this (batch, head)."""
    row_ok = offs_m < Nq
    do = load_tile(do_ptr, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV).to(tl.float32)
    out = load_unrounded(out_ptr, remainder_ptr, bh, offs_m, offs_dv, row_ok, Nq, DV)
    shift, factor, dead = load_softmax(lse_ptr, normalizer_ptr, bh * Nq, offs_m, row_ok)
    return shift, factor, delta_of(out, do, load_dlse(dl_ptr, stride_dlm, offs_m, row_ok, HAS_DLSE), dead)


@triton.jit
def load_rows(rows_ptr, normalizer_ptr, row, offs_m, Nq):
    """Load shift, factor and delta of the query rows row + offs_m. Past the end, offs_m >= Nq, shift is +inf, so that P is 0 there.

    Where there is a normalizer they are its two, and delta as store_rows stored it. Else there is no factor.
    """
    row_ok = offs_m < Nq
    if normalizer_ptr is None:
        pair = rows_ptr + 2 * row + 2 * offs_m
        return tl.load(pair, mask=row_ok, other=float("inf")), None, tl.load(pair + 1, mask=row_ok, other=0.0)
    else:
        pair = normalizer_ptr + 2 * row + 2 * offs_m
        shift, factor = tl.load(pair, mask=row_ok, other=float("inf")), tl.load(pair + 1, mask=row_ok, other=0.0)
        return shift, factor, tl.load(rows_ptr + row + offs_m, mask=row_ok, other=0.0)


@triton.jit
def store_rows(rows_ptr, normalizer_ptr, row, shift, delta, offs_m, row_ok):
    """Store for the passes that follow what load_rows loads of the query rows row + offs_m, and forward has not stored."""
    if normalizer_ptr is None:
        pair = rows_ptr + 2 * row + 2 * offs_m
        tl.store(pair, shift, mask=row_ok)
        tl.store(pair + 1, delta, mask=row_ok)
    else:
        tl.store(rows_ptr + row + offs_m, delta, mask=row_ok)
