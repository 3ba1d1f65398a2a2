"""First derivatives over the ops, composable with torch.func and torch.compile; beyond the first, the reference's alone.

Backward calls its op through a second Function whose own backward refuses: `once_differentiable` guards .backward() only, and a gradient
penalty by torch.autograd.grad would be silently wrong. The reference, where it was asked for by name, is plain torch: its backward is then
recorded instead, and differentiates as often as wanted.

Dynamo must not look inside the four Functions: what it rebuilds of one runs backward without grad mode, keeps saved tensors of the wrong
torch.func level and, under vmap, has no backward at all; second derivatives, and under vmap first ones, would silently be 0. So Dynamo is
told to record their calls, and the compilers behind it trace what autograd really runs.

Their forwards take *args: apply() binds its arguments to forward's signature at every call, 30 microseconds for fourteen names; 10
even so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from . import ops

NO_SECOND = "smattn: second derivatives of soft-masked attention are not implemented"


def what_backward_reads(
    query: Tensor, key: Tensor, mask: Tensor | None, mask_logits: Tensor | None, alpha: Tensor | None
) -> tuple[bool, bool]:
    """save_out and save_mbar of ops.forward: what some gradient will read."""
    tensors = (alpha, query, key, mask, mask_logits)
    alpha_grad, *others = (torch.is_grad_enabled() and t is not None and _requires_grad(t) for t in tensors)
    return alpha_grad or any(others), alpha_grad


def _requires_grad(tensor: Tensor) -> bool:
    """Dynamo says of an input of torch.func.grad that it does not, but of what is made of it that it does."""
    return (tensor.view_as(tensor) if torch.compiler.is_compiling() else tensor).requires_grad


def _ask_again(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of ops.forward whose save_out and save_mbar are also what the gradients of these very tensors will read."""
    query, key, _, mask, mask_logits, alpha, *_rest, save_out, save_mbar, backend = args
    more_out, more_mbar = what_backward_reads(query, key, mask, mask_logits, alpha)
    return *args[:11], save_out or more_out, save_mbar or more_mbar, backend


def call(function: type[Function], *args: Any, op: Any = None) -> Any:
    """function.apply(*args), which Dynamo records and does not look into; in eager mode without what apply would do for nothing.

    torch.export, which knows no Function under vmap, gets its op.
    """
    if torch.compiler.is_compiling():
        if op is not None and torch.compiler.is_exporting():
            return op(*args)
        _tell_dynamo()
    elif not torch._C._are_functorch_transforms_active():
        args = unwrap_dead_wrappers(args)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return function.forward(*args)  # nobody asks for a derivative
        return super(Function, function).apply(*args)  # type: ignore[misc]  # it is C
    return function.apply(*args)


def _tell_dynamo() -> None:
    # not when this module is imported: that would import Dynamo, and Triton with it
    torch.compiler.allow_in_graph([SoftMaskedAttention, AttentionMap, _AttentionBackward, _AttentionMapBackward])


_tell_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo runs it while it traces, as assume_constant_result says


