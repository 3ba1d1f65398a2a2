"""M = sigmoid(logits), written once: with many queries, where each head of each pass would take the sigmoid again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from .launch import launch
from .operands import mask_kind, strides
from .primitives.load import ROUNDED_LOGITS, sigmoid
from .tiles import Tile, cdiv

ROW = Tile(block_m=1, block_n=1024, warps=4, stages=1)


@triton.jit(do_not_specialize=["Nq"])
def _soft_mask_kernel(
    logits_ptr, m_ptr, stride_lb, stride_li, stride_lh, stride_lm, stride_ln, inner, H, Nq, Nk, BLOCK_N: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(Nk, BLOCK_N)
    row = (pid // n_blocks).to(tl.int64)  # of M, (outer, inner, h, i)
    offs_n = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = row // Nq // H
    logits_batch = logits_ptr + batch // inner * stride_lb + batch % inner * stride_li
    logits_row = logits_batch + row // Nq % H * stride_lh + row % Nq * stride_lm
    logits = tl.load(logits_row + offs_n.to(tl.int64) * stride_ln, mask=offs_n < Nk, other=0.0)
    tl.store(m_ptr + row * Nk + offs_n, sigmoid(logits.to(tl.float32)).to(m_ptr.dtype.element_ty), mask=offs_n < Nk)


def soften(call: Call, buffer: Tensor | None = None) -> Call:
    """The call with M, rounded to the logits' dtype, in place of logits, where queries are many; else as it is.

    buffer: where to write M, contiguous, of the logits' shape and dtype; None: memory of its own.
    """
    logits = call.mask
    if logits is None or mask_kind(call.problem) != ROUNDED_LOGITS.value:
        return call
    shape = logits.shape
    if buffer is None:  # as large as the logits are in memory: an expanded axis stays one
        logits = logits[tuple(slice(None) if stride else slice(1) for stride in logits.stride())]
        buffer = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _fill(logits, buffer)
    return call._replace(mask=buffer.expand(shape), problem=call.problem._replace(mask_is_logits=False))


def _fill(logits: Tensor, m: Tensor) -> None:
    outer, inner, H, Nq, Nk = logits.shape
    arguments = dict(logits_ptr=logits, m_ptr=m, inner=inner, H=H, Nq=Nq, Nk=Nk, BLOCK_N=ROW.block_n) | strides("l", "bihmn", logits)
    launch(_soft_mask_kernel, outer * inner * H * Nq * cdiv(Nk, ROW.block_n), arguments, ROW)
