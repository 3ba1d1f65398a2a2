"""Pure Triton helpers that several kernels share: tiles in, tiles out, no stores.

The formulas are cited by their numbers in smattn/reference.py. Scores live in base 2 inside a kernel (a factor
log2(e) is folded into the scale and into alpha), everything that leaves a kernel is in natural units.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# MASK_KIND, 0 without a mask: mask_ptr is M, logits of M, or logits whose M the other passes read rounded to their dtype.
SOFT, LOGITS, ROUNDED_LOGITS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def dot(a, b, acc, ALLOW_TF32: tl.constexpr):
    """acc + a @ b in float32. float32 operands keep their 24 bits unless ALLOW_TF32."""
    if INTERPRETED:  # the interpreter holds bfloat16 as integers and would multiply those; products of 16-bit floats are exact in float32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if ALLOW_TF32:
        return tl.dot(a, b, acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def matmul(a, b, ROWS: tl.constexpr, COLS: tl.constexpr, ALLOW_TF32: tl.constexpr):
    """a @ b in float32, [ROWS, COLS]."""
    return dot(a, b, tl.zeros([ROWS, COLS], tl.float32), ALLOW_TF32)


@triton.jit
def load_tile(ptr, rows, cols, stride_row, stride_col, row_ok, col_ok):
    """[rows, cols] of a strided matrix; 0 where a row or a column is not ok, and nothing is read there."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offsets, mask=row_ok[:, None] & col_ok[None, :], other=0.0)


@triton.jit
def head_of(x, b, h, stride_b, stride_h):
    """A (batch, head) of x, for load_block: the pointer to it, or x as it is where that is a descriptor."""
    if isinstance(x, tl.tensor_descriptor):
        return x
    else:
        return x + b * stride_b + h * stride_h


@triton.jit
def load_block(x, b, h, start, rows, cols, stride_row, stride_col, row_ok, col_ok):
    """load_tile of the rows that begin at `start`. x: of head_of. A descriptor gives 0 past the ends, and row_ok must say no more."""
    if isinstance(x, tl.tensor_descriptor):
        return x.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(rows.shape[0], cols.shape[0])
    else:
        return load_tile(x, rows, cols, stride_row, stride_col, row_ok, col_ok)


@triton.jit
def store_tile(ptr, tile, rows, cols, n_cols, row_ok, col_ok):
    """Store a tile to a contiguous matrix of n_cols columns, rounded once to its dtype."""
    offsets = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def store_mask_tile(
    dmask_ptr, dm, mask_bh, mask_ptr, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, MASK_KIND: tl.constexpr, SHARED_M: tl.constexpr
):  # fmt: skip
    """Store a finished [BLOCK_M, BLOCK_N] tile of dM, or its sum over queries where M has no query axis; mask_ptr: M there."""
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
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def through_sigmoid(dm, logits):
    """The logits' gradient of dM, reference.py (8). A 0 stays 0: the logits of a padded key may be NaN."""
    e = tl.exp2(tl.abs(logits.to(tl.float32)) * -LOG2E)
    return tl.where(dm == 0.0, 0.0, dm * (e / ((1.0 + e) * (1.0 + e))))


