"""The one door from smattn to the Triton kernels: allocates, picks the regime, launches the passes.

Tensors are canonical (see smattn/ops.py). No call synchronises with the device, and every sum is taken in an order that the shape decides.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..problem import Grads, Problem, new_gradients
from . import (
    backward_delta,
    backward_delta_sweep,
    backward_dq,
    backward_few_queries,
    backward_passes,
    forward_split,
    map_rows,
    plan,
    soft_mask,
)
from . import forward as forward_full
from . import map as map_pass
from .launch import Inputs, Rows
from .tiles import FEW_QUERIES

LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why these kernels cannot run such a call; empty when they can."""
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"it computes float16, bfloat16 and float32, not {problem.dtype}")
    if max(problem.D, problem.Dv) > LARGEST_HEAD:
        reasons.append(f"it takes head sizes up to {LARGEST_HEAD}, not D = {problem.D} with Dv = {problem.Dv}")
    if not triton.knobs.runtime.interpret:
        if problem.device_type != "cuda":
            reasons.append("it runs on CUDA devices; on the CPU only interpreted, with TRITON_INTERPRET=1 set before Triton is imported")
        elif not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
        elif torch.cuda.get_device_capability()[0] < 8:
            reasons.append("it needs a GPU of compute capability 8.0 or newer")
    return reasons


def forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    *,
    save_out: bool,
    save_mbar: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1)-(4): out (B, H, Nq, Dv), lse (B, H, Nq), the unrounded out if asked for, mbar (B, H, Nq) if asked for."""
    t, inputs = problem, soft_mask.soften(Inputs(problem, query, key, value, mask, alpha, key_padding_mask, seed))
    out = torch.empty((t.B, t.H, t.Nq, t.Dv), dtype=t.dtype, device=query.device)
    lse = inputs.accumulator(t.B, t.H, t.Nq)
    out_acc = inputs.accumulator(*out.shape) if save_out and t.dtype != torch.float32 else None
    mbar = inputs.accumulator(*lse.shape) if save_mbar and mask is not None else None
    if t.Nk == 0:
        for tensor in (out, out_acc, mbar):
            if tensor is not None:
                tensor.zero_()
        lse.fill_(float("-inf"))
    elif lse.numel() > 0:
        splits, split_blocks = forward_split.splits_of(inputs) if t.Nq <= FEW_QUERIES else (1, 0)
        if splits > 1:
            forward_split.run(inputs, splits, split_blocks, out, lse, out_acc, mbar)
        else:
            forward_full.run(inputs, out, lse, out_acc, mbar)
    return out, lse, inputs.accumulator(0) if out_acc is None else out_acc, inputs.accumulator(0) if mbar is None else mbar


def backward(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    mbar: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Grads:
    """(5)-(8), P rebuilt as exp(S - lse): one saved row vector, inside the error budget at every alpha tried. None where not needed.

    out: unrounded; without it delta is summed as P*dP.
    """
    inputs = Inputs(problem, query, key, value, mask, alpha, key_padding_mask, seed)
    grads = new_gradients(problem, (query, key, value, mask, alpha), needs)
    if inputs.empty or not any(needs):
        return grads
    to_fill = backward_few_queries.needs_of(*grads[:4])
    few = backward_few_queries.serves(problem, to_fill)
    dquery, dalpha, dalpha_rows = grads[0], grads[4], None
    reduced = few or backward_passes.dq_splits(problem, to_fill, dalpha is not None) > 0  # its last pass adds dL's term to dalpha
    if reduced and out is not None and (not few or backward_few_queries.folds_delta(inputs, dquery)):
        held = few and plan.holds_dq(problem)
        rows = Rows(None if held else inputs.accumulator(*lse.shape, 2), out, lse, dlse)
        backward_passes.run(inputs, inputs, dout, rows, mbar, *grads)
        return grads
    soft = soft_mask.soften(inputs, _buffer_of_m(grads[3]))
    values = inputs.accumulator(*lse.shape, 2)
    rows = Rows(values, None, lse, dlse)
    if dalpha is not None and dlse is not None and not reduced:
        partials = backward_dq.partials(inputs) if out is None else backward_delta.partials(problem.Nq)
        dalpha_rows = inputs.accumulator(partials, problem.B, problem.H)
    if out is None:
        backward_delta_sweep.run(soft, dout, lse, dlse, mbar, values, dalpha_rows)
    else:
        backward_delta.run(out, dout, lse, dlse, mbar, values, dalpha_rows)
    backward_passes.run(inputs, soft, dout, rows, mbar, *grads)
    if dalpha is not None and dalpha_rows is not None:
        # apart: more terms in the sum over tiles would reorder it, and a dlse of zeros must give the bits of none (torch.compile passes it)
        dalpha += dalpha_rows.sum((0, 1))
    return grads


def attention_map(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    alpha: Tensor | None,
    head_weights: Tensor,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(9): the map (B, Nq, Nk) and lse (B, H, Nq), float32; head_weights (H,) float32. lse is that of a value without columns."""
    inputs = soft_mask.soften(_map_inputs(problem, query, key, mask, alpha, head_weights, key_padding_mask))
    value, t = inputs.value, inputs.problem
    _, lse, *_ = forward(t, query, key, value, inputs.mask, alpha, key_padding_mask, None, save_out=False, save_mbar=False)
    amap = inputs.accumulator(t.B, t.Nq, t.Nk)
    if not inputs.empty:
        map_pass.run(inputs, lse, amap)
    return amap, lse


def attention_map_backward(
    problem: Problem,
    dmap: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    alpha: Tensor | None,
    head_weights: Tensor,
    key_padding_mask: Tensor | None,
    lse: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Grads:
    """(10): gradients of query, key, mask, alpha and head_weights. None where not needed."""
    inputs = _map_inputs(problem, query, key, mask, alpha, head_weights, key_padding_mask)
    grads = new_gradients(problem, (query, key, mask, alpha, head_weights), needs)
    if inputs.empty or not any(needs):
        return grads
    dquery, dkey, dmask, dalpha, dweights = grads
    rows, mbar, eta = (
        inputs.accumulator(*lse.shape, *last) if wanted else None
        for last, wanted in (((2,), any(needs[:4])), ((), dalpha is not None), ((), dweights is not None))
    )
    dout, soft = dmap[:, None], soft_mask.soften(inputs, _buffer_of_m(dmask))
    map_rows.run(soft, dout, lse, rows, mbar, eta)
    if rows is not None:
        backward_passes.run(inputs, soft, dout, Rows(rows), mbar, dquery, dkey, None, dmask, dalpha)
    if dweights is not None and eta is not None:
        torch.sum(eta, (0, 2), out=dweights)
    return grads


def _map_inputs(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    alpha: Tensor | None,
    head_weights: Tensor,
    key_padding_mask: Tensor | None,
) -> Inputs:
    """A map's inputs: those of attention to a value without columns."""
    problem = problem._replace(Dv=0)
    return Inputs(problem, query, key, key[..., :0], mask, alpha, key_padding_mask, head_weights=head_weights.contiguous())


def _buffer_of_m(dmask: Tensor | None) -> Tensor | None:
    """Where M of logits may lie until its gradient is stored; a key-only one's is stored too early."""
    return dmask if dmask is not None and dmask.shape[2] > 1 else None
