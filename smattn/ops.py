"""The torch.library ops: one schema, one fake and one implementation for each, the backend chosen inside.

`backend` is "" for the best one on the tensors' device, so a compiled or exported program moved to another device calls what
that device has.
Outputs that were not asked for are empty tensors of shape (0,). Tensors are canonical: mask 4-D, alpha (H,) in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import backends
from .problem import acc_dtype, describe

_CALL = "Tensor? mask, Tensor? mask_logits, Tensor? alpha"
_library = torch.library.Library("smattn", "DEF")
_library.define(
    f"forward(Tensor query, Tensor key, Tensor value, {_CALL}, Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p, "
    "bool allow_tf32, bool save_out, bool save_mbar, str backend) -> (Tensor out, Tensor lse, Tensor out_acc, Tensor mbar)"
)
_library.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, {_CALL}, Tensor? key_padding_mask, Tensor? seed, "
    "Tensor out, Tensor lse, Tensor mbar, float scale, float dropout_p, bool allow_tf32, bool[] needs, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask, Tensor dalpha)"
)
_library.define(
    f"attention_map(Tensor query, Tensor key, {_CALL}, Tensor head_weights, Tensor? key_padding_mask, float scale, bool allow_tf32, "
    "str backend) -> (Tensor map, Tensor lse)"
)
_library.define(
    f"attention_map_backward(Tensor dmap, Tensor query, Tensor key, {_CALL}, Tensor head_weights, Tensor? key_padding_mask, Tensor lse, "
    "float scale, bool allow_tf32, bool[] needs, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dmask, Tensor dalpha, Tensor dhead_weights)"
)


@contextmanager
def _inside_an_op(device: torch.device) -> Iterator[None]:
    """Below autograd and autocast, with the tensors' device current."""
    with torch._C._AutoDispatchBelowAutograd(), torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


def _forward(
    query, key, value, mask, mask_logits, alpha, key_padding_mask, seed, scale, dropout_p, allow_tf32, save_out, save_mbar, backend
):  # type: ignore[no-untyped-def]
    problem = describe(query, key, value, mask, mask_logits, key_padding_mask, scale, dropout_p, allow_tf32)
    chosen = backends.resolve(problem, backend, "forward")
    soft = mask if mask_logits is None else mask_logits
    with _inside_an_op(query.device):
        return chosen.forward(problem, query, key, value, soft, alpha, key_padding_mask, seed, save_out=save_out, save_mbar=save_mbar)


def _forward_fake(
    query, key, value, mask, mask_logits, alpha, key_padding_mask, seed, scale, dropout_p, allow_tf32, save_out, save_mbar, backend
):  # type: ignore[no-untyped-def]
    acc = acc_dtype(query.dtype)
    rows = query.shape[:3]
    out = query.new_empty((*rows, value.shape[3]))
    lse = query.new_empty(rows, dtype=acc)
    out_acc = query.new_empty(out.shape if save_out and acc != query.dtype else (0,), dtype=acc)
    return out, lse, out_acc, query.new_empty(rows if save_mbar and alpha is not None else (0,), dtype=acc)


def _backward(
    dout, dlse, query, key, value, mask, mask_logits, alpha, key_padding_mask, seed, out, lse, mbar,
    scale, dropout_p, allow_tf32, needs, backend,
):  # type: ignore[no-untyped-def]  # fmt: skip
    problem = describe(query, key, value, mask, mask_logits, key_padding_mask, scale, dropout_p, allow_tf32)
    chosen = backends.resolve(problem, backend, "backward")
    soft = mask if mask_logits is None else mask_logits
    with _inside_an_op(query.device):
        grads = chosen.backward(problem, dout, dlse, query, key, value, soft, alpha, key_padding_mask, seed, out, lse, mbar, tuple(needs))
        return _or_empty(grads, query)


def _backward_fake(
    dout, dlse, query, key, value, mask, mask_logits, alpha, key_padding_mask, seed, out, lse, mbar,
    scale, dropout_p, allow_tf32, needs, backend,
):  # type: ignore[no-untyped-def]  # fmt: skip
    soft = mask if mask_logits is None else mask_logits
    return _gradients_fake((query, key, value, soft, alpha), needs)


def _attention_map(query, key, mask, mask_logits, alpha, head_weights, key_padding_mask, scale, allow_tf32, backend):  # type: ignore[no-untyped-def]
    problem = describe(query, key, None, mask, mask_logits, key_padding_mask, scale, 0.0, allow_tf32)
    chosen = backends.resolve(problem, backend, "attention_map")
    soft = mask if mask_logits is None else mask_logits
    with _inside_an_op(query.device):
        return chosen.attention_map(problem, query, key, soft, alpha, head_weights, key_padding_mask)


def _attention_map_fake(query, key, mask, mask_logits, alpha, head_weights, key_padding_mask, scale, allow_tf32, backend):  # type: ignore[no-untyped-def]
    acc = acc_dtype(query.dtype)
    B, _, Nq, _ = query.shape
    return query.new_empty((B, Nq, key.shape[2]), dtype=acc), query.new_empty(query.shape[:3], dtype=acc)


def _attention_map_backward(
    dmap, query, key, mask, mask_logits, alpha, head_weights, key_padding_mask, lse, scale, allow_tf32, needs, backend
):  # type: ignore[no-untyped-def]
    problem = describe(query, key, None, mask, mask_logits, key_padding_mask, scale, 0.0, allow_tf32)
    chosen = backends.resolve(problem, backend, "attention_map_backward")
    soft = mask if mask_logits is None else mask_logits
    with _inside_an_op(query.device):
        grads = chosen.attention_map_backward(problem, dmap, query, key, soft, alpha, head_weights, key_padding_mask, lse, tuple(needs))
        return _or_empty(grads, query)


def _attention_map_backward_fake(
    dmap, query, key, mask, mask_logits, alpha, head_weights, key_padding_mask, lse, scale, allow_tf32, needs, backend
):  # type: ignore[no-untyped-def]
    soft = mask if mask_logits is None else mask_logits
    return _gradients_fake((query, key, soft, alpha, head_weights), needs)


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
        _library.impl(_name, _implementation, _device_key)
    torch.library.register_fake(f"smattn::{_name}", _fake, lib=_library)

forward = torch.ops.smattn.forward.default
backward = torch.ops.smattn.backward.default
attention_map = torch.ops.smattn.attention_map.default
attention_map_backward = torch.ops.smattn.attention_map_backward.default
