"""First derivatives over the ops, composable with torch.func and torch.compile; second derivatives of the reference alone.

Backward calls its op through a second Function whose own backward refuses. `once_differentiable` would guard .backward() alone, and a
gradient penalty by torch.autograd.grad would be silently wrong. The reference is plain torch: where it was asked for by name, autograd
records its backward instead, which can then be differentiated as often as wanted.

Dynamo must not look inside the four Functions. What it rebuilds of one runs backward without grad mode, keeps saved tensors of the wrong
torch.func level and, under vmap, has no backward at all; second derivatives, and under vmap first ones, would silently be 0. So Dynamo is
told to record their calls, and the compilers behind it trace what autograd really runs.

A Function sees the flat arguments of its op. The named tuples of ops.py name them here too, and nothing counts positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function, forward_ad
from torch.jit._trace import is_tracing

from . import ops
from .call import Needs
from .ops import BackwardArguments, ForwardArguments, MapArguments, MapBackwardArguments
from .vmap import fold_or_loop

NO_SECOND = "smattn: second derivatives of soft-masked attention are not implemented"
NO_FORWARD_MODE = (
    "smattn: forward-mode derivatives of soft-masked attention are not implemented; "
    "for second derivatives take jacrev of jacrev with backend='reference'"
)


def outputs_to_save(
    query: Tensor, key: Tensor, mask: Tensor | None, mask_logits: Tensor | None, alpha: Tensor | None
) -> tuple[bool, bool]:
    """save_out and save_mbar of ops.forward: whether some gradient will read the output and its remainder, and mbar.

    A trace does not say, so that it is the same with gradients and without: the op's autograd kernel, at the end of this file, asks again.
    """
    if not torch.is_grad_enabled() or is_tracing():
        return False, False
    save_mbar = _requires_grad(alpha)
    return save_mbar or _requires_grad(query) or _requires_grad(key) or _requires_grad(mask) or _requires_grad(mask_logits), save_mbar


def _requires_grad(tensor: Tensor | None) -> bool:
    """Whether the tensor has a gradient. Under torch.func.grad Dynamo says no for an input but yes for a view of it; so ask a view."""
    if tensor is None:
        return False
    return (tensor.view_as(tensor) if torch.compiler.is_compiling() else tensor).requires_grad


def with_saves_for_inner_tensors(arguments: tuple[Any, ...]) -> ForwardArguments:
    """Arguments of ops.forward that also save what the gradients of these very tensors will read.

    The flags were set where the tensors were wrapped, by vmap or in an exported graph, and a wrapper does not tell of its inner tensor.
    """
    a = ForwardArguments(*arguments)
    save_out, save_mbar = outputs_to_save(a.query, a.key, a.mask, a.mask_logits, a.alpha)
    return a._replace(save_out=a.save_out or save_out, save_mbar=a.save_mbar or save_mbar)


def apply(function: type[Function], op: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """function.apply(*arguments), which Dynamo records without looking inside; in eager mode this skips what apply would do for nothing.

    torch.export does not know a Function under vmap, and gets its op.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return op(*arguments)
        keep_dynamo_out()
    elif is_tracing():
        return op(*arguments)  # A trace would hold a Function as Python code, which cannot be saved.
    elif not torch._C._are_functorch_transforms_active():
        # torch._functorch.utils.unwrap_dead_wrappers, by a list, which is twice as quick
        arguments = tuple([unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in arguments])
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return function.forward(*arguments)  # nobody asks for a derivative
        # Function.apply binds the arguments to forward's signature first, which costs more than the rest of it.
        return super(Function, function).apply(*arguments)  # type: ignore[misc]  # it is C
    return function.apply(*arguments)


def keep_dynamo_out() -> None:
    """Make Dynamo record calls of the Functions. This is not done at import, which would import Dynamo, and Triton with it."""
    torch.compiler.allow_in_graph([SoftMaskedAttention, AttentionMap, _AttentionBackward, _AttentionMapBackward])


# Dynamo then runs the function while it traces: the mark is what torch.compiler.assume_constant_result sets.
keep_dynamo_out._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _ReverseMode(Function):
    """A Function that refuses forward mode. Dynamo does not trace a Function that has a jvp, but it is kept out of these anyway."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)


class SoftMaskedAttention(_ReverseMode):
    """(out, lse, remainder, mbar, normalizer) of ops.forward, the first two differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(ops.forward, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a = ForwardArguments(*inputs)
        out, lse, remainder, mbar, normalizer = output
        ctx.mark_non_differentiable(remainder, mbar, normalizer)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            a.query, a.key, a.value, a.mask, a.mask_logits, a.alpha, a.key_padding_mask, a.seed,
            out, _unless_normalized(lse, normalizer), remainder, mbar, normalizer,
        )  # fmt: skip
        ctx.options = (a.scale, a.dropout_p, a.allow_tf32, a.backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ForwardArguments._fields)
        _refuse_a_lost_graph(dout, dlse)
        query, key, value, mask, mask_logits, alpha, key_padding_mask, seed, out, lse, remainder, mbar, normalizer = ctx.saved_tensors
        scale, dropout_p, allow_tf32, backend = ctx.options
        if dout is None:
            dout = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
        wanted: Any = ForwardArguments(*ctx.needs_input_grad)
        needs = Needs(wanted.query, wanted.key, wanted.value, wanted.mask or wanted.mask_logits, wanted.alpha)
        a = BackwardArguments(
            dout, dlse, query, key, value, mask, mask_logits, alpha, key_padding_mask, seed, out, remainder, lse, mbar, normalizer,
            scale, dropout_p, allow_tf32, list(needs), backend,
        )  # fmt: skip
        dquery, dkey, dvalue, dmask, dalpha = _gradients(_AttentionBackward, ops.backward, ops.compute_backward, a)
        return _where_wanted(wanted, query=dquery, key=dkey, value=dvalue, mask=dmask, mask_logits=dmask, alpha=dalpha)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _vmap_forward(SoftMaskedAttention.apply, info, in_dims, *arguments)


