"""backend="triton", the one door from smattn to the Triton kernels: it allocates, picks the regime and launches the passes.

No call synchronises with the device, and every sum is taken in an order that the shape decides.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..call import Call, Gradients, Needs, Problem, Saved
from ..memory import new_gradients, new_outputs
from . import (
    backward_delta,
    backward_delta_sweep,
    backward_dq,
    backward_passes,
    forward_split,
    map_rows,
    plan,
    soft_mask,
)
from . import forward as forward_full
from . import map as map_pass
from .launch import torch_step
from .operands import Rows, accumulator, room_for_rows
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
        elif torch.version.hip is None and torch.cuda.get_device_capability()[0] < 8:
            reasons.append("it needs a GPU of compute capability 8.0 or newer")
    return reasons


def forward(call: Call, *, save_out: bool, save_mbar: bool) -> tuple[Tensor, Saved]:
    """Equations (1)-(4) of reference.py: out (B, H, Nq, Dv), and what backward needs of it."""
    t, call = call.problem, soft_mask.soften(call)
    out, saved = new_outputs(call, save_out=save_out, save_mbar=save_mbar)
    if not t.is_empty:
        cut = forward_split.cut_of(call) if t.Nq <= FEW_QUERIES else None
        if cut is not None and cut.splits > 1:
            forward_split.run(call, cut, out, saved)
        else:
            forward_full.run(call, out, saved)
    return out, saved


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Needs) -> Gradients:
    """Equations (5)-(8), with P rebuilt from normalizer where forward left one, else from lse."""
    problem, grads = call.problem, new_gradients(call, needs)
    to_fill = which_are_given(grads)
    if problem.is_empty or not any(to_fill):
        return grads
    out, remainder, lse, mbar, normalizer = saved
    steps = plan.backward(problem, to_fill, out is not None, dlse is not None)
    if steps.delta == plan.DELTA_FIRST:
        values = room_for_rows(call) if steps.keeps_rows else None
        backward_passes.run(steps, call, call, dout, Rows(values, normalizer, out, remainder, lse, dlse), mbar, grads)
        return grads
    call_with_mask = soft_mask.soften(call, _buffer_of_m(grads.mask))
    values, dalpha_rows = room_for_rows(call), None
    if steps.dlse_apart:
        partials = backward_dq.partials(call) if out is None else backward_delta.partials(problem.Nq)
        dalpha_rows = accumulator(call, partials, problem.B, problem.H)
    if out is None:
        backward_delta_sweep.run(call_with_mask, saved, dout, dlse, values, dalpha_rows)
    else:
        backward_delta.run(saved, dout, dlse, values, dalpha_rows)
    backward_passes.run(steps, call, call_with_mask, dout, Rows(values, normalizer, lse=lse, dlse=dlse), mbar, grads)
    if grads.alpha is not None and dalpha_rows is not None:
        # Added separately: inside the sum over tiles it would change the order, and dlse = 0, which torch.compile passes, must give
        # the same bits as dlse = None.
        torch_step(_add_rows, grads.alpha, dalpha_rows)
    return grads


def attention_map(call: Call) -> tuple[Tensor, Saved]:
    """Equation (9): the map (B, Nq, Nk), float32, and what backward needs of it: the rows of attention to a value without columns."""
    call, t = soft_mask.soften(_with_empty_value(call)), call.problem
    amap = accumulator(call, t.B, t.Nq, t.Nk)
    _, saved = forward(call, save_out=False, save_mbar=False)
    if not t.is_empty:
        map_pass.run(call, saved, amap)
    return amap, saved


def attention_map_backward(call: Call, saved: Saved, dmap: Tensor, needs: Needs) -> Gradients:
    """Equation (10): gradients of query, key, mask, alpha and head weights."""
    grads, call = new_gradients(call, needs), _with_empty_value(call)
    to_fill = which_are_given(grads)
    if call.problem.is_empty or not any(to_fill):
        return grads
    needs_passes = to_fill.query or to_fill.key or to_fill.mask or to_fill.alpha
    t = call.problem
    rows = room_for_rows(call) if needs_passes else None
    mbar = accumulator(call, t.B, t.H, t.Nq) if to_fill.alpha else None
    eta = accumulator(call, t.B, t.H, t.Nq) if to_fill.head_weights else None
    dout, call_with_mask = dmap[:, None], soft_mask.soften(call, _buffer_of_m(grads.mask))
    sums = map_rows.sums_of_splits(call_with_mask)  # held to the end, as a repeated call holds it (see smattn/prepared.py)
    map_rows.run(call_with_mask, saved, dout, sums, rows, mbar, eta)
    if rows is not None:
        steps = plan.passes_after_delta(call.problem, to_fill)
        backward_passes.run(steps, call, call_with_mask, dout, Rows(rows, saved.normalizer), mbar, grads)
    if grads.head_weights is not None and eta is not None:
        torch_step(_sum_rows, eta, grads.head_weights)
    return grads


def which_are_given(grads: Gradients) -> Needs:
    """Which gradients are to be filled."""
    return Needs(*(grad is not None for grad in grads))


def _add_rows(dalpha: Tensor, rows: Tensor) -> None:
    dalpha.add_(rows.sum((0, 1)))


def _sum_rows(eta: Tensor, dweights: Tensor) -> None:
    torch.sum(eta, (0, 2), out=dweights)


def _with_empty_value(call: Call) -> Call:
    """A map's call as attention to a value without columns."""
    return call._replace(value=call.key[..., :0])


def _buffer_of_m(dmask: Tensor | None) -> Tensor | None:
    """Where M of logits may lie until its gradient is stored. The gradient of a key-only mask is stored too early for that."""
    return dmask if dmask is not None and dmask.shape[3] > 1 else None
