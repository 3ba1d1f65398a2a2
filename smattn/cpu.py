"""backend="cpu": the C++ kernels of smattn/_cpu.so, as torch.ops.smattn_cpu.

This door allocates the results and hands each op a flat list of canonical tensors, which is what a C++ op takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .call import Call, Gradients, Needs, Problem, Saved
from .memory import new_gradients, new_outputs, new_rows

LIBRARY = library.CPU
LARGEST_HEAD = 256


def reasons() -> list[str]:
    """Why the compiled library cannot be used here, one sentence each; empty when its ops, `torch.ops.smattn_cpu`, are loaded."""
    return list(library.why_not_loaded(LIBRARY))


def notes() -> tuple[str, ...]:
    """Which set of kernels runs and why, and which others this processor has."""
    _, *others = torch.ops.smattn_cpu.cpu_kernels().split()
    return (f"kernels {torch.ops.smattn_cpu.cpu_kernels_reason()}; it also runs {', '.join(others) or 'no other'}",)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why these kernels cannot run such a call; empty when they can."""
    why = reasons()
    if max(problem.D, problem.Dv) > LARGEST_HEAD:
        why.append(f"it takes head sizes up to {LARGEST_HEAD}, not D = {problem.D} with Dv = {problem.Dv}")
    return why


def forward(call: Call, *, save_out: bool, save_mbar: bool) -> tuple[Tensor, Saved]:
    """Equations (1)-(4) of reference.py: out (B, H, Nq, Dv), and what backward needs of it."""
    p = call.problem
    out, saved = new_outputs(call, save_out=save_out, save_mbar=save_mbar)
    torch.ops.smattn_cpu.forward(
        call.query, call.key, call.value, call.mask, p.mask_is_logits, call.alpha, call.key_padding_mask, call.seed,
        p.scale, p.dropout_p, out, saved.lse, saved.remainder, saved.mbar, saved.normalizer,
    )  # fmt: skip
    return out, saved


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Needs) -> Gradients:
    """Equations (5)-(8), with P rebuilt from normalizer where forward left one, else from lse."""
    p, grads, saved = call.problem, new_gradients(call, needs), saved.contiguous()
    torch.ops.smattn_cpu.backward(
        dout, None if dlse is None else dlse.contiguous(), call.query, call.key, call.value,
        call.mask, p.mask_is_logits, call.alpha, call.key_padding_mask, call.seed,
        saved.out, saved.remainder, saved.lse, saved.mbar, saved.normalizer, p.scale, p.dropout_p,
        grads.query, grads.key, grads.value, grads.mask, grads.alpha,
    )  # fmt: skip
    return grads


def attention_map(call: Call) -> tuple[Tensor, Saved]:
    """Equation (9): the map (B, Nq, Nk) in the accumulation dtype, and what backward needs of it."""
    p, saved = call.problem, new_rows(call)
    amap = call.query.new_empty((p.B, p.Nq, p.Nk), dtype=p.acc_dtype)
    torch.ops.smattn_cpu.attention_map(
        call.query, call.key, call.mask, p.mask_is_logits, call.alpha, call.head_weights, call.key_padding_mask,
        p.scale, amap, saved.lse, saved.normalizer,
    )  # fmt: skip
    return amap, saved


def attention_map_backward(call: Call, saved: Saved, dmap: Tensor, needs: Needs) -> Gradients:
    """Equation (10): gradients of query, key, mask, alpha and head weights."""
    p, grads, saved = call.problem, new_gradients(call, needs), saved.contiguous()
    torch.ops.smattn_cpu.attention_map_backward(
        dmap[:, None], call.query, call.key, call.mask, p.mask_is_logits, call.alpha, call.head_weights, call.key_padding_mask,
        saved.lse, saved.normalizer, p.scale, grads.query, grads.key, grads.mask, grads.alpha, grads.head_weights,
    )  # fmt: skip
    return grads
