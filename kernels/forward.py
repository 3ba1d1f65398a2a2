"""Forward with many queries: one program per (batch, head, query block) attends to all keys, reference.py (1)-(4).

Heads are the fastest grid index, so the heads that share a tile of M run at the same time and read it from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Saved
from . import descriptors
from .chip import generation
from .launch import arch_of, launch
from .operands import attention_arguments, is_ragged, pins_mask
from .primitives.load import head_of, load_alpha, load_tile, mask_offset, query_program
from .primitives.rows import store_normalizer
from .primitives.softmax import attend, softmax_finish
from .primitives.store import store_output
from .tiles import Tile, cdiv


@triton.jit(do_not_specialize=["Nq", "drop_threshold"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, out_ptr, remainder_ptr, lse_ptr, mbar_ptr, normalizer_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    H, Nq, Nk, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    SAVE_MBAR: tl.constexpr, PINNED_MASK: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    h, _, offs_m, _, b, bh = query_program(H, Nq, 1, BLOCK_M)
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
        offs_m, bh.to(tl.int32), 0, Nk, Nq, Nk, scale, drop_threshold,
        D, DV, MASK_KIND, HAS_PADDING, HAS_DROPOUT, SAVE_MBAR, ALLOW_TF32, PINNED_MASK, SUM_BY_PRODUCT,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    out, mbar, lse, l_i = softmax_finish(acc, mbar, m_i, l_i, divisor, keep_scale)
    store_output(out_ptr, remainder_ptr, out, bh * Nq, offs_m, offs_dv, row_ok, DV)
    tl.store(lse_ptr + bh * Nq + offs_m, lse, mask=row_ok)
    if normalizer_ptr is not None:
        store_normalizer(normalizer_ptr, bh * Nq, m_i, l_i, offs_m, row_ok)
    if SAVE_MBAR:
        tl.store(mbar_ptr + bh * Nq + offs_m, mbar, mask=row_ok)


def sums_by_product(call: Call, tile: Tile) -> bool:
    """Whether the rounded weights are summed by a product with ones: on sm_90 and sm_100, whose counts it lowers.

    Under dropout and beside a wide V registers would spill. Where warps share rows, the two products of P want it in two layouts.
    """
    t, new_enough = call.problem, generation(arch_of(call.query.device)) in (90, 100)
    return new_enough and call.seed is None and max(t.D, t.Dv) <= 128 and tile.block_m >= 16 * tile.warps


def run(call: Call, out: Tensor, saved: Saved) -> None:
    """Fill out (B, H, Nq, Dv), and saved as far as it has tensors."""
    t, tile = call.problem, descriptors.tile(call, "forward", call.key, call.value, takes_padding=False)
    arguments = attention_arguments(call, tile) | descriptors.blocks(tile, k_ptr=call.key, v_ptr=call.value)
    arguments |= dict(
        out_ptr=out, remainder_ptr=saved.remainder, lse_ptr=saved.lse, mbar_ptr=saved.mbar, normalizer_ptr=saved.normalizer,
        SAVE_MBAR=saved.mbar is not None,
        PINNED_MASK=pins_mask(call) and is_ragged(call),
        SUM_BY_PRODUCT=sums_by_product(call, tile),
    )
    launch(_forward_kernel, t.B * t.H * cdiv(t.Nq, tile.block_m), arguments, tile)
