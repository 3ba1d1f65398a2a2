"""The online softmax over the keys of a query block, reference.py (2)-(4)."""

from __future__ import annotations

import triton
import triton.language as tl

from .load import edge_of, live_keys, live_span, load_block, load_mask
from .score import as_product, dot, dropout_keep, matmul, rounded_product, score_tile

LN2 = tl.constexpr(0.6931471805599453)
SUM_COLUMNS = tl.constexpr(16)  # The fewest that a product may have.
FLOAT16_SCALE = tl.constexpr(2.0**15)  # P is multiplied by it before it is rounded to float16, where many small ones would become 0.
LOWEST_LOG2 = tl.constexpr(-2.3e38 * 1.4426950408889634)  # A score below counts as -inf, reference.py's LOWEST_SCORE in base 2.


@triton.jit
def softmax_step(s, m_i):
    """One step of the online softmax, reference.py (2). Returns p [BLOCK_M, BLOCK_N], the factor for earlier sums, and m_i."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_finite = tl.where(tl.abs(m_new) == float("inf"), 0.0, m_new)
    return tl.exp2(s - m_finite[:, None]), tl.exp2(m_i - m_finite), m_new


@triton.jit
def add_to_sum(total, lost, rescale, added):
    """rescale * total + added, and what rounding has taken from that and from sums before it.

    Where the weights of a row are nearly the same, so is what each block adds, and thousands of roundings to the same side add up.
    """
    before = rounded_product(total, rescale)
    total = before + added
    return total, lost * rescale + (added - (total - before))


@triton.jit
def with_lost(total, lost):
    """A finished sum of add_to_sum. An infinite one has lost NaN, and stays infinite."""
    return total + tl.where(lost == lost, lost, 0.0)


@triton.jit
def rescaled(factor, sums):
    """factor * sums, but 0 where factor is 0: a sum of M over keys whose weight has vanished may be infinite."""
    return tl.where(factor == 0.0, 0.0, factor * sums)


@triton.jit
def softmax_finish(acc, mbar, m_i, l_i, divisor, keep_scale):
    """Output, mbar and natural logsumexp of finished rows, reference.py (3) and (4), and l_i. acc is divided by divisor, see attend.

    keep_scale is dropout's 1/(1-p). It is applied here, in float32: applied to P it would add a rounding to 16 bits that dP in backward
    does not have, and delta would no longer cancel dP where few keys are left.
    A dead row, without any key to attend to, has l_i = 0: its output is 0 and its logsumexp -inf. A row with a score of +inf is NaN with
    logsumexp +inf, and NaN is what becomes of its l_i.
    """
    dead = l_i == 0.0
    lse = tl.where(dead, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    infinite = m_i == float("inf")
    l_i = tl.where(infinite, float("nan"), l_i)
    divisor = tl.where(infinite, float("nan"), divisor)
    out = tl.where(dead[:, None], 0.0, acc * (keep_scale / divisor)[:, None])
    return out, tl.where(dead, 0.0, mbar / l_i), lse, l_i


@triton.jit
def attend(
    q, k_head, v_head, b, g, mask_ptr, pad_ptr, seed_ptr, alpha,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn, stride_pn,
    offs_m, bh, lo, hi, Nq, Nk, scale, drop_threshold,
    D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, SAVE_MBAR: tl.constexpr, ALLOW_TF32: tl.constexpr,
    PINNED_MASK: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attention of one query block to the keys lo..hi, by the online softmax: acc [BLOCK_M, BLOCK_DV] and rows mbar, m_i, l_i, divisor.

    lo..hi are whole blocks, or end at Nk: the compiler loads in wide words only where it knows that blocks start at multiples.
    PINNED_MASK: M is brought to where products lie by itself. Loaded an element at a time it would otherwise have P computed twice, where M
    lies as well.
    l_i is the sum of P, and divisor that of P as V is multiplied by it, rounded where V has 16 bits. Divided by that, acc is a mean of V,
    and delta (5), which is made of it, cancels a dP that is the same for all keys.
    SUM_BY_PRODUCT: the rounded P is summed by a product with ones, which takes fewer instructions than additions do.
    Where the value has no columns, DV = 0, only the rows are computed: the softmax of an attention map.
    acc and mbar are not yet divided, nor acc by dropout's 1-p. m_i is in base 2. In a dead row m_i is -inf and l_i 0.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    ROUNDS: tl.constexpr = DV > 0 and q.dtype != tl.float32
    BY_PRODUCT: tl.constexpr = ROUNDS and SUM_BY_PRODUCT
    BY_STEP: tl.constexpr = tl.constexpr(q.dtype == tl.float32 and not ALLOW_TF32)  # where backward reads m_i and l_i, not lse
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    l_lost = tl.zeros([BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N, SUM_COLUMNS], 1.0, q.dtype)
    divisor = tl.zeros([BLOCK_M, SUM_COLUMNS] if BY_PRODUCT else [BLOCK_M], tl.float32)
    mbar = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    lo, hi = live_span(pad_ptr, lo, hi, stride_pn, HAS_PADDING, BLOCK_N)
    mask_rows = tl.minimum(offs_m, Nq - 1)  # past the end the last one again: a load that tests rows has to fill in zeros
    # Two loops over a mask in float32 would want more registers than there are.
    WIDE_MASK: tl.constexpr = MASK_KIND > 0 and mask_ptr.dtype.element_ty == tl.float32
    ONE_LOOP: tl.constexpr = HAS_PADDING or HAS_DROPOUT or q.dtype == tl.float32 or WIDE_MASK
    edge = edge_of(lo, hi, ONE_LOOP, BLOCK_N)
    for EDGE in tl.static_range(ONE_LOOP, 2):
        for start_n in tl.range(edge if EDGE else lo, hi if EDGE else edge, BLOCK_N, disable_licm=EDGE > ONE_LOOP):
            offs_n, n_cols = start_n + tl.arange(0, BLOCK_N), Nk if EDGE else None
            live = live_keys(pad_ptr, offs_n, Nk, stride_pn, HAS_PADDING, EDGE)
            k = load_block(k_head, b, g, start_n, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)  # [BLOCK_N, BLOCK_D]
            qk = matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, ALLOW_TF32)
            m = load_mask(mask_ptr, mask_rows, offs_n, stride_mm, stride_mn, None, n_cols, live[None, :], MASK_KIND, HAS_PADDING)
            if PINNED_MASK:
                m = as_product(m, BLOCK_M, BLOCK_N)
            s = score_tile(qk, m, live[None, :], scale, alpha, MASK_KIND, BY_STEP)  # [BLOCK_M, BLOCK_N]
            p, rescale, m_i = softmax_step(s, m_i)
            if q.dtype == tl.float32:
                l_i, l_lost = add_to_sum(l_i, l_lost, rescale, tl.sum(p, 1))
            else:
                l_i = l_i * rescale + tl.sum(p, 1)
            if SAVE_MBAR:
                mbar = rescaled(rescale, mbar) + tl.sum(rounded_product(p, m), 1)
            if DV > 0:
                if q.dtype == tl.float16:
                    p = p * FLOAT16_SCALE
                p = p.to(q.dtype)
                if BY_PRODUCT:
                    divisor = dot(p, ones, divisor * rescale[:, None], ALLOW_TF32)
                elif ROUNDS:
                    divisor = divisor * rescale + tl.sum(p.to(tl.float32), 1)
                if HAS_DROPOUT:
                    keep = dropout_keep(seed, offs_m[:, None], offs_n[None, :], bh, drop_threshold)
                    p = tl.where(keep, p, 0.0)
                v = load_block(v_head, b, g, start_n, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
                acc = dot(p, v, acc * rescale[:, None], ALLOW_TF32)
    l_i = with_lost(l_i, l_lost)
    if BY_PRODUCT:
        divisor = tl.max(divisor, 1)  # its columns are all alike
    elif not ROUNDS:
        divisor = l_i  # elsewhere it is multiplied by FLOAT16_SCALE where acc is
    dead = (m_i < LOWEST_LOG2) & (l_i == l_i)  # A maximum does not see NaN, but the sum does.
    return acc, mbar, tl.where(dead, float("-inf"), m_i), tl.where(dead, 0.0, l_i), divisor
