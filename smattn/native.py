"""The compiled extension smattn/_cpu.so and backend="cpu", its C++ kernels: loaded at first use, and when absent, why and how to build it.

Tensors are canonical (see smattn/ops.py).
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from .problem import Grads, Problem, new_gradients

LARGEST_HEAD = 256
LIBRARY = Path(__file__).with_name("_cpu.so")


def reasons() -> list[str]:
    """Why the compiled extension cannot be used here, one sentence each; empty when its ops, `torch.ops.smattn_cpu`, are loaded."""
    return list(_load())


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the native kernels cannot run this call; empty when they can."""
    why = reasons()
    if max(problem.D, problem.Dv) > LARGEST_HEAD:
        why.append(f"it takes head sizes up to {LARGEST_HEAD}, not D = {problem.D} with Dv = {problem.Dv}")
    return why


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
    out = query.new_empty((problem.B, problem.H, problem.Nq, problem.Dv))
    lse = query.new_empty(out.shape[:3], dtype=problem.acc_dtype)
    out_acc = torch.empty_like(out, dtype=lse.dtype) if save_out and lse.dtype != out.dtype else None
    mbar = torch.empty_like(lse) if save_mbar and mask is not None else None
    inputs = (query, key, value, mask, problem.mask_is_logits, alpha, key_padding_mask, seed, problem.scale, problem.dropout_p)
    torch.ops.smattn_cpu.forward(*inputs, out, lse, out_acc, mbar)
    return out, lse, lse.new_empty(0) if out_acc is None else out_acc, lse.new_empty(0) if mbar is None else mbar


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
    grads = new_gradients(problem, (query, key, value, mask, alpha), needs)
    dlse = None if dlse is None else dlse.contiguous()
    rows = (out, lse.contiguous(), mbar.contiguous() if needs[4] else None)
    soft = (mask, problem.mask_is_logits, alpha)
    inputs = (dout, dlse, query, key, value, *soft, key_padding_mask, seed, *rows, problem.scale, problem.dropout_p)
    torch.ops.smattn_cpu.backward(*inputs, *grads)
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
    """(9): the map (B, Nq, Nk) and lse (B, H, Nq), both in the accumulation dtype; head_weights (H,) in that dtype."""
    amap = query.new_empty((problem.B, problem.Nq, problem.Nk), dtype=problem.acc_dtype)
    lse = query.new_empty((problem.B, problem.H, problem.Nq), dtype=problem.acc_dtype)
    inputs = (query, key, mask, problem.mask_is_logits, alpha, head_weights.contiguous(), key_padding_mask, problem.scale)
    torch.ops.smattn_cpu.attention_map(*inputs, amap, lse)
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
    grads = new_gradients(problem, (query, key, mask, alpha, head_weights), needs)
    soft = (mask, problem.mask_is_logits, alpha)
    inputs = (query, key, *soft, head_weights.contiguous(), key_padding_mask, lse.contiguous(), problem.scale)
    torch.ops.smattn_cpu.attention_map_backward(dmap[:, None], *inputs, *grads)
    return grads


@functools.cache
def _load() -> tuple[str, ...]:
    if not LIBRARY.exists():
        return _why_absent()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (f"the C++ extension {LIBRARY} does not load with torch {torch.__version__}: {error}",)
    return ()


def _why_absent() -> tuple[str, ...]:
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    absent = []
    if not any(map(shutil.which, compilers)):
        absent.append(f"no C++ compiler found ({', '.join(compilers)}): install one, or set CXX")
    if shutil.which("cmake") is None and not (Path(sys.executable).parent / "cmake").exists():
        absent.append("no CMake found: pip install cmake ninja")
    return (
        f"the C++ extension {LIBRARY} was not built when smattn was installed",
        *absent,
        "to build it, install smattn again from its source folder: pip install --no-build-isolation --force-reinstall --no-deps .",
    )
