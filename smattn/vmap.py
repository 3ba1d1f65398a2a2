"""torch.func.vmap over the ops: a mapped axis is folded into the batch where that is possible, else the calls run in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Needs
from .canonical import two_batch_axes


def fold_or_loop(call: Callable[..., Any], n: int, arguments: Any, in_dims: Any) -> tuple[Any, Any]:
    """The vmap rule of all four ops: n calls become one of n*B batch elements if they can, else n.

    arguments, in_dims: the op's named tuple of ops.py, once of values and once of the axes that are mapped.

    Returns what a vmap rule returns, the results and their mapped axes.
    """
    folded = None if n == 0 or _sums_over_the_batch(arguments) else _folded(n, arguments, in_dims)
    return _looped(call, n, arguments, in_dims) if folded is None else _unfolded(call(*folded), n, arguments, in_dims)


def _sums_over_the_batch(arguments: Any) -> bool:
    """Whether a gradient of alpha or of head weights is wanted: a sum over the batch, in which folded calls cannot be told apart."""
    if "needs" not in arguments._fields:
        return False
    needs = Needs(*arguments.needs)
    return needs.alpha or needs.head_weights


def _folded(n: int, arguments: Any, in_dims: Any) -> list[Any] | None:
    """The arguments with the mapped axis folded into B; None where a 1-D tensor is mapped, bits depend on b or a mask cannot say so."""
    B = arguments.query.movedim(in_dims.query or 0, 0).shape[0 if in_dims.query is None else 1]
    folded = []
    for name, argument, dim in zip(arguments._fields, arguments, in_dims, strict=True):
        if not isinstance(argument, Tensor):
            folded.append(argument)
        elif argument.dim() - (dim is not None) == 1:  # alpha, head weights, an empty tensor, or the int64 dropout seed
            if dim is not None or not argument.is_floating_point():
                return None
            folded.append(argument)
        else:
            rows = argument.expand(n, *argument.shape) if dim is None else argument.movedim(dim, 0)
            if name in ("mask", "mask_logits"):
                mask = _folded_mask(rows, dim is None and not _has_gradient_of_mask(arguments), B)
                if mask is None:
                    return None
                folded.append(mask)
            else:
                folded.append(rows.flatten(0, 1))
    return folded


def _folded_mask(rows: Tensor, is_shared: bool, B: int) -> Tensor | None:
    """A mask (n, outer|1, inner|1, H|1, Nq|1, Nk) with two batch axes for the n*B elements, or None. is_shared: the n calls read one mask.

    Where each of the n calls is to have its own gradient of one mask, that mask is not shared, but expanded.
    """
    outer, inner = rows.shape[1:3]
    inner = inner if inner > 1 or outer == 1 else B // outer
    outer = outer if outer > 1 or inner == 1 else B // inner
    if outer == inner == 1:
        inner = B
    return two_batch_axes(rows[:1] if is_shared else rows, (rows.shape[0], outer, inner))


def _has_gradient_of_mask(arguments: Any) -> bool:
    return "needs" in arguments._fields and Needs(*arguments.needs).mask


def _unfolded(outputs: tuple[Tensor, ...], n: int, arguments: Any, in_dims: Any) -> tuple[Any, Any]:
    """Results of folded calls with the mapped axis in front again; those without a batch, which are the empty ones, are not mapped."""

    def unfold(output: Tensor) -> Tensor:
        if output.dim() == 1:
            return output
        if output.dim() < 5:
            return output.unflatten(0, (n, -1))
        mask, dim = next((x, dim) for x, dim in zip(_masks(arguments), _masks(in_dims), strict=True) if x is not None)
        shape = list(mask.shape)  # the gradient of a mask, the one result with five axes
        if dim is not None:
            del shape[dim]
        return output.reshape(n, *shape)

    return tuple(map(unfold, outputs)), tuple(None if output.dim() == 1 else 0 for output in outputs)


def _masks(named: Any) -> tuple[Any, Any]:
    return named.mask, named.mask_logits


def _looped(call: Callable[..., Any], n: int, arguments: Any, in_dims: Any) -> tuple[Any, Any]:
    """One call after the other. For n = 0 there is one call still, from whose results the shapes are taken."""

    def selected(argument: Any, dim: int | None, i: int) -> Any:
        if not isinstance(argument, Tensor) or dim is None:
            return argument
        return (argument if n else _zeros_of_one(argument, dim)).select(dim, i)

    pairs = list(zip(arguments, in_dims, strict=True))
    calls = [call(*(selected(argument, dim, i) for argument, dim in pairs)) for i in range(max(n, 1))]
    return tuple(torch.stack(outputs)[:n] for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


def _zeros_of_one(argument: Tensor, dim: int) -> Tensor:
    """Zeros of the argument's shape, but for size 1 along dim."""
    sizes = list(argument.shape)
    sizes[dim] = 1
    return argument.new_zeros(sizes)
