"""Scores of a query and a key block, their probabilities, and their gradients.

Scores are in base 2 inside a kernel: a factor log2(e) is folded into the scale and into alpha. What leaves a kernel is in natural units.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LSE_ROUNDING = tl.constexpr(2.0**-21)  # of an lse: four units in the last place, more than it and an S of its size are off together
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def dot(a, b, acc, ALLOW_TF32: tl.constexpr):
    """acc + a @ b in float32. Operands in float32 keep their 24 bits unless ALLOW_TF32."""
    if INTERPRETED:  # The interpreter would multiply the integers that hold bfloat16. Products of 16-bit floats are exact in float32.
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
def rounded_product(a, b):
    """a * b in float32, rounded by itself, which a product that is summed over lanes has to be.

    A compiler may contract a product and the addition of what another lane holds to one fma, and then two lanes that hold the same sum have
    different last bits. What is an fma already it leaves alone.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def alpha_in_base_2(alpha):
    """alpha * log2(e). A finite alpha stays finite, so that it leaves a score where M is 0 as it is."""
    scaled = alpha * LOG2E
    too_large = (tl.abs(scaled) == float("inf")) & (tl.abs(alpha) != float("inf"))
    return tl.where(too_large, tl.where(scaled < 0.0, -LARGEST, LARGEST), scaled)


@triton.jit
def score_tile(qk, m, live, scale, alpha, MASK_KIND: tl.constexpr, BY_STEP: tl.constexpr):
    """Scores in base 2, reference.py (1), and -inf where the key is not live, unless live is None. m: of M, unused without a mask.

    BY_STEP: alpha * M is rounded, and then the sum, whatever else is made of them, so that forward and backward make the same score.
    """
    if BY_STEP:
        if MASK_KIND:
            s = tl.fma(qk, scale * LOG2E, rounded_product(alpha_in_base_2(alpha), m))
        else:
            s = rounded_product(qk, scale * LOG2E)
    else:
        s = qk * (scale * LOG2E)
        if MASK_KIND:
            s += alpha_in_base_2(alpha) * m
    return s if live is None else tl.where(live, s, float("-inf"))


@triton.jit
def lse_to_rebuild(lse):
    """The lse in base 2 that P is rebuilt from: +inf in a dead row, whose P is 0, and NaN in a row with a score of +inf.

    Where it is so large that rounding S and L could make P more than 2, even infinite, it is raised by what is beyond that.
    """
    lse_log2 = lse * LOG2E
    raised = lse_log2 + tl.maximum(tl.abs(lse_log2) * LSE_ROUNDING - 1.0, 0.0)
    return tl.where(lse_log2 == float("inf"), float("nan"), tl.where(lse_log2 == float("-inf"), float("inf"), raised))


@triton.jit
def exponents(qk, m, live, shift, factor, scale, alpha, MASK_KIND: tl.constexpr, BY_FMA: tl.constexpr):
    """S - shift in base 2, of which `weights` makes P. It is -inf where a key is not live.

    live: None where the caller selects before it sums over keys or stores; what comes of a key that is not live means nothing then.
    shift, factor: of load_softmax, in a shape that broadcasts. Where there is a factor, S is as in forward and shift its maximum, and
    only what comes of a key that is not live is above it.

    Else at most two fused multiply-adds make it. BY_FMA: M is added where the sums of the product lie, in their registers. Otherwise
    alpha * M - shift is made where M lies, and takes registers of its own.
    """
    if factor is not None:
        return tl.minimum(score_tile(qk, m, live, scale, alpha, MASK_KIND, tl.constexpr(True)) - shift, 0.0)
    if not MASK_KIND:
        s = qk * (scale * LOG2E) - shift
    elif BY_FMA:
        s = tl.fma(m, alpha_in_base_2(alpha), tl.fma(qk, scale * LOG2E, -shift))
    else:
        s = qk * (scale * LOG2E) + (alpha_in_base_2(alpha) * m - shift)
    return s if live is None else tl.where(live, s, float("-inf"))


@triton.jit
def weights(exponent, factor):
    """P of `exponents`, reference.py (2)."""
    p = tl.exp2(exponent)
    return p if factor is None else p * factor


@triton.jit
def of_rows(factor):
    """The factor of each query, in a shape that broadcasts over a tile whose rows are queries."""
    return None if factor is None else factor[:, None]


@triton.jit
def of_columns(factor):
    """The same over a tile whose columns are queries."""
    return None if factor is None else factor[None, :]


@triton.jit
def dropout_keep(seed, i, j, bh, threshold):
    """Whether dropout keeps a weight: word 0 of Philox4x32-10 of key `seed`, counter (j, i, bh, 0), is at least `threshold`."""
    word, _, _, _ = tl.philox(seed, j, i, bh, 0)
    return word >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def score_gradient(
    a, b, c, d, dp, m, live, shift, factor, delta, i, j, bh, scale, alpha, seed, drop_threshold, keep_scale,
    MASK_KIND: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    KEYS_ARE_ROWS: tl.constexpr,
):  # fmt: skip
    """P where dropout keeps it, without the 1/(1-p), and dS of a query and a key block, [ROWS, COLS], reference.py (6).

    Queries are the rows, where a, b are Q, K and c, d are dO, V, or they are the columns, where a, b are K, Q and c, d are V, dO.
    dp: given for a map, else None, and c d^T. live: as in exponents. live, shift, factor, delta, the indices i of queries and j of keys are
    shaped to broadcast.
    """
    if HAS_DROPOUT:  # Ahead of the products: while random numbers are drawn, nothing else should take registers.
        keep = dropout_keep(seed, i, j, bh.to(tl.int32), drop_threshold)
    # A mask that is turned takes a long way to the product's sums, and float32 has no registers for it.
    by_fma: tl.constexpr = tl.constexpr(not KEYS_ARE_ROWS and a.dtype.primitive_bitwidth == 16)
    exponent = exponents(matmul(a, tl.trans(b), ROWS, COLS, ALLOW_TF32), m, live, shift, factor, scale, alpha, MASK_KIND, by_fma)
    if dp is None:
        dp = matmul(c, tl.trans(d), ROWS, COLS, ALLOW_TF32)
    p = weights(exponent, factor)
    p_kept = p
    if HAS_DROPOUT:
        p_kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p_kept, rounded_product(p, dp - delta)


@triton.jit
def as_product(m, ROWS: tl.constexpr, COLS: tl.constexpr):
    """m, in the registers where a product's sums lie, so that nothing made of both goes through shared memory.

    A product of zeros is added to it, which changes no value.
    """
    return tl.dot(tl.zeros([ROWS, 16], tl.float16), tl.zeros([16, COLS], tl.float16), m)
