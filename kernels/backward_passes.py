"""Which passes follow once each row's lse and delta are known, reference.py (6)-(8): the same for attention and for its map."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..call import Call, Gradients, Needs, Problem
from . import backward_dkdv, backward_dmask, backward_dq, backward_few_queries, backward_reduce
from .operands import Rows, accumulator
from .tiles import FEW_QUERIES


def run(call: Call, call_with_mask: Call, dout: Tensor, rows: Rows, mbar: Tensor | None, grads: Gradients) -> None:
    """Fill the gradients that are given, contiguous, in their own shapes and dtypes. mbar: (B, H, Nq) for dalpha.

    call_with_mask: as soft_mask.soften returns it; M may lie in dmask, whose pass is therefore the last.
    """
    needs = backward_few_queries.which_are_given(grads)
    if backward_few_queries.serves(call.problem, needs):
        return backward_few_queries.run(call, dout, rows, mbar, grads)
    dquery, dkey, dvalue, dmask, dalpha, _ = grads
    key_only = _key_only(call.problem, needs)  # a by-product of dK and dV
    dmask_pass = dmask is not None and not key_only
    dalpha_tiles = None
    if dalpha is not None:
        partials = backward_dmask.partials(call, dout) if dmask_pass else backward_dq.partials(call)
        dalpha_tiles = accumulator(call, partials, call.problem.B, call.problem.H)
    dmask_rows = _dmask_rows(call, dmask) if dmask is not None and key_only else None
    splits, parts = dq_splits(call.problem, needs), None
    if splits:  # before the others: it works out delta
        parts = backward_dq.run_split(call_with_mask, dout, rows, splits)
        rows = rows._replace(out=None)
    if dkey is not None or dvalue is not None or key_only:
        backward_dkdv.run(call_with_mask, dout, rows, dkey, dvalue, dmask_rows)
    if dmask is not None and dmask_rows is not None and dmask_rows.data_ptr() != dmask.data_ptr():
        inner = call.problem.inner_batch
        rows_of_batch = dmask_rows.unflatten(0, (call.problem.B // inner, inner))
        dmask.copy_(backward_dmask.through_sigmoid_of(call, rows_of_batch.sum_to_size(dmask.shape)))
    if not splits and (dquery is not None or (dalpha_tiles is not None and not dmask_pass)):
        backward_dq.run(call_with_mask, dout, rows, mbar, dquery, None if dmask_pass else dalpha_tiles)
    if dmask is not None and dmask_pass:
        backward_dmask.run(call, dout, rows, mbar, dmask, dalpha_tiles)
    if splits:
        backward_reduce.run(call, rows, mbar, parts, dquery, dalpha_tiles, dalpha)
    elif dalpha is not None and dalpha_tiles is not None:
        torch.sum(dalpha_tiles, (0, 1), out=dalpha)


@lru_cache
def dq_splits(t: Problem, needs: Needs) -> int:
    """In how many parts of the keys dQ is summed, few queries of wide heads: its pass is the first, and the last adds up dQ and dalpha,
    dL's term included. 0: in one piece, as with many queries, or where dalpha is a by-product of it.
    """
    if not needs.query or t.Nq > FEW_QUERIES or (needs.alpha and (not needs.mask or _key_only(t, needs))):
        return 0
    splits = backward_few_queries.splits(t, needs, t.B * t.H)
    return splits if splits > 1 else 0


def _key_only(t: Problem, needs: Needs) -> bool:
    return needs.mask and t.mask_shape is not None and t.mask_shape[3] == 1 and not _each_head_over_the_batch(t)


def _each_head_over_the_batch(problem: Problem) -> bool:
    """Whether dM has heads, several to a kv head, but is summed over the batch: rows of each (batch, head) may then outweigh all inputs."""
    return problem.mask_shape is not None and problem.sharing.sharers > 1 and problem.mask_shape[2] > problem.Hkv


def _dmask_rows(call: Call, dmask: Tensor) -> Tensor:
    """Where dK and dV's pass leaves a key-only mask's gradient: dM itself (B, H|1, 1, Nk) where nothing follows, else in float32."""
    t = call.problem
    shape = (t.B, t.H if dmask.shape[2] > 1 else t.Hkv, 1, t.Nk)
    by_batch = dmask.flatten(0, 1)
    return by_batch if by_batch.shape == shape and not t.mask_is_logits else accumulator(call, *shape)
