"""Which passes follow once each row's shift and delta are known, reference.py (6)-(8): the same for attention and for its map."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..call import Call, Gradients
from . import backward_dkdv, backward_dmask, backward_dq, backward_few_queries, backward_reduce
from .launch import torch_step
from .operands import Rows, accumulator
from .plan import Backward


def run(
    steps: Backward, call: Call, call_with_mask: Call, dout: Tensor, rows: Rows, mbar: Tensor | None, grads: Gradients
) -> None:
    """Fill the gradients that are given, contiguous, in their own shapes and dtypes. mbar: (B, H, Nq) for dalpha.

    call_with_mask: as soft_mask.soften returns it; M may lie in dmask, whose pass is therefore the last.
    """
    dquery, dkey, dvalue, dmask, dalpha, _ = grads
    dalpha_tiles = _dalpha_tiles(steps, call, dout)
    parts = None
    if steps.dq_splits > 0:
        parts = backward_dq.run_split(call_with_mask, dout, rows, steps.dq_splits)
        rows = rows._replace(out=None)  # shift and delta are computed
    if steps.few_queries:
        parts_inside = backward_few_queries.run(call, dout, rows, mbar, grads, dalpha_tiles)
        parts = parts_inside if parts is None else parts
    dmask_rows = _dmask_rows(call, dmask) if dmask is not None and steps.key_only_rows else None
    if steps.dkdv:
        backward_dkdv.run(call_with_mask, dout, rows, dkey, dvalue, dmask_rows)
    if dmask is not None and dmask_rows is not None and dmask_rows.data_ptr() != dmask.data_ptr():
        torch_step(partial(_sum_key_only, call.problem.inner_batch), dmask, dmask_rows, backward_dmask.logits_of(call))
    if steps.dq:
        backward_dq.run(call_with_mask, dout, rows, mbar, dquery, dalpha_tiles if steps.dalpha_tiles == "dq" else None)
    if dmask is not None and steps.dmask:
        backward_dmask.run(call, dout, rows, mbar, dmask, dalpha_tiles if steps.dalpha_tiles == "dmask" else None)
    if steps.reduce:
        backward_reduce.run(call, rows, mbar, parts, dquery, dalpha_tiles, dalpha)
    elif dalpha is not None and dalpha_tiles is not None:
        torch_step(_sum_tiles, dalpha_tiles, dalpha)


def _sum_key_only(inner: int, dmask: Tensor, rows: Tensor, logits: Tensor | None) -> None:
    """rows: (B, heads, 1, Nk), to be summed over what shares a mask. inner: the batch's second axis."""
    of_batch = rows.unflatten(0, (-1, inner))
    dmask.copy_(backward_dmask.through_sigmoid(of_batch.sum_to_size(dmask.shape), logits))


def _sum_tiles(tiles: Tensor, dalpha: Tensor) -> None:
    torch.sum(tiles, (0, 1), out=dalpha)


def _dalpha_tiles(steps: Backward, call: Call, dout: Tensor) -> Tensor | None:
    """Room for dalpha's partial sums, (tiles, B, H), where it is wanted."""
    if steps.dalpha_tiles is None:
        return None
    if steps.dalpha_tiles == "few_queries":
        tiles = backward_few_queries.partials(call)
    else:
        tiles = backward_dmask.partials(call, dout) if steps.dalpha_tiles == "dmask" else backward_dq.partials(call)
    return accumulator(call, tiles, call.problem.B, call.problem.H)


def _dmask_rows(call: Call, dmask: Tensor) -> Tensor:
    """Where dK and dV's pass leaves a key-only mask's gradient: dM itself (B, H|1, 1, Nk) where nothing follows, else in float32."""
    t = call.problem
    shape = (t.B, t.H if dmask.shape[2] > 1 else t.Hkv, 1, t.Nk)
    by_batch = dmask.flatten(0, 1)
    return by_batch if by_batch.shape == shape and not t.mask_is_logits else accumulator(call, *shape)
