"""The torch.library ops: a schema, a fake and an implementation for each, with the backend chosen inside.

Only here is a call a flat list of arguments, which is what torch's dispatcher and autograd take. A named tuple gives each op's list its
names and its order; the schema is made from it. Tensors are canonical (see canonical.py).

`backend` is "" for the best one on the tensors' device, so that a program compiled or exported on one device calls, on another, what that
device has. Results that nobody asked for are empty tensors of shape (0,), because an op cannot return None. remainder, what rounding
took from out, is (B, H, 0, Dv) where it would take too much memory; passed to backward, that asks for delta without the output. What
normalizer is, and where it is empty, normalizer_shape says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import prepared
from .backends import resolve
from .call import Call, Gradients, Needs, Saved, acc_dtype, make_call, normalizer_shape, remainder_dtype
from .memory import queries_with_remainder


class ForwardArguments(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    mask_logits: Tensor | None
    alpha: Tensor | None
    key_padding_mask: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    allow_tf32: bool
    save_out: bool
    save_mbar: bool
    backend: str


class BackwardArguments(NamedTuple):
    dout: Tensor
    dlse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    mask_logits: Tensor | None
    alpha: Tensor | None
    key_padding_mask: Tensor | None
    seed: Tensor | None
    out: Tensor
    remainder: Tensor
    lse: Tensor
    mbar: Tensor
    normalizer: Tensor
    scale: float
    dropout_p: float
    allow_tf32: bool
    needs: list[bool]  # the fields of Needs
    backend: str


class MapArguments(NamedTuple):
    query: Tensor
    key: Tensor
    mask: Tensor | None
    mask_logits: Tensor | None
    alpha: Tensor | None
    head_weights: Tensor
    key_padding_mask: Tensor | None
    scale: float
    allow_tf32: bool
    backend: str


class MapBackwardArguments(NamedTuple):
    dmap: Tensor
    query: Tensor
    key: Tensor
    mask: Tensor | None
    mask_logits: Tensor | None
    alpha: Tensor | None
    head_weights: Tensor
    key_padding_mask: Tensor | None
    lse: Tensor
    normalizer: Tensor
    scale: float
    allow_tf32: bool
    needs: list[bool]  # the fields of Needs
    backend: str


def attention_call(a: ForwardArguments | BackwardArguments) -> Call:
    is_logits = a.mask_logits is not None
    return make_call(
        a.query, a.key, a.value, a.mask_logits if is_logits else a.mask, a.alpha, a.key_padding_mask, a.seed,
        scale=a.scale, dropout_p=a.dropout_p, allow_tf32=a.allow_tf32, mask_is_logits=is_logits,
    )  # fmt: skip


def map_call(a: MapArguments | MapBackwardArguments) -> Call:
    is_logits = a.mask_logits is not None
    return make_call(
        a.query, a.key, None, a.mask_logits if is_logits else a.mask, a.alpha, a.key_padding_mask, None, a.head_weights.contiguous(),
        scale=a.scale, allow_tf32=a.allow_tf32, mask_is_logits=is_logits,
    )  # fmt: skip


def inside_an_op(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, and with the tensors' device current. Autograd is off already: see the autograd kernels in autograd.py."""
    kind = device.type
    there: AbstractContextManager[object] = torch.cuda.device(device) if kind == "cuda" else nullcontext()
    if not torch.is_autocast_enabled(kind):
        return there
    both = ExitStack()
    both.enter_context(there)
    both.enter_context(torch.autocast(kind, enabled=False))
    return both


