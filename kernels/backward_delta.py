"""First step of backward where no other pass can take it along: each query row's shift and delta, reference.py (5), in one buffer.

Dead rows get shift = +inf and delta = 0, which makes P and dS exactly 0 there. The row term of dalpha, sum_i mbar_i dL_i in (8), is
summed here too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Saved
from .launch import launch
from .operands import strides
from .primitives.load import load_tile
from .primitives.rows import delta_of, load_dlse, load_softmax, load_unrounded, store_rows
from .tiles import Tile, block_of, cdiv

TILE = Tile(block_m=8, block_n=1, warps=4, stages=1)  # 8 rows a program


@triton.jit(do_not_specialize=["Nq"])
def _delta_kernel(
    out_ptr, remainder_ptr, do_ptr, lse_ptr, normalizer_ptr, dl_ptr, mbar_ptr, rows_ptr, dalpha_ptr,
    stride_dob, stride_doh, stride_dom, stride_dod, stride_dlb, stride_dlh, stride_dlm,
    H, Nq,
    DV: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_DALPHA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    m_block = pid % m_blocks
    h = (pid // m_blocks % H).to(tl.int64)
    b = (pid // m_blocks // H).to(tl.int64)
    bh = b * H + h
    offs_m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_ok = offs_m < Nq
    out = load_unrounded(out_ptr, remainder_ptr, bh, offs_m, offs_dv, row_ok, Nq, DV)
    do = load_tile(do_ptr + b * stride_dob + h * stride_doh, offs_m, offs_dv, stride_dom, stride_dod, row_ok, offs_dv < DV).to(tl.float32)
    shift, _, dead = load_softmax(lse_ptr, normalizer_ptr, bh * Nq, offs_m, row_ok)
    dl = load_dlse(dl_ptr + b * stride_dlb + h * stride_dlh if HAS_DLSE else None, stride_dlm, offs_m, row_ok, HAS_DLSE)
    store_rows(rows_ptr, normalizer_ptr, bh * Nq, shift, delta_of(out, do, dl, dead), offs_m, row_ok)
    if NEED_DALPHA:
        dalpha_rows = dalpha_ptr + m_block * (tl.num_programs(0) // m_blocks) + bh
        store_dalpha_rows(dalpha_rows, mbar_ptr + bh * Nq, dl, dead, offs_m, row_ok)


@triton.jit
def store_dalpha_rows(ptr, mbar_ptr, dl, dead, offs_m, row_ok):
    """Store a block's sum of mbar * dL, without dead rows. mbar_ptr: of this (batch, head)."""
    mbar = tl.load(mbar_ptr + offs_m, mask=row_ok, other=0.0)
    tl.store(ptr, tl.sum(tl.where(dead, 0.0, mbar * dl), 0))


def partials(queries: int) -> int:
    """How many rows of dalpha partials `run` fills."""
    return cdiv(queries, TILE.block_m)


def run(saved: Saved, dout: Tensor, dlse: Tensor | None, rows: Tensor, dalpha: Tensor | None) -> None:
    """Fill rows (room_for_rows) and, where given, dalpha partials (partials(Nq), B, H), which only dlse can make other than 0."""
    out, remainder, lse, mbar, normalizer = saved
    B, H, Nq, Dv = dout.shape
    arguments = dict(
        out_ptr=out, remainder_ptr=remainder, do_ptr=dout, lse_ptr=lse, normalizer_ptr=normalizer, dl_ptr=dlse, mbar_ptr=mbar,
        rows_ptr=rows, dalpha_ptr=dalpha,
        **strides("do", "bhmd", dout), **strides("dl", "bhm", dlse), H=H, Nq=Nq,
        DV=Dv, HAS_DLSE=dlse is not None, NEED_DALPHA=dalpha is not None, BLOCK_M=TILE.block_m, BLOCK_DV=block_of(Dv),
    )  # fmt: skip
    launch(_delta_kernel, B * H * cdiv(Nq, TILE.block_m), arguments, TILE)