@triton.jit
def query_program(H, Nq, n_splits, BLOCK_M: tl.constexpr):
    """Of one program per (batch, split of the keys, query block, head), heads fastest: h, the number and rows of its query block, the
    split, b, and b * H + h.
    """
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    m_block = pid // H % m_blocks
    split = pid // H // m_blocks % n_splits
    b = (pid // H // m_blocks // n_splits).to(tl.int64)
    return h, m_block, m_block * BLOCK_M + tl.arange(0, BLOCK_M), split, b, b * H + h


@triton.jit
def live_keys(pad_ptr, offs_n, end, stride_pn, HAS_PADDING: tl.constexpr):
    """[BLOCK_N]: the key lies before `end` and is not padding."""
    live = offs_n < end
    if HAS_PADDING:
        live &= tl.load(pad_ptr + offs_n.to(tl.int64) * stride_pn, mask=live, other=1) == 0
    return live


@triton.jit
def unless_padding(n, live, HAS_PADDING: tl.constexpr):
    """n, the number of queries or heads to go over, but 0 for a key block of padding alone: all of its gradients are 0."""
    return tl.where(tl.max(live.to(tl.int32), 0) > 0, n, 0) if HAS_PADDING else n


@triton.jit
def live_span(pad_ptr, lo, hi, stride_pn, HAS_PADDING: tl.constexpr, BLOCK_N: tl.constexpr):
    """lo..hi less the whole key blocks of padding at either end, in which nothing counts: batches are padded at their end."""
    if HAS_PADDING:
        first, last = hi, lo
        for start in range(lo, hi, 1024):
            keys = start + tl.arange(0, 1024)
            live = live_keys(pad_ptr, keys, hi, stride_pn, HAS_PADDING)
            first = tl.minimum(first, tl.min(tl.where(live, keys, hi), 0))
            last = tl.maximum(last, tl.max(tl.where(live, keys + 1, lo), 0))
        return first // BLOCK_N * BLOCK_N, last  # the compiler has to know that blocks start at multiples, see attend
    else:
        return lo, hi


@triton.jit
def load_mask(
    mask_ptr, rows, cols, stride_row, stride_col, n_rows, n_cols, live, MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr
):  # fmt: skip
    """Tile of M in float32, whatever its dtype; 0 where the key is not live, some number past the ends, and the scalar 0 without a mask.

    Padding is selected out of what was loaded: a load that skips keys in the middle is one of single elements.
    """
    if MASK_KIND:
        m = load_tile(mask_ptr, rows, cols, stride_row, stride_col, rows < n_rows, cols < n_cols).to(tl.float32)
        if MASK_KIND >= LOGITS:
            m = sigmoid(m)
        if MASK_KIND == ROUNDED_LOGITS:
            m = m.to(mask_ptr.dtype.element_ty).to(tl.float32)
        return tl.where(live, m, 0.0) if HAS_PADDING else m
    else:
        return 0.0


@triton.jit
def load_alpha(alpha_ptr, h, stride_ah, MASK_KIND: tl.constexpr):
    """alpha_h, 0 without a mask."""
    if MASK_KIND:
        return tl.load(alpha_ptr + h.to(tl.int64) * stride_ah)
    else:
        return 0.0


@triton.jit
def score_tile(qk, m, live, scale, alpha, MASK_KIND: tl.constexpr):
    """Scores in base 2, reference.py (1); -inf where the key is not live. m is the mask tile, unused without a mask."""
    s = qk * (scale * LOG2E)
    if MASK_KIND:
        s += (alpha * LOG2E) * m
    return tl.where(live, s, float("-inf"))


@triton.jit
def nan_if_infinite(lse_log2):
    """A row's lse, to rebuild P from: a score of +inf makes all the row NaN, as in plain torch, where exp(S - L) would be 0."""
    return tl.where(lse_log2 == float("inf"), float("nan"), lse_log2)


@triton.jit
def probabilities(
    q, k, m, live, lse, scale, alpha, MASK_KIND: tl.constexpr, ALLOW_TF32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """P = exp(S - L) of a query and a key block, reference.py (2): exactly 0 where the key is not live, dead rows (lse = -inf) included."""
    qk = matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, ALLOW_TF32)
    s = score_tile(qk, m, live[None, :], scale, alpha, MASK_KIND)
    return tl.where(live[None, :], tl.exp2(s - nan_if_infinite(lse * LOG2E)[:, None]), 0.0)


@triton.jit
def softmax_step(s, m_i, l_i):
    """One step of the online softmax, reference.py (2): p [BLOCK_M, BLOCK_N], the factor for what is already summed, m_i and l_i."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_finite = tl.where(tl.abs(m_new) == float("inf"), 0.0, m_new)
    rescale = tl.exp2(m_i - m_finite)
    p = tl.exp2(s - m_finite[:, None])
    return p, rescale, m_new, l_i * rescale + tl.sum(p, 1)


@triton.jit
def softmax_finish(acc, mbar, m_i, l_i, keep_scale):
    """Output, mbar and natural logsumexp of finished rows, reference.py (3) and (4).

    keep_scale is 1/(1-p) of dropout. It comes here, in float32: on P it would add a rounding to 16 bits that dP in backward has not, and
    delta would no longer cancel dP where few keys are left.
    l_i is 0 in a row without any live key: its output is 0 and its logsumexp -inf. A row whose live scores are
    all -inf (m_i = -inf, l_i > 0) is NaN, with logsumexp -inf, as it is in plain torch; so is one with a score of +inf, its logsumexp +inf.
    """
    dead = l_i == 0.0
    lse = tl.where(dead, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    l_i = tl.where((tl.abs(m_i) == float("inf")) & (l_i > 0.0), float("nan"), l_i)
    out = tl.where(dead[:, None], 0.0, acc * (keep_scale / l_i)[:, None])
    return out, tl.where(dead, 0.0, mbar / l_i), lse


@triton.jit
def attend(
    q, k_head, v_head, b, g, mask_ptr, pad_ptr, seed_ptr, alpha,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn, stride_pn,
    offs_m, bh, lo, hi, Nq, Nk, scale, drop_threshold,
    D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, SAVE_OUT: tl.constexpr, SAVE_MBAR: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attention of one query block to the keys lo..hi, by the online softmax: acc, lost [BLOCK_M, BLOCK_DV] and rows mbar, m_i, l_i.

    lo..hi are whole blocks, or end at Nk: an index that the compiler knows to start at multiples of a block is loaded in wide words.
    lost is what acc lacks because P was rounded to 16 bits: backward takes delta from P in float32, and between the two nothing may be
    missing. It is a sum of its own, 0 unless SAVE_OUT: the bits of acc must not depend on whether it was asked for.
    A value without columns, DV = 0, leaves the rows alone: the softmax of an attention map.
    acc, lost and mbar are not yet divided by l_i, nor the first two by 1-p of dropout; m_i is in base 2. Where every live score is -inf,
    l_i says 1, and where no key is live, 0.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    mbar = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    lost = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32) if SAVE_OUT else 0.0
    any_live = tl.zeros([BLOCK_N], tl.int32)
    lo, hi = live_span(pad_ptr, lo, hi, stride_pn, HAS_PADDING, BLOCK_N)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        live = live_keys(pad_ptr, offs_n, Nk, stride_pn, HAS_PADDING)
        any_live |= live.to(tl.int32)
        k = load_block(k_head, b, g, start_n, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)  # [BLOCK_N, BLOCK_D]
        qk = matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, ALLOW_TF32)
        m = load_mask(mask_ptr, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
        s = score_tile(qk, m, live[None, :], scale, alpha, MASK_KIND)  # [BLOCK_M, BLOCK_N]
        p, rescale, m_i, l_i = softmax_step(s, m_i, l_i)
        if SAVE_MBAR:
            mbar = mbar * rescale + tl.sum(p * m, 1)
        if HAS_DROPOUT:
            keep = dropout_keep(seed, offs_m[:, None], offs_n[None, :], bh, drop_threshold)
            p = tl.where(keep, p, 0.0)
        if DV > 0:
            v = load_block(v_head, b, g, start_n, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
            p_rounded = p.to(v.dtype)
            acc *= rescale[:, None]
            if SAVE_OUT:  # ahead of both products: wgmma waits for what is made of its accumulators in between
                p_lost = (p - p_rounded.to(tl.float32)).to(v.dtype)
                lost *= rescale[:, None]
            acc = dot(p_rounded, v, acc, ALLOW_TF32)
            if SAVE_OUT:
                lost = dot(p_lost, v, lost, ALLOW_TF32)
    l_i = tl.where((m_i == float("-inf")) & (l_i == 0.0), tl.max(any_live, 0).to(tl.float32), l_i)
    return acc, lost, mbar, m_i, l_i


@triton.jit
def finish_rows(lse_log2, delta, dead):
    """What backward reads of query rows: lse in base 2 and delta, in dead rows +inf and 0, which make P and dS exactly 0."""
    return tl.where(dead, float("inf"), nan_if_infinite(lse_log2)), tl.where(dead, 0.0, delta)


@triton.jit
def load_dlse(dl_ptr, stride_dlm, offs_m, row_ok, HAS_DLSE: tl.constexpr):
    """dL of a query block, 0 without. dl_ptr: of this (batch, head)."""
    if HAS_DLSE:
        return tl.load(dl_ptr + offs_m.to(tl.int64) * stride_dlm, mask=row_ok, other=0.0)
    else:
        return 0.0


@triton.jit
def rows_of(out, do, lse, dl):
    """finish_rows from the unrounded output and its gradient, float32, reference.py (5), and which rows are dead."""
    # a row whose live scores are all -inf has lse = -inf too, but NaN for output: its gradients are NaN, not 0
    dead = (lse == float("-inf")) & (tl.sum(out * out, 1) == 0.0)
    lse_log2, delta = finish_rows(lse * LOG2E, tl.sum(out * do, 1) - dl, dead)
    return lse_log2, delta, dead


@triton.jit
def first_rows(do_ptr, out_ptr, lse_ptr, dl_ptr, offs_m, offs_dv, stride_dom, stride_dod, stride_dlm,
               Nq, DV: tl.constexpr, HAS_DLSE: tl.constexpr):  # fmt: skip
    """rows_of for backward's first pass, of a query block of this (batch, head)."""
    row_ok = offs_m < Nq
    do = load_tile(do_ptr, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV).to(tl.float32)
    out = load_tile(out_ptr, offs_m, offs_dv, DV, 1, row_ok, offs_dv < DV).to(tl.float32)
    lse = tl.load(lse_ptr + offs_m, mask=row_ok, other=float("-inf"))
    lse_log2, delta, _ = rows_of(out, do, lse, load_dlse(dl_ptr, stride_dlm, offs_m, row_ok, HAS_DLSE))
    return lse_log2, delta


@triton.jit
def load_rows(rows_ptr, offs_m, Nq):
    """What store_rows stored; past the end lse is +inf, so that P is 0 there."""
    row_ok = offs_m < Nq
    return tl.load(rows_ptr + 2 * offs_m, mask=row_ok, other=float("inf")), tl.load(rows_ptr + 2 * offs_m + 1, mask=row_ok, other=0.0)


@triton.jit
def store_rows(rows_ptr, lse_log2, delta, offs_m, row_ok):
    """Store a block of rows for the passes after. rows_ptr: of this (batch, head)."""
    tl.store(rows_ptr + 2 * offs_m, lse_log2, mask=row_ok)
    tl.store(rows_ptr + 2 * offs_m + 1, delta, mask=row_ok)


@triton.jit
def load_queries(q_head, do_head, b, h, lse_log2, start_m, offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq,
                 D: tl.constexpr, DV: tl.constexpr, HAS_PADDING: tl.constexpr):  # fmt: skip
    """q and dO of a query block of this (batch, head); in dead rows, lse +inf, dO may hold anything: it is selected out, by pointers."""
    row_ok = offs_m < Nq
    q = load_block(q_head, b, h, start_m, offs_m, offs_d, stride_qm, stride_qd, row_ok, offs_d < D)
    if HAS_PADDING:  # without padding no row is dead
        row_ok &= lse_log2 != float("inf")
    return q, load_block(do_head, b, h, start_m, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV)


@triton.jit
def load_map_gradient(dmap_ptr, weights_ptr, h, rows, cols, stride_row, stride_col, row_ok, col_ok, DV: tl.constexpr):
    """dP of an attention map, w_h dA, reference.py (10), for a tile; None where there is a value, through which dP comes instead."""
    if DV == 0:
        return tl.load(weights_ptr + h) * load_tile(dmap_ptr, rows, cols, stride_row, stride_col, row_ok, col_ok)
    else:
        return None


@triton.jit
def score_gradient(
    a, b, c, d, dp, m, live, lse_log2, delta, i, j, bh, scale, alpha, seed, drop_threshold, keep_scale,
    MASK_KIND: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """P where kept, without the 1/(1-p), and dS [ROWS, COLS] of a query and a key block, reference.py (6), queries along either axis.

    a, b are Q, K and c, d are dO, V, or the other way round. dp: None, then c d^T. live, lse, delta and the indices of queries, i, and of
    keys, j: shaped to broadcast.
    """
    if HAS_DROPOUT:  # ahead of the products: while random numbers are made, nothing else should take registers
        keep = dropout_keep(seed, i, j, bh.to(tl.int32), drop_threshold)
    s = score_tile(matmul(a, tl.trans(b), ROWS, COLS, ALLOW_TF32), m, live, scale, alpha, MASK_KIND)
    if dp is None:
        dp = matmul(c, tl.trans(d), ROWS, COLS, ALLOW_TF32)
    p = tl.exp2(s - lse_log2)
    p_kept = p
    if HAS_DROPOUT:
        p_kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p_kept, p * (dp - delta)


@triton.jit
def store_dalpha(ptr, ds, m, mbar_ptr, offs_m, row_ok):
    """Store a tile's share of dalpha, reference.py (8). mbar_ptr: of this (batch, head)."""
    mbar = tl.load(mbar_ptr + offs_m, mask=row_ok, other=0.0)
    tl.store(ptr, tl.sum(tl.sum(ds * (m - mbar[:, None]), 1), 0))


@triton.jit
def store_key_gradients(
    dk_ptr, dv_ptr, dk, dv, bg, offs_n, live, Nk, scale, keep_scale,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Store the finished dK and dV of a key block, reference.py (7), bg = b * Hkv + g.

    A padded key's gradient is exactly 0 even where a NaN elsewhere in the row made P NaN.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    if NEED_DK:
        store_tile(dk_ptr + bg * Nk * D, tl.where(live[:, None], dk * scale, 0.0), offs_n, offs_d, D, offs_n < Nk, offs_d < D)
    if NEED_DV:
        store_tile(dv_ptr + bg * Nk * DV, tl.where(live[:, None], dv * keep_scale, 0.0), offs_n, offs_dv, DV, offs_n < Nk, offs_dv < DV)


@triton.jit
def dropout_keep(seed, i, j, bh, threshold):
    """Word 0 of Philox4x32-10 under key `seed` and counter (j, i, bh, 0) is at least `threshold`: the weight is kept."""
    word, _, _, _ = tl.philox(seed, j, i, bh, 0)
    return word >= threshold.to(tl.uint32, bitcast=True)
