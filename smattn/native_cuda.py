"""The CUDA C++ backend: allocates results, and hands canonical tensors (see ops.py) to the kernels of smattn/_cuda.so.

The library is built only where asked for: see CONTRIBUTING.md. No call synchronises with the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import Grads, Problem, new_gradients

LIBRARY = Path(__file__).with_name("_cuda.so")
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
    reasons = _why_not_loaded()
    if reasons or not torch.cuda.is_available():
        return reasons or ("torch finds no CUDA device",)
    capability = torch.cuda.get_device_capability()
    return () if capability >= OLDEST else (f"it needs compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}",)


@functools.cache
def _why_not_loaded() -> tuple[str, ...]:
    if not LIBRARY.exists():
        how = "CMAKE_ARGS=-DSMATTN_CUDA=ON pip install --no-build-isolation --force-reinstall --no-deps ."
        return (f"{LIBRARY} was not built; to build it, with nvcc on the PATH, install smattn from its source folder: {how}",)
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (f"{LIBRARY} does not load with torch {torch.__version__}: {error}",)
    return ()


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
    t, rows = problem, (problem.B, problem.H, problem.Nq)
    out = query.new_empty((*rows, t.Dv))
    lse = _accumulator(query, *rows)
    out_acc = _accumulator(query, *out.shape) if save_out and t.dtype != torch.float32 else None
    mbar = _accumulator(query, *rows) if save_mbar and mask is not None else None
    if t.Nk == 0:
        for tensor in (out, out_acc, mbar):
            if tensor is not None:
                tensor.zero_()
        lse.fill_(float("-inf"))
    elif lse.numel() > 0:
        _ops().forward(
            query, key, value, mask, t.mask_is_logits, alpha, key_padding_mask, seed,
            t.scale, t.dropout_p, t.allow_tf32, machine.stream(query.device), out, lse, out_acc, mbar,
        )  # fmt: skip
    return out, lse, _accumulator(query, 0) if out_acc is None else out_acc, _accumulator(query, 0) if mbar is None else mbar


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
    """(5)-(8), P rebuilt as exp(S - lse). None where not needed.

    out: unrounded; without it delta is summed as P*dP, in a sweep of its own.
    """
    t = problem
    grads = new_gradients(problem, (query, key, value, mask, alpha), needs)
    if any(grad is not None and grad.numel() > 0 for grad in grads) and min(t.B, t.Nq, t.Nk) > 0:
        _ops().backward(
            dout, None if dlse is None else dlse.contiguous(), query, key, value, mask, t.mask_is_logits, alpha, key_padding_mask, seed,
            out, lse.contiguous(), mbar.contiguous() if needs[4] else None, t.scale, t.dropout_p, t.allow_tf32,
            machine.stream(query.device), *grads,
        )  # fmt: skip
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
    """(9): the map (B, Nq, Nk) and lse (B, H, Nq), both float32."""
    t = problem
    amap, lse = _accumulator(query, t.B, t.Nq, t.Nk), _accumulator(query, t.B, t.H, t.Nq)
    if amap.numel() > 0:
        _ops().attention_map(
            query, key, mask, t.mask_is_logits, alpha, head_weights.contiguous(), key_padding_mask,
            t.scale, t.allow_tf32, machine.stream(query.device), amap, lse,
        )  # fmt: skip
    else:
        lse.fill_(float("-inf"))
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
    t = problem
    grads = new_gradients(problem, (query, key, mask, alpha, head_weights), needs)
    if any(grad is not None and grad.numel() > 0 for grad in grads) and min(t.B, t.Nq, t.Nk) > 0:
        _ops().attention_map_backward(
            dmap[:, None], query, key, mask, t.mask_is_logits, alpha, head_weights.contiguous(), key_padding_mask, lse.contiguous(),
            t.scale, t.allow_tf32, machine.stream(query.device), *grads,
        )  # fmt: skip
    return grads


def _accumulator(query: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=query.device)
