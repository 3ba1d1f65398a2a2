"""The attention map: one program per tile of it sums w_h P_h over the heads in registers, reference.py (9)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Saved
from .launch import launch
from .operands import score_arguments, tile_of
from .primitives.load import live_keys, load_alpha, load_mask, load_tile, mask_offset, unless_padding
from .primitives.rows import load_softmax
from .primitives.score import exponents, matmul, of_rows, weights
from .primitives.store import store_tile
from .tiles import cdiv


@triton.jit(do_not_specialize=["Nq"])
def _map_kernel(
    q_ptr, k_ptr, mask_ptr, alpha_ptr, pad_ptr, weights_ptr, lse_ptr, normalizer_ptr, map_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    H, Nq, Nk, scale,
    GROUP: tl.constexpr, D: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, ALLOW_TF32: tl.constexpr, MASK_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(Nk, BLOCK_N)
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    offs_n = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid // n_blocks % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (pid // n_blocks // m_blocks).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    row_ok = offs_m < Nq
    live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
    mask_tile = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) if MASK_KIND else None
    m = load_mask(mask_tile, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(0, unless_padding(H, live, HAS_PADDING)):
        h = tl.cast(head, tl.int64)
        if MASK_PER_HEAD:
            m = load_mask(mask_tile + h * stride_mh, offs_m, offs_n, stride_mm, stride_mn, Nq, Nk, live[None, :], MASK_KIND, HAS_PADDING)
        q = load_tile(q_ptr + b * stride_qb + h * stride_qh, offs_m, offs_d, stride_qm, stride_qd, row_ok, offs_d < D)
        k = load_tile(k_ptr + b * stride_kb + h // GROUP * stride_kh, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
        shift, factor, _dead = load_softmax(lse_ptr, normalizer_ptr, (b * H + h) * Nq, offs_m, row_ok)
        alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
        qk = matmul(q, tl.trans(k), BLOCK_M, BLOCK_N, ALLOW_TF32)
        by_fma: tl.constexpr = tl.constexpr(q.dtype.primitive_bitwidth == 16)
        exponent = exponents(qk, m, None, shift[:, None], of_rows(factor), scale, alpha, MASK_KIND, by_fma)
        total += tl.load(weights_ptr + h) * weights(exponent, of_rows(factor))
    total = tl.where(live[None, :], total, 0.0)
    store_tile(map_ptr + b * Nq * Nk, total, offs_m, offs_n, Nk, row_ok, offs_n < Nk)


def run(call: Call, saved: Saved, amap: Tensor) -> None:
    """Fill amap (B, Nq, Nk), contiguous, from forward's rows."""
    t, tile = call.problem, tile_of(call, "split")
    arguments = score_arguments(call, tile) | dict(
        weights_ptr=call.head_weights, lse_ptr=saved.lse, normalizer_ptr=saved.normalizer, map_ptr=amap,
        MASK_PER_HEAD=t.mask_shape is not None and t.mask_shape[2] > 1,
    )  # fmt: skip
    launch(_map_kernel, t.B * cdiv(t.Nq, tile.block_m) * cdiv(t.Nk, tile.block_n), arguments, tile)