def _run(op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """The op below autograd, or it would ask its autograd kernel at the end of this file."""
    with torch._C._AutoDispatchBelowAutograd():
        return tuple(op(*args))


def _refuse_a_lost_graph(*grads: Tensor | None) -> None:
    """torch.autograd.grad(is_grads_batched=True, create_graph=True) would drop the graph of a Function inside it without a word."""
    if torch.is_grad_enabled() and any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        raise NotImplementedError(f"{NO_SECOND} for batched gradients")


def _gradients(function: type[Function], formula: Callable[..., Any], *args: Any) -> Any:
    """What function's op returns; of the reference, where the gradients are to have gradients, by the op's code in autograd's sight."""
    if args[-1] == "reference" and torch.is_grad_enabled():
        return formula(*args)
    return call(function, *args)


class SoftMaskedAttention(Function):
    """(out, lse, out_acc, mbar) of ops.forward, the first two differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _run(ops.forward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, scale, dropout_p, allow_tf32, save_out, _, backend = inputs
        out, lse, out_acc, mbar = output
        ctx.mark_non_differentiable(out_acc, mbar)
        ctx.set_materialize_grads(False)
        # out_acc was asked for and has another dtype: out was rounded
        unrounded = out_acc if save_out and out_acc.dtype != out.dtype else out
        ctx.save_for_backward(*tensors, unrounded, lse, mbar)
        ctx.call = (scale, dropout_p, allow_tf32)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 14
        _refuse_a_lost_graph(dout, dlse)
        query, _, value, _, mask_logits, *_ = saved = ctx.saved_tensors
        if dout is None:
            dout = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
        wanted = ctx.needs_input_grad
        needs = [wanted[0], wanted[1], wanted[2], wanted[3] or wanted[4], wanted[5]]
        dquery, dkey, dvalue, dmask, dalpha = _gradients(
            _AttentionBackward, ops._backward, dout, dlse, *saved, *ctx.call, needs, ctx.backend
        )
        dmask, dlogits = (dmask, None) if mask_logits is None else (None, dmask)
        grads = (dquery, dkey, dvalue, dmask, dlogits, dalpha)
        return *(grad if need else None for grad, need in zip(grads, wanted, strict=False)), *(None,) * 8

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_forward(SoftMaskedAttention.apply, info, in_dims, args)


class AttentionMap(Function):
    """(map, lse) of ops.attention_map, the first differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _run(ops.attention_map, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, scale, allow_tf32, backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.call = (scale, allow_tf32)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, dmap: Tensor, _: None) -> tuple[Tensor | None, ...]:
        _refuse_a_lost_graph(dmap)
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = [wanted[0], wanted[1], wanted[2] or wanted[3], wanted[4], wanted[5]]
        grads = _gradients(_AttentionMapBackward, ops._attention_map_backward, dmap, *saved, *ctx.call, needs, ctx.backend)
        dquery, dkey, dmask, dalpha, dweights = grads
        dmask, dlogits = (dmask, None) if saved[3] is None else (None, dmask)
        grads = (dquery, dkey, dmask, dlogits, dalpha, dweights)
        return *(grad if need else None for grad, need in zip(grads, wanted, strict=False)), *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_map(AttentionMap.apply, info, in_dims, args)


class _AttentionBackward(Function):
    """ops.backward, refusing to be differentiated."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _run(ops.backward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{NO_SECOND}, but by backend='reference'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_AttentionBackward.apply, info.batch_size, in_dims, args, (5, 6), needs=args[-2][4:])


class _AttentionMapBackward(Function):
    """ops.attention_map_backward, refusing to be differentiated."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _run(ops.attention_map_backward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{NO_SECOND}, but by backend='reference'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_AttentionMapBackward.apply, info.batch_size, in_dims, args, (3, 4), needs=args[-2][3:])


def _vmap_forward(apply: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    # a batched tensor hid that the one inside wants a gradient
    return _vmap(apply, info.batch_size, in_dims, _ask_again(args), (3, 4), needs=())


def _vmap_map(apply: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    return _vmap(apply, info.batch_size, in_dims, args, (2, 3), needs=())


def _vmap(
    apply: Callable[..., Any], n: int, in_dims: Sequence[Any], args: Sequence[Any], masks: tuple[int, int], needs: Sequence[bool]
) -> tuple[Any, Any]:
    """The vmap rule of all four: n calls become one of n*B batch elements where that is possible, else a loop.

    `masks` are the positions of mask and mask_logits; `needs` says which gradients of 1-D inputs (alpha, head weights) are asked for:
    those are sums over the batch, which a folded call cannot tell apart.
    """
    folded = None if any(needs) or n == 0 else _fold(n, in_dims, args, masks)
    if folded is not None:
        outputs = apply(*folded)
        out_dims = tuple(None if output.dim() == 1 else 0 for output in outputs)  # 1-D: the empty ones
        return tuple(o if dim is None else o.unflatten(0, (n, -1)) for o, dim in zip(outputs, out_dims, strict=True)), out_dims
    pairs = [(_at_least_one(a, dim) if isinstance(a, Tensor) and dim is not None else a, dim) for a, dim in zip(args, in_dims, strict=True)]
    calls = [apply(*(a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a for a, dim in pairs)) for i in range(max(n, 1))]
    return tuple(torch.stack(outputs)[:n] for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


def _at_least_one(arg: Tensor, dim: int) -> Tensor:
    """arg, or where it is mapped over an axis of size 0 zeros of size 1: a call to take the shapes of its outputs from."""
    return arg if arg.shape[dim] else arg.new_zeros([1 if axis == dim else size for axis, size in enumerate(arg.shape)])


def _fold(n: int, in_dims: Sequence[Any], args: Sequence[Any], masks: tuple[int, int]) -> list[Any] | None:
    """The arguments with the mapped axis folded into B; None where a 1-D tensor is mapped, bits depend on b or a mask would be copied."""
    B = args[0].movedim(in_dims[0] or 0, 0).shape[in_dims[0] is not None]  # the first argument is query, dout or dmap
    folded = list(args)
    for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(arg, Tensor):
            continue
        if arg.dim() - (dim is not None) == 1:  # alpha, head weights, an empty tensor, or the int64 dropout seed
            if dim is not None or not arg.is_floating_point():
                return None
            continue
        rows = arg.expand(n, *arg.shape) if dim is None else arg.movedim(dim, 0)
        if i in masks and (rows.shape[1] != B or dim is None and B > 1):
            return None
        folded[i] = rows.flatten(0, 1)
    return folded


def _autograd_kernel(function: type[Function], op: Any) -> Callable[..., Any]:
    """The derivative of an op that is called with no Function above it, as in a graph of torch.export; torch.func refuses it there."""

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return function.apply(*(_ask_again(args) if op is ops.forward else args))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


for _op, _function in (
    (ops.forward, SoftMaskedAttention),
    (ops.backward, _AttentionBackward),
    (ops.attention_map, AttentionMap),
    (ops.attention_map_backward, _AttentionMapBackward),
):
    ops.library.impl(_op._schema.name.split("::")[1], _autograd_kernel(_function, _op), "Autograd", with_keyset=True)

for _op, _rule in ((ops.forward, _vmap_forward), (ops.attention_map, _vmap_map)):
    torch.library.register_vmap(
        _op._schema.name, lambda info, in_dims, *args, op=_op, rule=_rule: rule(op, info, in_dims, args), lib=ops.library
    )