class AttentionMap(_ReverseMode):
    """(map, lse, normalizer) of ops.attention_map, the first differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(ops.attention_map, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a = MapArguments(*inputs)
        _, lse, normalizer = output
        ctx.mark_non_differentiable(lse, normalizer)
        lse = _unless_normalized(lse, normalizer)
        ctx.save_for_backward(a.query, a.key, a.mask, a.mask_logits, a.alpha, a.head_weights, a.key_padding_mask, lse, normalizer)
        ctx.set_materialize_grads(False)  # else zeros for lse and normalizer, which have no gradients
        ctx.options = (a.scale, a.allow_tf32, a.backend)

    @staticmethod
    def backward(ctx: Any, dmap: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dmap is None:
            return (None,) * len(MapArguments._fields)
        _refuse_a_lost_graph(dmap)
        query, key, mask, mask_logits, alpha, head_weights, key_padding_mask, lse, normalizer = ctx.saved_tensors
        scale, allow_tf32, backend = ctx.options
        wanted: Any = MapArguments(*ctx.needs_input_grad)
        needs = Needs(wanted.query, wanted.key, False, wanted.mask or wanted.mask_logits, wanted.alpha, wanted.head_weights)
        a = MapBackwardArguments(
            dmap, query, key, mask, mask_logits, alpha, head_weights, key_padding_mask, lse, normalizer,
            scale, allow_tf32, list(needs), backend,
        )  # fmt: skip
        dquery, dkey, dmask, dalpha, dweights = _gradients(_AttentionMapBackward, ops.attention_map_backward, ops.compute_map_backward, a)
        return _where_wanted(wanted, query=dquery, key=dkey, mask=dmask, mask_logits=dmask, alpha=dalpha, head_weights=dweights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _vmap_map(AttentionMap.apply, info, in_dims, *arguments)


class _OnlyOnce(_ReverseMode):
    """A backward, which refuses to be differentiated."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{NO_SECOND}, except with backend='reference'")


class _AttentionBackward(_OnlyOnce):
    """ops.backward."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(ops.backward, arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_or_loop(_AttentionBackward.apply, info.batch_size, BackwardArguments(*arguments), BackwardArguments(*in_dims))


class _AttentionMapBackward(_OnlyOnce):
    """ops.attention_map_backward."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(ops.attention_map_backward, arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_or_loop(_AttentionMapBackward.apply, info.batch_size, MapBackwardArguments(*arguments), MapBackwardArguments(*in_dims))


def _unless_normalized(lse: Tensor, normalizer: Tensor) -> Tensor:
    """The lse that backward is to read: where there is a normalizer an empty tensor, so that lse is freed."""
    return lse if normalizer.dim() == 1 else normalizer.new_empty((0,))


def _below_autograd(op: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The op's results. Above autograd it would ask its autograd kernel, at the end of this file."""
    with torch._C._AutoDispatchBelowAutograd():
        return tuple(op(*arguments))


def _where_wanted(wanted: Any, **grads: Tensor) -> tuple[Tensor | None, ...]:
    """What autograd takes from a Function's backward: one value for each of forward's arguments, None where it wants no gradient.

    wanted: forward's named tuple, with a bool in each place. mask and mask_logits have the same gradient here, because one is not given.
    """
    return tuple([grads[name] if is_wanted else None for name, is_wanted in zip(wanted._fields, wanted, strict=True)])


def _gradients(function: type[Function], op: Callable[..., Any], formula: Callable[..., Any], a: Any) -> Any:
    """The op's results by function, or by the code of the op in autograd's sight where the reference's gradients are to have gradients."""
    if a.backend == "reference" and torch.is_grad_enabled():
        return formula(*a)
    return apply(function, op, a)


def _refuse_a_lost_graph(*grads: Tensor | None) -> None:
    """torch.autograd.grad(is_grads_batched=True, create_graph=True) would drop the graph of a Function inside it without a word."""
    if torch.is_grad_enabled() and any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        raise NotImplementedError(f"{NO_SECOND} for batched gradients")


def _vmap_forward(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_or_loop(call, info.batch_size, with_saves_for_inner_tensors(arguments), ForwardArguments(*in_dims))


def _vmap_map(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_or_loop(call, info.batch_size, MapArguments(*arguments), MapArguments(*in_dims))


def _autograd_kernel(function: type[Function], op: Any) -> Callable[..., Any]:
    """The derivative of an op that is called with no Function above it, as in a graph of torch.export; torch.func refuses it there."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return function.apply(*(with_saves_for_inner_tensors(arguments) if op is ops.forward else arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


def _register(op: Any, function: type[Function]) -> None:
    ops.library.impl(op._schema.name.removeprefix("smattn::"), _autograd_kernel(function, op), "Autograd", with_keyset=True)


_register(ops.forward, SoftMaskedAttention)
_register(ops.backward, _AttentionBackward)
_register(ops.attention_map, AttentionMap)
_register(ops.attention_map_backward, _AttentionMapBackward)

torch.library.register_vmap("smattn::forward", partial(_vmap_forward, ops.forward), lib=ops.library)
torch.library.register_vmap("smattn::attention_map", partial(_vmap_map, ops.attention_map), lib=ops.library)
