"""dQ in a pass of its own: one program per (batch, split of the keys, query block, head), reference.py (7).

With many queries the keys are in one piece and dQ is stored rounded; dalpha is a by-product, one partial sum per program, for calls in
which no other pass has it. With few, backward_few_queries.py cuts the keys and adds up what is stored here in float32; this is backward's
first pass then, and works out each row's shift and delta for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from . import descriptors
from .launch import launch
from .operands import Rows, accumulator, gradient_arguments
from .primitives.load import (
    edge_of,
    head_of,
    live_keys,
    live_span,
    load_alpha,
    load_block,
    load_map_gradient,
    load_mask,
    load_queries,
    mask_offset,
    query_program,
)
from .primitives.rows import first_rows, load_rows, store_rows
from .primitives.score import dot, of_rows, rounded_product, score_gradient
from .primitives.store import store_tile
from .tiles import Tile, cdiv


@triton.jit(do_not_specialize=["Nq", "drop_threshold", "n_splits", "split_blocks"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr, normalizer_ptr, mbar_ptr,
    dq_ptr, dalpha_ptr, out_ptr, remainder_ptr, lse_ptr, dl_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod, stride_dlb, stride_dlh, stride_dlm,
    B, H, Nq, Nk, n_splits, split_blocks, scale, dq_scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    FIRST_PASS: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_DQ: tl.constexpr, NEED_DALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    h, m_block, offs_m, split, b, bh = query_program(H, Nq, n_splits, BLOCK_M)
    first_block = split * split_blocks
    g = h // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < Nq
    q_head, do_head = q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh
    if FIRST_PASS:
        shift, factor, delta = first_rows(
            do_head, out_ptr, remainder_ptr, lse_ptr, normalizer_ptr,
            dl_ptr + b * stride_dlb + h * stride_dlh if HAS_DLSE else None,
            bh, offs_m, offs_dv, stride_dom, stride_dod, stride_dlm, Nq, DV, HAS_DLSE,
        )  # fmt: skip
        store_rows(rows_ptr, normalizer_ptr, bh * Nq, shift, delta, offs_m, row_ok & (tl.full([BLOCK_M], split, tl.int32) == 0))
    else:
        shift, factor, delta = load_rows(rows_ptr, normalizer_ptr, bh * Nq, offs_m, Nq)
    q, do = load_queries(
        q_head, do_head, b, h, shift, 0, offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING
    )
    alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if NEED_DALPHA:
        mbar = tl.load(mbar_ptr + bh * Nq + offs_m, mask=row_ok, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dalpha = tl.zeros([BLOCK_M], tl.float32)
    pad_batch = pad_ptr + b * stride_pb if HAS_PADDING else None
    end = tl.minimum(Nk, (first_block + split_blocks) * BLOCK_N)
    lo, hi = live_span(pad_batch, first_block * BLOCK_N, end, stride_pn, HAS_PADDING, BLOCK_N)
    ONE_LOOP: tl.constexpr = HAS_PADDING or HAS_DROPOUT or q.dtype == tl.float32
    edge = edge_of(lo, hi, ONE_LOOP, BLOCK_N)
    for EDGE in tl.static_range(ONE_LOOP, 2):
        for start_n in tl.range(edge if EDGE else lo, hi if EDGE else edge, BLOCK_N, disable_licm=EDGE > ONE_LOOP):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_rows = offs_m if EDGE else tl.minimum(offs_m, Nq - 1)  # past the end the last one again, as in attend
            n_rows, n_cols = Nq if EDGE else None, Nk if EDGE else None
            live = live_keys(pad_batch, offs_n, Nk, stride_pn, HAS_PADDING, EDGE)
            k_head, v_head = head_of(k_ptr, b, g, stride_kb, stride_kh), head_of(v_ptr, b, g, stride_vb, stride_vh)
            k = load_block(k_head, b, g, start_n, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
            v = load_block(v_head, b, g, start_n, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
            mask_tile = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) + h * stride_mh if MASK_KIND else None
            m = load_mask(mask_tile, mask_rows, offs_n, stride_mm, stride_mn, n_rows, n_cols, live[None, :], MASK_KIND, HAS_PADDING)
            dp = load_map_gradient(do_ptr + b * stride_dob, weights_ptr, h, offs_m, offs_n, stride_dom, stride_dod, row_ok, live, DV)
            _, ds = score_gradient(
                q, k, do, v, dp, m, live[None, :], shift[:, None], of_rows(factor), delta[:, None], offs_m[:, None], offs_n[None, :], bh,
                scale, alpha, seed, drop_threshold, keep_scale, MASK_KIND, HAS_DROPOUT, ALLOW_TF32, BLOCK_M, BLOCK_N, tl.constexpr(False),
            )  # fmt: skip
            if NEED_DQ:
                dq = dot(ds.to(k.dtype), k, dq, ALLOW_TF32)
            if NEED_DALPHA:
                dalpha += tl.sum(rounded_product(ds, m - mbar[:, None]), 1)
    if NEED_DQ:
        store_tile(dq_ptr + (split * B * H + bh) * Nq * D, dq * dq_scale, offs_m, offs_d, D, row_ok, offs_d < D)
    if NEED_DALPHA:
        tl.store(dalpha_ptr + m_block * (tl.num_programs(0) // tl.cdiv(Nq, BLOCK_M)) + bh, tl.sum(dalpha, 0))


def tile_of(call: Call, kernel: str = "dq") -> Tile:
    return descriptors.tile(call, kernel, call.key, call.value, takes_padding=False)


def partials(call: Call) -> int:
    """How many rows of dalpha partials `run` fills."""
    return cdiv(call.problem.Nq, tile_of(call).block_m)


def run(call: Call, dout: Tensor, rows: Rows, mbar: Tensor | None, dquery: Tensor | None, dalpha: Tensor | None) -> None:
    """Fill, where given, dquery (B, H, Nq, D) and the dalpha partials (partials(call), B, H)."""
    t, tile = call.problem, tile_of(call)
    _launch(call, tile, dout, rows, 1, cdiv(t.Nk, tile.block_n), t.scale, mbar_ptr=mbar, dq_ptr=dquery, dalpha_ptr=dalpha)


def run_split(call: Call, dout: Tensor, rows: Rows, splits: int) -> Tensor:
    """dQ / scale in parts, float32 (at most `splits`, B, H, Nq, D). Fills rows.values where they are to be worked out."""
    t, tile = call.problem, tile_of(call, "split_dq")
    blocks = cdiv(t.Nk, tile.block_n)
    split_blocks = cdiv(blocks, splits)
    parts = accumulator(call, cdiv(blocks, split_blocks), t.B, t.H, t.Nq, t.D)
    _launch(call, tile, dout, rows, parts.shape[0], split_blocks, 1.0, mbar_ptr=None, dq_ptr=parts, dalpha_ptr=None)
    return parts


def _launch(
    call: Call, tile: Tile, dout: Tensor, rows: Rows, splits: int, split_blocks: int, dq_scale: float, **pointers: Tensor | None
) -> None:
    t = call.problem
    arguments = gradient_arguments(call, tile, dout, rows)
    arguments.update(
        **descriptors.blocks(tile, k_ptr=call.key, v_ptr=call.value), **rows.arguments(), **pointers,
        B=t.B, n_splits=splits, split_blocks=split_blocks, dq_scale=dq_scale,
        NEED_DQ=pointers["dq_ptr"] is not None, NEED_DALPHA=pointers["dalpha_ptr"] is not None,
    )  # fmt: skip
    launch(_dq_kernel, t.B * t.H * splits * cdiv(t.Nq, tile.block_m), arguments, tile)
