"""The promise on extra memory, and how one call shares it out. Every buffer whose size grows with the call is measured here.

During forward and backward a fused backend holds, besides inputs, outputs and gradients, at most

    a quarter of the bytes of all those, and 16 MiB.

Forward leaves rows to backward, and what rounding took from the output only as far as `queries_with_remainder` says. Where Triton's
kernels split the keys, forward's partial outputs stay below PARTIAL_OUTPUTS, and backward holds `partial_dqueries` partial gradients of
query beside what forward left, and `partial_dmasks` of the mask, and sums of alpha's gradient as `has_room_for_dalpha_tiles` says. These
shares are the same on every chip, because the number of splits decides the order of the sums.

The C++ backends plan in C++ and cannot import this file. csrc/memory.h has the promise as two constants, which their plans share out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call import Call, Gradients, Needs, Problem, Saved, normalizer_shape, remainder_dtype

PROMISED_SHARE = 4  # the promise is the bytes of inputs, outputs and gradients divided by this,
PROMISED_BYTES = 16 << 20  # and these bytes whatever the size of the call

PARTIAL_OUTPUTS = 9 * PROMISED_BYTES // 16  # forward's outputs of splits of the keys, whatever the size of the call
KEPT_BYTES = PROMISED_BYTES // 4  # what forward keeps: a promised share of the inputs, and these bytes
DQUERY_BYTES = 3 * PROMISED_BYTES // 8  # backward's partial gradients of query, with what forward kept: these bytes
DQUERY_SHARE = 5  # and inputs, outputs and gradients divided by this, which leaves some of the promise to the other buffers
DMASK_BYTES = 5 * PROMISED_BYTES // 8  # backward's partial gradients of the mask and their sum: a promised share of the mask, and these
DMASK_BESIDE = 3 * PROMISED_BYTES // 8  # the same where there may be partial gradients of query as well: these bytes alone
DALPHA_BYTES = PROMISED_BYTES // 8  # backward's partial sums of dalpha: a promised share of the mask, and these


def bytes_kept(problem: Problem) -> int:
    """Bytes that forward saves for backward if it keeps out's remainder, and what backward itself holds of each query of each head."""
    remainder = problem.Dv * problem.dtype.itemsize if problem.acc_dtype != problem.dtype else 0
    rows = 16  # mbar 4, lse and backward's two numbers 12; where there is a normalizer it is 8, and backward has one number
    return problem.B * problem.H * problem.Nq * (rows + remainder)


def share_kept(problem: Problem) -> int:
    """The most bytes that forward may keep. The share of the gradients is left to backward, which is slow where it has no room."""
    return _bytes_of_inputs(problem) // PROMISED_SHARE + KEPT_BYTES


def queries_with_remainder(problem: Problem) -> int:
    """For how many queries forward also leaves what rounding takes from `out`: all, or none if that would be too much.

    Without it backward sums delta as P*dP, reference.py (5). The formula has no comparison: for symbolic sizes that would be a guard, and
    torch.export would lose its dynamic lengths. torch.compile makes one graph for each of the two cases.
    """
    times_it_fits = share_kept(problem) // torch.sym_max(1, bytes_kept(problem))
    return problem.Nq * torch.sym_min(1, times_it_fits)


def partial_dqueries(problem: Problem, needs: Needs) -> int:
    """How many float32 gradients of query backward may hold at once, beside what forward kept."""
    p = problem
    held = _bytes_of_inputs(p) + _bytes_of_gradients(p, needs)
    share = held // DQUERY_SHARE + DQUERY_BYTES - bytes_kept(p)
    return max(0, share) // (4 * p.B * p.H * p.Nq * p.D)


def partial_dmasks(problem: Problem, beside_dqueries: bool) -> int:
    """How many float32 gradients of the mask backward may hold beside their sum. beside_dqueries: and beside partial gradients of query."""
    elements = math.prod(problem.mask_shape or (0,))
    room = DMASK_BESIDE if beside_dqueries else _bytes_of_mask(problem) // PROMISED_SHARE + DMASK_BYTES
    return room // max(1, 4 * elements) - 1


def has_room_for_dalpha_tiles(problem: Problem, scores_of_a_tile: int) -> bool:
    """Whether backward may hold a float32 sum for each tile of the scores. Many heads under one small mask have too many of them."""
    p = problem
    sums = 4 * p.B * p.H * p.Nq * p.Nk // scores_of_a_tile
    return sums <= _bytes_of_mask(p) // PROMISED_SHARE + DALPHA_BYTES


def new_outputs(call: Call, *, save_out: bool, save_mbar: bool) -> tuple[Tensor, Saved]:
    """Room for out, and for what backward needs of a forward that fills both.

    Uninitialised, except where there are no keys: then out and mbar are 0, the rows those of dead ones, and nothing is left to compute.
    """
    p, rows = call.problem, new_rows(call)
    out = torch.empty((p.B, p.H, p.Nq, p.Dv), dtype=p.dtype, device=call.query.device)
    remainder = torch.empty_like(out, dtype=remainder_dtype(p.dtype)) if save_out and p.acc_dtype != p.dtype else None
    mbar = torch.empty((p.B, p.H, p.Nq), dtype=p.acc_dtype, device=call.query.device) if save_mbar and call.mask is not None else None
    if p.Nk == 0:
        for tensor in (out, remainder, mbar):
            if tensor is not None:
                tensor.zero_()
    return out, rows._replace(out=out if save_out else None, remainder=remainder, mbar=mbar)


def new_rows(call: Call) -> Saved:
    """Room for lse and normalizer, the rows of a softmax. Where there are no keys they are filled as those of dead rows."""
    p, device = call.problem, call.query.device
    lse = torch.empty((p.B, p.H, p.Nq), dtype=p.acc_dtype, device=device)
    shape = normalizer_shape(p)
    normalizer = None if shape is None else torch.empty(shape, dtype=p.acc_dtype, device=device)
    if p.Nk == 0:
        lse.fill_(float("-inf"))
        if normalizer is not None:
            normalizer.zero_()[..., 0] = math.inf
    return Saved(None, None, lse, None, normalizer)


def new_gradients(call: Call, needs: Needs) -> Gradients:
    """Room for the gradients that are wanted, contiguous and uninitialised; zeros where the call has no scores."""
    new = torch.zeros_like if call.problem.is_empty else torch.empty_like
    inputs = (call.query, call.key, call.value, call.mask, call.alpha, call.head_weights)  # as the fields of Needs and of Gradients
    rooms = [
        new(tensor, memory_format=torch.contiguous_format) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, needs, strict=True)
    ]
    return Gradients(*rooms)


def _bytes_of_inputs(problem: Problem) -> int:
    """Bytes of query, key, value, mask, the output and its gradient."""
    p = problem
    rows = p.H * p.Nq * (p.D + 2 * p.Dv) + p.Hkv * p.Nk * (p.D + p.Dv)
    return p.B * rows * p.dtype.itemsize + _bytes_of_mask(p)


def _bytes_of_gradients(problem: Problem, needs: Needs) -> int:
    """Bytes of the wanted gradients of query, key, value and mask."""
    p = problem
    rows = needs.query * p.H * p.Nq * p.D + p.Hkv * p.Nk * (needs.key * p.D + needs.value * p.Dv)
    return p.B * rows * p.dtype.itemsize + needs.mask * _bytes_of_mask(p)


def _bytes_of_mask(problem: Problem) -> int:
    if problem.mask_shape is None or problem.mask_dtype is None:
        return 0
    return math.prod(problem.mask_shape) * problem.mask_dtype.itemsize
