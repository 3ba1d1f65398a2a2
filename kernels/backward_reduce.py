"""The last pass of backward with few queries: it adds up dQ over the splits of the keys and dalpha over key blocks, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from .launch import launch
from .operands import Rows, strides
from .primitives.rows import load_softmax
from .tiles import Tile, cdiv

TILE = Tile(block_m=1, block_n=256, warps=4, stages=1)  # 256 elements a program


@triton.jit(do_not_specialize=["Nq", "n_splits", "n_tiles"])
def _reduce_kernel(
    parts_ptr, dq_ptr, tiles_ptr, dalpha_ptr, mbar_ptr, lse_ptr, normalizer_ptr, dl_ptr, stride_dlb, stride_dlh, stride_dlm,
    B, H, Nq, n_splits, n_elements, n_tiles, scale,
    NEED_DQ: tl.constexpr, NEED_DALPHA: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dQ is scale times the sum of its parts over the splits. dalpha, a program a head, is summed over key blocks and batch elements."""
    pid = tl.program_id(0)
    heads = H if NEED_DALPHA else 0
    if NEED_DALPHA:
        if pid < H:
            _reduce_dalpha(
                tiles_ptr, dalpha_ptr, mbar_ptr, lse_ptr, normalizer_ptr, dl_ptr, stride_dlb, stride_dlh, stride_dlm, pid,
                B, H, Nq, n_tiles, HAS_DLSE, BLOCK,
            )  # fmt: skip
    if NEED_DQ:
        if pid >= heads:
            offs = (pid - heads).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            ok = offs < n_elements
            total = tl.zeros([BLOCK], tl.float32)
            for split in range(0, n_splits):
                total += tl.load(parts_ptr + tl.cast(split, tl.int64) * n_elements + offs, mask=ok, other=0.0)
            tl.store(dq_ptr + offs, (total * scale).to(dq_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _reduce_dalpha(
    tiles_ptr, dalpha_ptr, mbar_ptr, lse_ptr, normalizer_ptr, dl_ptr, stride_dlb, stride_dlh, stride_dlm, h, B, H, Nq, n_tiles,
    HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dalpha of a head, reference.py (8). The term of dL is a sum of its own: a dL of zeros must give the same bits as none."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_tiles * B, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(tiles_ptr + offs.to(tl.int64) * H + h, mask=offs < n_tiles * B, other=0.0)
    dalpha = tl.sum(total, 0)
    if HAS_DLSE:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, B * Nq, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            ok = offs < B * Nq
            b, m = (offs // Nq).to(tl.int64), offs % Nq
            row = (b * H + h) * Nq + m
            mbar = tl.load(mbar_ptr + row, mask=ok, other=0.0)
            _, _, dead = load_softmax(lse_ptr, normalizer_ptr, row, 0, ok)
            dl = tl.load(dl_ptr + b * stride_dlb + h * stride_dlh + m * stride_dlm, mask=ok, other=0.0)
            total += tl.where(dead, 0.0, mbar * dl)
        dalpha += tl.sum(total, 0)
    tl.store(dalpha_ptr + h, dalpha)


def run(
    call: Call,
    rows: Rows,
    mbar: Tensor | None,
    parts: Tensor | None,
    dquery: Tensor | None,
    tiles: Tensor | None,
    dalpha: Tensor | None,
) -> None:
    """Fill dquery (B, H, Nq, D) from its parts and dalpha (H,) from its tiles, (key blocks, B, H), where they are given."""
    t, n_elements = call.problem, 0 if dquery is None else dquery.numel()
    programs = cdiv(n_elements, TILE.block_n) + (t.H if dalpha is not None else 0)
    arguments = strides("dl", "bhm", rows.dlse) | dict(
        parts_ptr=parts, dq_ptr=dquery, tiles_ptr=tiles, dalpha_ptr=dalpha, mbar_ptr=mbar, lse_ptr=rows.lse,
        normalizer_ptr=rows.normalizer, dl_ptr=rows.dlse,
        B=t.B, H=t.H, Nq=t.Nq, n_splits=0 if parts is None else parts.shape[0], n_elements=n_elements,
        n_tiles=0 if tiles is None else tiles.shape[0], scale=t.scale,
        NEED_DQ=dquery is not None, NEED_DALPHA=dalpha is not None, HAS_DLSE=rows.dlse is not None, BLOCK=TILE.block_n,
    )  # fmt: skip
    launch(_reduce_kernel, programs, arguments, TILE)
