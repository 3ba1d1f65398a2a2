"""The torch.library ops: one schema, one fake and one implementation for each, the backend chosen inside.

`backend` is "" for the best one on the tensors' device, so a compiled or exported program moved to another device calls what
that device has.
Outputs that were not asked for are empty tensors of shape (0,). Tensors are canonical: mask 4-D, alpha (H,) in the accumulation dtype.
out_acc, the unrounded out, is (B, H, 0, Dv) where it would take too much memory; as backward's `out` that asks for delta without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backends
from .problem import acc_dtype, describe, queries_kept_unrounded

_CALL = "Tensor? mask, Tensor? mask_logits, Tensor? alpha"
library = torch.library.Library("smattn", "DEF")
library.define(
    f"forward(Tensor query, Tensor key, Tensor value, {_CALL}, Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p, "
    "bool allow_tf32, bool save_out, bool save_mbar, str backend) -> (Tensor out, Tensor lse, Tensor out_acc, Tensor mbar)"
)
library.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, {_CALL}, Tensor? key_padding_mask, Tensor? seed, "
    "Tensor out, Tensor lse, Tensor mbar, float scale, float dropout_p, bool allow_tf32, bool[] needs, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask, Tensor dalpha)"
)
library.define(
    f"attention_map(Tensor query, Tensor key, {_CALL}, Tensor head_weights, Tensor? key_padding_mask, float scale, bool allow_tf32, "
    "str backend) -> (Tensor map, Tensor lse)"
)
library.define(
    f"attention_map_backward(Tensor dmap, Tensor query, Tensor key, {_CALL}, Tensor head_weights, Tensor? key_padding_mask, Tensor lse, "
    "float scale, bool allow_tf32, bool[] needs, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dmask, Tensor dalpha, Tensor dhead_weights)"
)


def inside_an_op(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, with the tensors' device current. Below autograd it is already: see the autograd kernels in autograd.py."""
    there: AbstractContextManager[object] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    if not torch.is_autocast_enabled(device.type):
        return there
    both = ExitStack()
    both.enter_context(there)
    both.enter_context(torch.autocast(device.type, enabled=False))
    return both


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    allow_tf32: bool,
    save_out: bool,
    save_mbar: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    problem = describe(query, key, value, mask, mask_logits, key_padding_mask, scale, dropout_p, allow_tf32)
    chosen = backends.resolve(problem, backend, "forward")
    inputs = (query, key, value, _soft(mask, mask_logits), alpha, key_padding_mask, seed)
    rounded = save_out and problem.acc_dtype != problem.dtype
    kept = queries_kept_unrounded(problem) if rounded else 0
    with inside_an_op(query.device):
        out, lse, out_acc, mbar = chosen.forward(problem, *inputs, save_out=kept > 0, save_mbar=save_mbar)
    if rounded and not kept:
        out_acc = out_acc.new_empty((*out.shape[:2], 0, out.shape[3]))
    return out, lse, out_acc, mbar


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    allow_tf32: bool,
    save_out: bool,
    save_mbar: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    acc, rows = acc_dtype(query.dtype), query.shape[:3]
    out = query.new_empty((*rows, value.shape[3]))
    kept: tuple[int, ...] = (0,)
    if save_out and acc != query.dtype:
        problem = describe(query, key, value, mask, mask_logits, key_padding_mask, scale, dropout_p, allow_tf32)
        kept = (*rows[:2], queries_kept_unrounded(problem), value.shape[3])
    out_acc = query.new_empty(kept, dtype=acc)
    mbar = query.new_empty(rows if save_mbar and alpha is not None else (0,), dtype=acc)
    return out, query.new_empty(rows, dtype=acc), out_acc, mbar


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mbar: Tensor,
    scale: float,
    dropout_p: float,
    allow_tf32: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    problem = describe(query, key, value, mask, mask_logits, key_padding_mask, scale, dropout_p, allow_tf32)
    chosen = backends.resolve(problem, backend, "backward")
    inputs = (query, key, value, _soft(mask, mask_logits), alpha, key_padding_mask, seed)
    with inside_an_op(query.device):
        unrounded = out if out.shape[2] == problem.Nq else None
        return _or_empty(chosen.backward(problem, dout, dlse, *inputs, unrounded, lse, mbar, tuple(needs)), query)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, needs, _backend = rest
    return _gradients_fake((query, key, value, _soft(mask, mask_logits), alpha), needs)


def _attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    head_weights: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = describe(query, key, None, mask, mask_logits, key_padding_mask, scale, 0.0, allow_tf32)
    chosen = backends.resolve(problem, backend, "attention_map")
    with inside_an_op(query.device):
        return chosen.attention_map(problem, query, key, _soft(mask, mask_logits), alpha, head_weights, key_padding_mask)


def _attention_map_fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc, (B, _H, Nq, _D) = acc_dtype(query.dtype), query.shape
    return query.new_empty((B, Nq, key.shape[2]), dtype=acc), query.new_empty(query.shape[:3], dtype=acc)


def _attention_map_backward(
    dmap: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    head_weights: Tensor,
    key_padding_mask: Tensor | None,
    lse: Tensor,
    scale: float,
    allow_tf32: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    problem = describe(query, key, None, mask, mask_logits, key_padding_mask, scale, 0.0, allow_tf32)
    chosen = backends.resolve(problem, backend, "attention_map_backward")
    inputs = (query, key, _soft(mask, mask_logits), alpha, head_weights, key_padding_mask)
    with inside_an_op(query.device):
        return _or_empty(chosen.attention_map_backward(problem, dmap, *inputs, lse, tuple(needs)), query)


def _attention_map_backward_fake(
    dmap: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    alpha: Tensor | None,
    head_weights: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, needs, _backend = rest
    return _gradients_fake((query, key, _soft(mask, mask_logits), alpha, head_weights), needs)


def _soft(mask: Tensor | None, mask_logits: Tensor | None) -> Tensor | None:
    """The one of the two that is given; problem.mask_is_logits says which."""
    return mask if mask_logits is None else mask_logits


def _gradients_fake(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    query = inputs[0]
    assert query is not None
    return tuple(
        query.new_empty(tensor.shape, dtype=tensor.dtype) if needed and tensor is not None else query.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


def _or_empty(grads: Sequence[Tensor | None], query: Tensor) -> tuple[Tensor, ...]:
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


for _name, _implementation, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("attention_map", _attention_map, _attention_map_fake),
    ("attention_map_backward", _attention_map_backward, _attention_map_backward_fake),
):
    for _device_key in ("CPU", "CUDA"):
        library.impl(_name, _implementation, _device_key)
    torch.library.register_fake(f"smattn::{_name}", _fake, lib=library)

forward = torch.ops.smattn.forward.default
backward = torch.ops.smattn.backward.default
attention_map = torch.ops.smattn.attention_map.default
attention_map_backward = torch.ops.smattn.attention_map_backward.default
