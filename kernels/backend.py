"""The one door from smattn to the Triton kernels: allocates, picks the regime, launches the passes.

Tensors are canonical (see smattn/ops.py). No call synchronises with the device, and every sum is taken in an order that the shape decides.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..problem import Problem
from . import (
    backward_delta,
    backward_delta_sweep,
    backward_dkdv,
    backward_dmask,
    backward_dq,
    backward_few_queries,
    configs,
    forward_split,
)
from . import forward as forward_full
from .launch import Inputs

Grads = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why these kernels cannot run such a call; empty when they can."""
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"it computes float16, bfloat16 and float32, not {problem.dtype}")
    if max(problem.D, problem.Dv) > LARGEST_HEAD:
        reasons.append(f"it takes head sizes up to {LARGEST_HEAD}, not D = {problem.D} with Dv = {problem.Dv}")
    if problem.mask_is_logits:
        reasons.append("mask_logits is not supported yet")
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
    t, inputs = problem, Inputs(problem, query, key, value, mask, alpha, key_padding_mask, seed)
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
        splits = forward_split.splits_of(inputs) if t.Nq <= configs.FEW_QUERIES else 1
        if splits > 1:
            forward_split.run(inputs, splits, out, lse, out_acc, mbar)
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
    wanted = zip((query, key, value, mask, alpha), needs, strict=True)
    empty = problem.B == 0 or problem.Nq == 0 or problem.Nk == 0
    new = torch.zeros if empty else torch.empty
    dquery, dkey, dvalue, dmask, dalpha = (
        new(x.shape, dtype=x.dtype, device=x.device) if needed and x is not None else None for x, needed in wanted
    )
    if empty or not any(needs):
        return dquery, dkey, dvalue, dmask, dalpha
    few = backward_few_queries.serves(inputs, [dquery, dkey, dvalue, dmask])
    key_only = dmask is not None and dmask.shape[2] == 1 and not _each_head_over_the_batch(problem)  # then dM is a by-product of dK and dV
    dmask_pass = dmask is not None and not few and not key_only

    counts = 0, 0
    if dalpha is not None:
        home = backward_few_queries if few else backward_dmask if dmask_pass else backward_dq
        delta_rows = backward_dq.partials(inputs) if out is None else backward_delta.partials(problem.Nq)
        counts = delta_rows if dlse is not None else 0, home.partials(inputs)
    dalpha_rows, dalpha_tiles = (inputs.accumulator(n, problem.B, problem.H) if n else None for n in counts)

    rows = inputs.accumulator(*lse.shape, 2)
    if out is None:
        backward_delta_sweep.run(inputs, dout, lse, dlse, mbar, rows, dalpha_rows)
    else:
        backward_delta.run(out, dout, lse, dlse, mbar, rows, dalpha_rows)
    if few:
        backward_few_queries.run(inputs, dout, rows, mbar, dquery, dkey, dvalue, dmask, dalpha_tiles)
    else:
        dmask_rows = _dmask_rows(inputs, dmask) if dmask is not None and key_only else None
        if dkey is not None or dvalue is not None or key_only:
            backward_dkdv.run(inputs, dout, rows, dkey, dvalue, dmask_rows)
        if dmask is not None and dmask_rows is not None and dmask_rows.shape != dmask.shape:
            dmask.copy_(dmask_rows.sum_to_size(dmask.shape))
        if dmask is not None and dmask_pass:
            backward_dmask.run(inputs, dout, rows, mbar, dmask, dalpha_tiles)
        if dquery is not None or (dalpha_tiles is not None and not dmask_pass):
            backward_dq.run(inputs, dout, rows, mbar, dquery, None if dmask_pass else dalpha_tiles)
    if dalpha is not None and dalpha_tiles is not None:
        torch.sum(dalpha_tiles, (0, 1), out=dalpha)
        if dalpha_rows is not None:
            # apart: more terms in the sum above would reorder it, and a dlse of zeros must give the bits of none (torch.compile passes it)
            dalpha += dalpha_rows.sum((0, 1))
    return dquery, dkey, dvalue, dmask, dalpha


def _each_head_over_the_batch(problem: Problem) -> bool:
    """Whether dM has heads, several to a kv head, but is summed over the batch: rows of each (batch, head) may then outweigh all inputs."""
    return problem.mask_shape is not None and problem.mask_shape[0] < problem.B and problem.mask_shape[1] > problem.Hkv


def _dmask_rows(inputs: Inputs, dmask: Tensor) -> Tensor:
    """Where dK and dV's pass leaves a key-only mask's gradient: dM itself (B, H|1, 1, Nk) where it sums no further, else in float32."""
    t = inputs.problem
    shape = (t.B, t.H if dmask.shape[1] > 1 else t.Hkv, 1, t.Nk)
    return dmask if dmask.shape == shape else inputs.accumulator(*shape)