def plain(argument: Any) -> Any:
    """A tensor with data of its own as one of torch's own class, anything else as it is.

    Some classes, like MONAI's MetaTensor, take torch's methods in some of their forms alone, and Triton's interpreter calls others.
    """
    kind = type(argument)
    if kind is Tensor or not isinstance(argument, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return argument
    return argument.as_subclass(Tensor)


def made_again(compute: Callable[..., tuple[Tensor, ...]], arguments: type) -> Callable[..., tuple[Tensor, ...]]:
    """compute of plain tensors. Triton's kernels may run it by an earlier call's record: the other backends have none."""
    tensors = sum(kind in (Tensor, Tensor | None) for kind in get_type_hints(arguments).values())  # they come first

    def compute_or_repeat(*as_given: Any) -> tuple[Tensor, ...]:
        given = (*map(plain, as_given[:tensors]), *as_given[tensors:])
        query, backend = given[0], given[-1]
        if backend != "triton" and (backend or not query.is_cuda):
            return compute(*given)
        with inside_an_op(query.device):
            return prepared.call(compute, given, tensors)

    return compute_or_repeat


def compute_forward(*arguments: Any) -> tuple[Tensor, ...]:
    a = ForwardArguments(*arguments)
    call = attention_call(a)
    chosen = resolve(call.problem, a.backend, "forward")
    is_rounded = call.problem.acc_dtype != call.problem.dtype
    save_out = a.save_out and is_rounded and queries_with_remainder(call.problem) > 0
    with inside_an_op(a.query.device):
        out, saved = chosen.forward(call, save_out=save_out, save_mbar=a.save_mbar)
    remainder = saved.remainder
    if remainder is None:
        B, H, _, Dv = out.shape
        remainder = out.new_empty((B, H, 0, Dv) if a.save_out and is_rounded else (0,), dtype=remainder_dtype(out.dtype))
    lse, mbar, normalizer = (_or_empty(rows, call) for rows in (saved.lse, saved.mbar, saved.normalizer))
    return out, lse, remainder, mbar, normalizer


def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    a = ForwardArguments(*arguments)
    (B, H, Nq, _), Dv, acc = a.query.shape, a.value.shape[3], acc_dtype(a.query.dtype)
    problem = attention_call(a).problem
    kept: tuple[int, ...] = (0,)
    if a.save_out and acc != a.query.dtype:
        kept = (B, H, queries_with_remainder(problem), Dv)
    rows = (B, H, Nq)
    return (
        a.query.new_empty((*rows, Dv)),
        a.query.new_empty(rows, dtype=acc),
        a.query.new_empty(kept, dtype=remainder_dtype(a.query.dtype)),
        a.query.new_empty(rows if a.save_mbar and a.alpha is not None else (0,), dtype=acc),
        a.query.new_empty(normalizer_shape(problem) or (0,), dtype=acc),
    )


def compute_backward(*arguments: Any) -> tuple[Tensor, ...]:
    a = BackwardArguments(*arguments)
    call = attention_call(a)
    chosen = resolve(call.problem, a.backend, "backward")
    remainder = a.remainder if a.remainder.dim() == 4 and a.remainder.shape[2] == call.problem.Nq else None
    out = a.out if remainder is not None or a.out.dtype == acc_dtype(a.out.dtype) else None
    saved = Saved(out, remainder, *map(_or_none, (a.lse, a.mbar, a.normalizer)))
    with inside_an_op(a.query.device):
        grads = chosen.backward(call, saved, a.dout, a.dlse, Needs(*a.needs))
    return _of_attention(grads, a.query)


def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    a = BackwardArguments(*arguments)
    return _of_attention(_fake_gradients(attention_call(a), Needs(*a.needs)), a.query)


def compute_map(*arguments: Any) -> tuple[Tensor, ...]:
    a = MapArguments(*arguments)
    call = map_call(a)
    chosen = resolve(call.problem, a.backend, "attention_map")
    with inside_an_op(a.query.device):
        amap, saved = chosen.attention_map(call)
    return amap, _or_empty(saved.lse, call), _or_empty(saved.normalizer, call)


def fake_map(*arguments: Any) -> tuple[Tensor, ...]:
    a = MapArguments(*arguments)
    (B, H, Nq, _), Nk, acc = a.query.shape, a.key.shape[2], acc_dtype(a.query.dtype)
    shapes = ((B, Nq, Nk), (B, H, Nq), normalizer_shape(map_call(a).problem) or (0,))
    return tuple([a.query.new_empty(shape, dtype=acc) for shape in shapes])


def compute_map_backward(*arguments: Any) -> tuple[Tensor, ...]:
    a = MapBackwardArguments(*arguments)
    call = map_call(a)
    chosen = resolve(call.problem, a.backend, "attention_map_backward")
    saved = Saved(None, None, _or_none(a.lse), None, _or_none(a.normalizer))
    with inside_an_op(a.query.device):
        grads = chosen.attention_map_backward(call, saved, a.dmap, Needs(*a.needs))
    return _of_map(grads, a.query)


def fake_map_backward(*arguments: Any) -> tuple[Tensor, ...]:
    a = MapBackwardArguments(*arguments)
    return _of_map(_fake_gradients(map_call(a), Needs(*a.needs)), a.query)


def _fake_gradients(call: Call, needs: Needs) -> Gradients:
    inputs = (getattr(call, name) for name in Gradients._fields)
    return Gradients(*(x.new_empty(x.shape) if needed and x is not None else None for x, needed in zip(inputs, needs, strict=True)))


def _of_attention(grads: Gradients, query: Tensor) -> tuple[Tensor, ...]:
    """What the op `backward` returns."""
    return _without_none(query, grads.query, grads.key, grads.value, grads.mask, grads.alpha)


def _of_map(grads: Gradients, query: Tensor) -> tuple[Tensor, ...]:
    """What the op `attention_map_backward` returns."""
    return _without_none(query, grads.query, grads.key, grads.mask, grads.alpha, grads.head_weights)


def _or_empty(rows: Tensor | None, call: Call) -> Tensor:
    """Rows as an op returns them."""
    return call.query.new_empty((0,), dtype=call.problem.acc_dtype) if rows is None else rows


def _or_none(rows: Tensor) -> Tensor | None:
    """Rows as an op was handed them: an empty tensor of one axis stands for none."""
    return None if rows.dim() == 1 else rows


def _without_none(query: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients, with an empty tensor in the place of each that nobody asked for."""
    return tuple([query.new_empty((0,)) if grad is None else grad for grad in grads])


SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", list[bool]: "bool[]", str: "str"}
library = torch.library.Library("smattn", "DEF")


def _register(name: str, arguments: type, returns: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op whose schema is the fields of `arguments`, and return it."""
    fields = (f"{SCHEMA_TYPES[kind]} {field}" for field, kind in get_type_hints(arguments).items())
    library.define(f"{name}({', '.join(fields)}) -> ({returns})")
    # On every device: the table of backends says what runs there.
    library.impl(name, made_again(implementation, arguments), "CompositeExplicitAutograd")
    torch.library.register_fake(f"smattn::{name}", fake, lib=library)
    return getattr(torch.ops.smattn, name).default


forward = _register(
    "forward", ForwardArguments,
    "Tensor out, Tensor lse, Tensor remainder, Tensor mbar, Tensor normalizer",
    compute_forward, fake_forward,
)  # fmt: skip
backward = _register(
    "backward", BackwardArguments,
    "Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask, Tensor dalpha",
    compute_backward, fake_backward,
)  # fmt: skip
attention_map = _register(
    "attention_map", MapArguments,
    "Tensor map, Tensor lse, Tensor normalizer",
    compute_map, fake_map,
)  # fmt: skip
attention_map_backward = _register(
    "attention_map_backward", MapBackwardArguments,
    "Tensor dquery, Tensor dkey, Tensor dmask, Tensor dalpha, Tensor dhead_weights",
    compute_map_backward, fake_map_backward,
)  # fmt: skip
