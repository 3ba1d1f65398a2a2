"""What a program reads: its place in the grid, which keys are live, and tiles of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from .score import LOG2E

# MASK_KIND is 0 without a mask; else mask_ptr leads to M, to its logits, or to logits whose M the other passes read rounded to their dtype.
SOFT, LOGITS, ROUNDED_LOGITS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

ALL = tl.constexpr(True)  # of EDGE: every block is tested


@triton.jit
def query_program(H, Nq, n_splits, BLOCK_M: tl.constexpr):
    """Decode the program id of a (batch, key split, query block, head) grid, heads fastest.

    Returns h, the query block, its row offsets, the split, b and b * H + h.
    """
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    m_block = pid // H % m_blocks
    split = pid // H // m_blocks % n_splits
    b = (pid // H // m_blocks // n_splits).to(tl.int64)
    return h, m_block, m_block * BLOCK_M + tl.arange(0, BLOCK_M), split, b, b * H + h


@triton.jit
def live_keys(pad_ptr, offs_n, end, stride_pn, HAS_PADDING: tl.constexpr, EDGE: tl.constexpr = ALL):
    """Which keys lie before `end` and are not padding, [BLOCK_N]. pad_ptr: of this batch. Without EDGE all do, and nothing is tested."""
    if EDGE:
        live = offs_n < end
        if HAS_PADDING:
            live &= tl.load(pad_ptr + offs_n.to(tl.int64) * stride_pn, mask=live, other=1) == 0
        return live
    else:
        return tl.full(offs_n.shape, True, tl.int1)


@triton.jit
def unless_padding(n, live, HAS_PADDING: tl.constexpr):
    """n, a number of queries or heads to go over, or 0 where the whole key block is padding: all of its gradients are 0."""
    return tl.where(tl.max(live.to(tl.int32), 0) > 0, n, 0) if HAS_PADDING else n


@triton.jit
def live_span(pad_ptr, lo, hi, stride_pn, HAS_PADDING: tl.constexpr, BLOCK_N: tl.constexpr):
    """The range lo..hi without the key blocks at either end that are all padding. Batches are usually padded at their end."""
    if HAS_PADDING:
        first, last = hi, lo
        for start in range(lo, hi, 1024):
            keys = start + tl.arange(0, 1024)
            live = live_keys(pad_ptr, keys, hi, stride_pn, HAS_PADDING)
            first = tl.minimum(first, tl.min(tl.where(live, keys, hi), 0))
            last = tl.maximum(last, tl.max(tl.where(live, keys + 1, lo), 0))
        return first // BLOCK_N * BLOCK_N, last  # The compiler has to know that blocks start at multiples, see attend.
    else:
        return lo, hi


@triton.jit
def edge_of(lo, hi, ONE_LOOP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where in lo..hi the key blocks begin that are tested for keys that do not count: at the last one, if it is not whole.

    Those before are a loop of their own, without a test of each score and each load. In the second, which goes round once, nothing is
    worked out ahead and kept in registers (disable_licm). ONE_LOOP: all blocks are tested. So it is under padding, where each has to be,
    and where random numbers or products in float32 cost so much more than tests.
    """
    return lo if ONE_LOOP else hi // BLOCK_N * BLOCK_N


@triton.jit
def mask_offset(b, inner_batch, stride_mb, stride_mi):
    """Where the mask of batch element b begins. The batch has an outer and an inner axis; a stride is 0 where the mask lacks the axis."""
    return b // inner_batch * stride_mb + b % inner_batch * stride_mi


@triton.jit
def load_tile(ptr, rows, cols, stride_row, stride_col, row_ok, col_ok):
    """Load the tile [rows, cols] of a strided matrix. Where a row or a column is not ok it is 0, and nothing is read."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offsets, mask=row_ok[:, None] & col_ok[None, :], other=0.0)


@triton.jit
def head_of(x, b, h, stride_b, stride_h):
    """The (batch, head) of x that load_block reads: a pointer to it, or x itself where x is a descriptor."""
    if isinstance(x, tl.tensor_descriptor):
        return x
    else:
        return x + b * stride_b + h * stride_h


@triton.jit
def load_block(x, b, h, start, rows, cols, stride_row, stride_col, row_ok, col_ok):
    """Load the tile of x, given by head_of, whose rows start at `start`.

    Through a descriptor, rows past the end read as 0 and row_ok is ignored, so row_ok must not exclude anything else.
    """
    if isinstance(x, tl.tensor_descriptor):
        return x.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(rows.shape[0], cols.shape[0])
    else:
        return load_tile(x, rows, cols, stride_row, stride_col, row_ok, col_ok)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def load_mask(
    mask_ptr, rows, cols, stride_row, stride_col, n_rows, n_cols, live, MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr
):  # fmt: skip
    """A tile of M in float32, whatever its dtype; without a mask the scalar 0. n_rows, n_cols: None where no row or column is past the end.

    Where a key is not live the tile is 0, and past the ends it holds some number. Padding is selected out after the load, because a load
    that skips keys in the middle reads single elements.
    """
    if MASK_KIND:
        row_ok = tl.full(rows.shape, True, tl.int1) if n_rows is None else rows < n_rows
        col_ok = tl.full(cols.shape, True, tl.int1) if n_cols is None else cols < n_cols
        m = load_tile(mask_ptr, rows, cols, stride_row, stride_col, row_ok, col_ok).to(tl.float32)
        if MASK_KIND >= LOGITS:
            m = sigmoid(m)
        if MASK_KIND == ROUNDED_LOGITS:
            m = m.to(mask_ptr.dtype.element_ty).to(tl.float32)
        return tl.where(live, m, 0.0) if HAS_PADDING else m
    else:
        return 0.0


@triton.jit
def load_alpha(alpha_ptr, h, stride_ah, MASK_KIND: tl.constexpr):
    """alpha_h; without a mask 0."""
    if MASK_KIND:
        return tl.load(alpha_ptr + h.to(tl.int64) * stride_ah)
    else:
        return 0.0


@triton.jit
def load_queries(q_head, do_head, b, h, shift, start_m, offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq,
                 D: tl.constexpr, DV: tl.constexpr, HAS_PADDING: tl.constexpr):  # fmt: skip
    """q and dO of a query block of this (batch, head). In rows dead by padding dO may hold anything, so pointers do not read it there."""
    row_ok = offs_m < Nq
    q = load_block(q_head, b, h, start_m, offs_m, offs_d, stride_qm, stride_qd, row_ok, offs_d < D)
    if HAS_PADDING:  # Where shift is +inf the row is dead; without padding dO is finite there.
        row_ok &= shift != float("inf")
    return q, load_block(do_head, b, h, start_m, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV)


@triton.jit
def load_map_gradient(dmap_ptr, weights_ptr, h, rows, cols, stride_row, stride_col, row_ok, col_ok, DV: tl.constexpr):
    """A tile of dP of an attention map, w_h dA, reference.py (10). None where the call has a value, through which dP then comes."""
    if DV == 0:
        return tl.load(weights_ptr + h) * load_tile(dmap_ptr, rows, cols, stride_row, stride_col, row_ok, col_ok)
    else:
        return None
