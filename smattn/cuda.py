"""backend="cuda": the CUDA C++ kernels of smattn/_cuda.so, as torch.ops.smattn_cuda.

This door allocates the results and hands each op a flat list of canonical tensors, which is what a C++ op takes. No call synchronises with
the device. The library is built only where asked for: see CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library
from .call import Call, Gradients, Needs, Problem, Saved
from .memory import new_gradients, new_outputs, new_rows

LIBRARY = library.CUDA
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256
OLDEST = (8, 0)  # compute capability: bfloat16 and m16n8k16 on the tensor cores, cp.async


class Machine(NamedTuple):
    """What the kernels run on: the tests put an emulated device in the place of a real one."""

    ops: str  # namespace in torch.ops
    device_type: str
    absence: Callable[[], tuple[str, ...]]  # why there is none, one sentence each
    stream: Callable[[torch.device], int]


def _why_no_gpu() -> tuple[str, ...]:
    """Why the kernels cannot run on this machine; empty when torch.ops.smattn_cuda is loaded and the current device can run it."""
    reasons = library.why_not_loaded(LIBRARY)
    if reasons or not torch.cuda.is_available():
        return reasons or ("torch finds no CUDA device",)
    if torch.version.hip:
        return ("it runs on NVIDIA GPUs, and this torch is built for ROCm",)
    capability = torch.cuda.get_device_capability()
    return () if capability >= OLDEST else (f"it needs compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}",)


machine = Machine("smattn_cuda", "cuda", _why_no_gpu, lambda device: torch.cuda.current_stream(device).cuda_stream)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why these kernels cannot run such a call; empty when they can."""
    reasons = list(machine.absence())
    if problem.dtype not in DTYPES:
        reasons.append(f"it computes float16, bfloat16 and float32, not {problem.dtype}")
    if max(problem.D, problem.Dv) > LARGEST_HEAD:
        reasons.append(f"it takes head sizes up to {LARGEST_HEAD}, not D = {problem.D} with Dv = {problem.Dv}")
    if problem.device_type != machine.device_type:
        reasons.append(f"it runs on CUDA devices, not on device type {problem.device_type!r}")
    return reasons


def _ops() -> Any:
    return getattr(torch.ops, machine.ops)


def forward(call: Call, *, save_out: bool, save_mbar: bool) -> tuple[Tensor, Saved]:
    """Equations (1)-(4) of reference.py: out (B, H, Nq, Dv), and what backward needs of it."""
    p = call.problem
    out, saved = new_outputs(call, save_out=save_out, save_mbar=save_mbar)
    if not p.is_empty:
        _ops().forward(
            call.query, call.key, call.value, call.mask, p.mask_is_logits, call.alpha, call.key_padding_mask, call.seed,
            p.scale, p.dropout_p, p.allow_tf32, machine.stream(call.query.device),
            out, saved.lse, saved.remainder, saved.mbar, saved.normalizer,
        )  # fmt: skip
    return out, saved


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Needs) -> Gradients:
    """Equations (5)-(8). Without saved.out, delta is summed as P*dP in a sweep of its own."""
    p, grads, saved = call.problem, new_gradients(call, needs), saved.contiguous()
    if not p.is_empty and _some(grads):
        _ops().backward(
            dout, None if dlse is None else dlse.contiguous(), call.query, call.key, call.value,
            call.mask, p.mask_is_logits, call.alpha, call.key_padding_mask, call.seed,
            saved.out, saved.remainder, saved.lse, saved.mbar, saved.normalizer,
            p.scale, p.dropout_p, p.allow_tf32, machine.stream(call.query.device),
            grads.query, grads.key, grads.value, grads.mask, grads.alpha,
        )  # fmt: skip
    return grads


def attention_map(call: Call) -> tuple[Tensor, Saved]:
    """Equation (9): the map (B, Nq, Nk), float32, and what backward needs of it."""
    p, saved = call.problem, new_rows(call)
    amap = torch.empty((p.B, p.Nq, p.Nk), dtype=torch.float32, device=call.query.device)
    if p.is_empty:
        return amap, saved
    _ops().attention_map(
        call.query, call.key, call.mask, p.mask_is_logits, call.alpha, call.head_weights, call.key_padding_mask,
        p.scale, p.allow_tf32, machine.stream(call.query.device), amap, saved.lse, saved.normalizer,
    )  # fmt: skip
    return amap, saved


def attention_map_backward(call: Call, saved: Saved, dmap: Tensor, needs: Needs) -> Gradients:
    """Equation (10): gradients of query, key, mask, alpha and head weights."""
    p, grads, saved = call.problem, new_gradients(call, needs), saved.contiguous()
    if not p.is_empty and _some(grads):
        _ops().attention_map_backward(
            dmap[:, None], call.query, call.key, call.mask, p.mask_is_logits, call.alpha,
            call.head_weights, call.key_padding_mask, saved.lse, saved.normalizer,
            p.scale, p.allow_tf32, machine.stream(call.query.device),
            grads.query, grads.key, grads.mask, grads.alpha, grads.head_weights,
        )  # fmt: skip
    return grads


def _some(grads: Gradients) -> bool:
    """Whether there is anything to compute."""
    return any(grad is not None and grad.numel() > 0 for grad in grads)
