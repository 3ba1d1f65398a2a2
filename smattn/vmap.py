"""torch.func.vmap over the ops: a mapped axis is folded into the batch where that is possible, else the calls run in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Needs


def fold_or_loop(call: Callable[..., Any], n: int, arguments: Any, in_dims: Any) -> tuple[Any, Any]:
    """The vmap rule of all four ops: n calls become one of n*B batch elements if they can, else n.

    arguments, in_dims: the op's named tuple of ops.py, once of values and once of the axes that are mapped.

    Returns what a vmap rule returns, the results and their mapped axes.
    """
    folded = None if n == 0 or _sums_over_the_batch(arguments) else _folded(n, arguments, in_dims)
    return _looped(call, n, arguments, in_dims) if folded is None else _unfolded(call(*folded), n)


def _sums_over_the_batch(arguments: Any) -> bool:
    """Whether a gradient of alpha or of head weights is wanted: a sum over the batch, in which folded calls cannot be told apart."""
    if "needs" not in arguments._fields:
        return False
    needs = Needs(*arguments.needs)
    return needs.alpha or needs.head_weights


def _folded(n: int, arguments: Any, in_dims: Any) -> list[Any] | None:
    """The arguments with the mapped axis folded into B; None where a 1-D tensor is mapped, bits depend on b or a mask would be copied."""
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
            if name in ("mask", "mask_logits") and (rows.shape[1] != B or (dim is None and B > 1)):
                return None
            folded.append(rows.flatten(0, 1))
    return folded


def _unfolded(outputs: tuple[Tensor, ...], n: int) -> tuple[Any, Any]:
    """Results of folded calls with the mapped axis in front again; those without a batch, which are the empty ones, are not mapped."""
    has_batch = [output.dim() > 1 for output in outputs]
    unfolded = tuple(out.unflatten(0, (n, -1)) if batched else out for out, batched in zip(outputs, has_batch, strict=True))
    return unfolded, tuple(0 if batched else None for batched in has_batch)


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
