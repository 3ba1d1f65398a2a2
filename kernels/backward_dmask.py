"""dM with many queries: one program per tile of dM sums alpha_h dS over every (batch, head) that reads the tile, reference.py (8).

The sum stays in registers and is stored once; where M has no query axis it is over the queries as well. dalpha comes with it, a partial
sum per tile of scores and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from . import descriptors, plan
from .launch import launch, torch_step
from .operands import Rows, accumulator, gradient_arguments, pins_mask, sharing_arguments
from .primitives.load import (
    SOFT,
    head_of,
    live_keys,
    load_alpha,
    load_block,
    load_map_gradient,
    load_mask,
    load_queries,
    mask_offset,
    unless_padding,
)
from .primitives.rows import load_rows
from .primitives.score import as_product, of_rows, score_gradient
from .primitives.store import store_dalpha, store_mask_tile
from .tiles import Tile, cdiv


@triton.jit(do_not_specialize=["Nq", "drop_threshold"])
def _dmask_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, alpha_ptr, pad_ptr, seed_ptr, do_ptr, weights_ptr, rows_ptr, normalizer_ptr, mbar_ptr,
    dmask_ptr, dalpha_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mi, stride_mh, stride_mm, stride_mn, inner_batch,
    stride_ah, stride_pb, stride_pn,
    stride_dob, stride_doh, stride_dom, stride_dod,
    B, H, Nq, Nk, n_masks, sharers, part_sharers, part_heads, own_step, share_step, scale, drop_threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK_KIND: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALLOW_TF32: tl.constexpr,
    SHARED_H: tl.constexpr, SHARED_M: tl.constexpr, IN_PARTS: tl.constexpr, NEED_DALPHA: tl.constexpr, PINNED_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(Nk, BLOCK_N)
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    m_tiles = 1 if SHARED_M else m_blocks
    n_block = pid % n_blocks
    m_lo = pid // n_blocks % m_tiles
    outer = pid // n_blocks // m_tiles  # of M's batch and head axes, behind those of its parts
    mask_heads = 1 if SHARED_H else H
    first_b = outer // mask_heads % n_masks * own_step
    part = outer // mask_heads // n_masks
    head_parts = tl.cdiv(H, part_heads) if SHARED_H else 1
    h_lo = part % head_parts * part_heads if SHARED_H else outer % mask_heads
    i_lo = part // head_parts * part_sharers
    start_n = n_block * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m_block in range(m_lo, m_blocks if SHARED_M else m_lo + 1):
        offs_m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = offs_m < Nq
        for i in range(i_lo, tl.minimum(sharers, i_lo + part_sharers)):
            b = tl.cast(first_b + i * share_step, tl.int64)
            live = live_keys(pad_ptr + b * stride_pb if HAS_PADDING else None, offs_n, Nk, stride_pn, HAS_PADDING)
            mask_tile = mask_ptr + mask_offset(b, inner_batch, stride_mb, stride_mi) + h_lo.to(tl.int64) * stride_mh
            m_rows = unless_padding(Nq, live, HAS_PADDING)
            m = load_mask(mask_tile, offs_m, offs_n, stride_mm, stride_mn, m_rows, Nk, live[None, :], MASK_KIND, HAS_PADDING)
            if PINNED_MASK:
                m = as_product(m, BLOCK_M, BLOCK_N)
            if NEED_DALPHA:
                partials = dalpha_ptr + tl.cast(m_block * n_blocks + n_block, tl.int64) * B * H + b * H
            heads = tl.minimum(part_heads, H - h_lo) if SHARED_H else 1
            seen = unless_padding(heads, live, HAS_PADDING)
            for head in range(h_lo, h_lo + seen):
                h = tl.cast(head, tl.int64)
                bh = b * H + h
                g = h // GROUP
                alpha = load_alpha(alpha_ptr, h, stride_ah, MASK_KIND)
                shift, factor, delta = load_rows(rows_ptr, normalizer_ptr, bh * Nq, offs_m, Nq)
                q_head, do_head = head_of(q_ptr, b, h, stride_qb, stride_qh), head_of(do_ptr, b, h, stride_dob, stride_doh)
                q, do = load_queries(
                    q_head, do_head, b, h, shift, m_block * BLOCK_M,
                    offs_m, offs_d, offs_dv, stride_qm, stride_qd, stride_dom, stride_dod, Nq, D, DV, HAS_PADDING,
                )  # fmt: skip
                k_head, v_head = head_of(k_ptr, b, g, stride_kb, stride_kh), head_of(v_ptr, b, g, stride_vb, stride_vh)
                k = load_block(k_head, b, g, start_n, offs_n, offs_d, stride_kn, stride_kd, live, offs_d < D)
                v = load_block(v_head, b, g, start_n, offs_n, offs_dv, stride_vn, stride_vd, live, offs_dv < DV)
                dp = load_map_gradient(do_head, weights_ptr, h, offs_m, offs_n, stride_dom, stride_dod, row_ok, live, DV)
                _, ds = score_gradient(
                    q, k, do, v, dp, m, None, shift[:, None], of_rows(factor), delta[:, None], offs_m[:, None], offs_n[None, :], bh,
                    scale, alpha, seed, drop_threshold, keep_scale, MASK_KIND, HAS_DROPOUT, ALLOW_TF32, BLOCK_M, BLOCK_N,
                    tl.constexpr(False),
                )  # fmt: skip
                if HAS_PADDING:  # a key that is padding in this batch element may be none in the next
                    dm = tl.where(live[None, :], dm + alpha * ds, dm)
                else:
                    dm += alpha * ds
                if NEED_DALPHA:
                    store_dalpha(partials + h, tl.where(live[None, :], ds, 0.0), m, mbar_ptr + bh * Nq, offs_m, row_ok)
            if NEED_DALPHA and HAS_PADDING:
                for head in range(h_lo + seen, h_lo + heads):
                    tl.store(partials + head, 0.0)
    offs_m = m_lo * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_tile = mask_ptr + mask_offset(tl.cast(first_b, tl.int64), inner_batch, stride_mb, stride_mi) + tl.cast(h_lo, tl.int64) * stride_mh
    STORED_KIND: tl.constexpr = tl.constexpr(SOFT if IN_PARTS else MASK_KIND)
    store_mask_tile(dmask_ptr, dm, outer.to(tl.int64), mask_tile, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, STORED_KIND, SHARED_M)


def _tile(call: Call, dout: Tensor) -> Tile:
    return descriptors.tile(call, "dmask", call.query, dout, call.key, call.value, takes_padding=True)


def partials(call: Call, dout: Tensor) -> int:
    """How many rows of dalpha partials `run` fills."""
    tile = _tile(call, dout)
    return cdiv(call.problem.Nq, tile.block_m) * cdiv(call.problem.Nk, tile.block_n)


def run(call: Call, dout: Tensor, rows: Rows, mbar: Tensor | None, dmask: Tensor, dalpha: Tensor | None) -> None:
    """Fill dmask, contiguous, in its own shape and dtype, and where given the dalpha partials (partials(call), B, H)."""
    t, tile = call.problem, _tile(call, dout)
    mask_heads, mask_queries = dmask.shape[2:4]
    programs = t.sharing.masks * mask_heads * cdiv(mask_queries, tile.block_m) * cdiv(t.Nk, tile.block_n)
    cut = plan.parts_of_dmask(t, programs, t.H if mask_heads == 1 else 1)
    parts = parts_for(call, cut, dmask)
    arguments = gradient_arguments(call, tile, dout, rows)
    arguments |= descriptors.blocks(tile, q_ptr=call.query, do_ptr=dout, k_ptr=call.key, v_ptr=call.value)
    arguments |= dict(
        mbar_ptr=mbar, dmask_ptr=dmask if parts is None else parts, dalpha_ptr=dalpha,
        B=t.B, n_masks=t.sharing.masks, part_sharers=cut.sharers, part_heads=cut.heads, **sharing_arguments(t),
        SHARED_H=mask_heads == 1, SHARED_M=mask_queries == 1, IN_PARTS=parts is not None, NEED_DALPHA=dalpha is not None,
        PINNED_MASK=mask_heads == 1 and pins_mask(call),
    )  # fmt: skip
    launch(_dmask_kernel, programs * cut.number, arguments, tile)
    add_up(call, parts, dmask)


def parts_for(call: Call, cut: plan.Parts, dmask: Tensor) -> Tensor | None:
    """Room for the parts of dM before the sigmoid of logits, (number, *its shape) in float32; None where the sum is not cut."""
    return accumulator(call, cut.number, *dmask.shape) if cut.number > 1 else None


def add_up(call: Call, parts: Tensor | None, dmask: Tensor | None) -> None:
    """Fill dM with the sum of its parts, in their order, where there are any."""
    if parts is not None and dmask is not None:
        torch_step(_sum_of_parts, dmask, parts, logits_of(call))


def _sum_of_parts(dmask: Tensor, parts: Tensor, logits: Tensor | None) -> None:
    dmask.copy_(through_sigmoid(parts.sum(0), logits))


def logits_of(call: Call) -> Tensor | None:
    return call.mask if call.problem.mask_is_logits else None


def through_sigmoid(dmask: Tensor, logits: Tensor | None) -> Tensor:
    """dM, or where there are logits their gradient, reference.py (8), as primitives/store.py has it for a tile."""
    if logits is None:
        return dmask
    logits = logits.float()
    return torch.where(dmask == 0, 0, dmask * torch.sigmoid(logits) * torch.sigmoid(-logits))
