"""Context parallelism: the keys outgrow one device, and each rank of a process group holds some of them.

Rank r computes (1)-(4) of reference.py over its own keys, O_r, L_r and mbar_r. Over all keys

    L = log sum_r exp(L_r)      O = sum_r exp(L_r - L) O_r      mbar = sum_r exp(L_r - L) mbar_r

and given those, (5)-(8) hold as they stand: P_ij = exp(S_ij - L_i) needs no key except j. In float32 and float64 exp(L_r) is 2^m_r * l_r,
of the normalizers, and backward gets the normalizer over all keys. So each rank calls the ordinary backward on its
own keys. dK, dV and dM stay where K, V and M are, and dQ and dalpha alone are summed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..autograd import NO_SECOND
from ..backends import resolve
from ..call import Call, Gradients, Needs, Problem, Saved, make_call, with_remainder, without_rounding
from ..canonical import allow_tf32, alpha_of, autocast, five_axes, of_batch, one_batch_axis, per_head, scale_of
from ..ops import inside_an_op
from ..validate import validate


@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = ..., alpha: float | Tensor | None = ..., *,
    group: dist.ProcessGroup | None = ..., scale: float | None = ..., key_padding_mask: Tensor | None = ...,
    enable_gqa: bool = ..., return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = ..., alpha: float | Tensor | None = ..., *,
    group: dist.ProcessGroup | None = ..., scale: float | None = ..., key_padding_mask: Tensor | None = ...,
    enable_gqa: bool = ..., return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    alpha: float | Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """smattn.soft_masked_attention over keys that are sharded over the ranks of a process group, by the formulas at the top of this file.

    Every rank calls it with the same query and alpha and with its own keys. Every rank gets the whole output, and is to compute the same
    loss from it: the gradients of query and alpha are then the whole ones on every rank, those of key, value and mask the rank's own.

    Args:
        query: (B, H, Nq, D), the same on every rank.
        key, value: (B, Hkv, Nk_r, D) and (B, Hkv, Nk_r, Dv): the rank's keys. Nk_r may differ from rank to rank, and may be 0.
        mask: the same keys' columns, (B|1, Nq|1, Nk_r) or (B|1, H|1, Nq|1, Nk_r).
        alpha: as in soft_masked_attention, the same on every rank.
        group: the process group, the default one unless given.
        key_padding_mask: bool (B, Nk_r), True = padding. A query whose keys are padding on every rank gives zeros, lse = -inf, no gradient.
        scale, enable_gqa, return_lse, backend: as in soft_masked_attention, the same on every rank. There is no dropout.

    Returns:
        (B, H, Nq, Dv) in query's dtype; with return_lse also (B, H, Nq) over the keys of all ranks. The same on every rank.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: group is not a process group, this rank is not in it, or an argument is not as above.
        NotImplementedError: second derivatives.

    Communication, with n = B * H * Nq and words of 4 bytes (8 in float64), whatever the number of keys: forward all-reduces n words,
    then n * (Dv + 1), and n more if alpha needs a gradient. Backward all-reduces n * D words if query needs a gradient, and H more if alpha
    does. Nobody checks that every rank passes the same sizes, because that would be one more message; a run with
    TORCH_DISTRIBUTED_DEBUG=DETAIL says which rank does not.
    """
    group = _checked(group)
    query, key, value = autocast(query, key, value)
    validate(
        query, key, value, mask, alpha, mask_logits=None, scale=scale, key_padding_mask=key_padding_mask, enable_gqa=enable_gqa,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip
    batch = query.shape[:-3]
    query, key, value = (one_batch_axis(tensor, 3) for tensor in (query, key, value))
    call = make_call(
        query, key, value, five_axes(mask, batch), per_head(alpha_of(alpha, mask, None), query), one_batch_axis(key_padding_mask, 1),
        scale=scale_of(scale, query), allow_tf32=allow_tf32(query),
    )  # fmt: skip
    out, lse = _ContextParallel.apply(
        *_Arguments(query, key, value, call.mask, call.alpha, call.key_padding_mask, call.problem, group, backend or "")
    )
    out = of_batch(out, batch)
    return (out, of_batch(lse, batch)) if return_lse else out


def _checked(group: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("smattn.distributed: torch.distributed is not initialised; call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group: expected a process group that this rank is in, got one without rank {dist.get_rank()}")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group


class _Arguments(NamedTuple):
    """What _ContextParallel takes: the tensors of a call side by side, because autograd sees no tensor inside a tuple."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    alpha: Tensor | None
    key_padding_mask: Tensor | None
    problem: Problem
    group: dist.ProcessGroup
    backend: str


class _BackwardArguments(NamedTuple):
    """What _ContextParallelBackward takes. The first eleven are what _ContextParallel saves; the rows are over the keys of all ranks."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    alpha: Tensor | None
    key_padding_mask: Tensor | None
    out: Tensor
    remainder: Tensor | None
    lse: Tensor
    mbar: Tensor | None
    normalizer: Tensor | None
    dout: Tensor | None  # None: zeros
    dlse: Tensor | None
    needs: Needs
    problem: Problem
    group: dist.ProcessGroup
    backend: str


def _call(a: _Arguments | _BackwardArguments) -> Call:
    return Call(a.problem, a.query, a.key, a.value, a.mask, a.alpha, a.key_padding_mask)


class _ContextParallel(Function):
    """(out, lse) over the keys of all ranks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        a = _Arguments(*arguments)
        wanted = dict(zip(a._fields, ctx.needs_input_grad, strict=True))
        chosen = resolve(a.problem, a.backend, "forward")
        with inside_an_op(a.query.device):
            _, own = chosen.forward(_call(a), save_out=True, save_mbar=wanted["alpha"])
        saved = _merge(own, a.problem, a.group)
        ctx.save_for_backward(a.query, a.key, a.value, a.mask, a.alpha, a.key_padding_mask, *saved)
        ctx.options = dict(problem=a.problem, group=a.group, backend=a.backend)
        ctx.set_materialize_grads(False)
        assert saved.out is not None and saved.lse is not None
        return saved.out, saved.lse.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * len(_Arguments._fields)
        wanted = dict(zip(_Arguments._fields, ctx.needs_input_grad, strict=True))
        needs = Needs(*(wanted[name] for name in ("query", "key", "value", "mask", "alpha")))
        saved = dict(zip(_BackwardArguments._fields, ctx.saved_tensors, strict=False))
        a = _BackwardArguments(**saved, dout=dout, dlse=dlse, needs=needs, **ctx.options)
        grads = Gradients(*_ContextParallelBackward.apply(*a))
        return tuple(getattr(grads, name, None) for name in _Arguments._fields)


class _ContextParallelBackward(Function):
    """The gradients of one call, which refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        a = _BackwardArguments(*arguments)
        call, saved = _call(a), Saved(a.out, a.remainder, a.lse, a.mbar, a.normalizer)
        chosen = resolve(a.problem, a.backend, "backward")
        dout = a.query.new_zeros(()).expand_as(a.out) if a.dout is None else a.dout
        with inside_an_op(a.query.device):
            grads = chosen.backward(call, saved, dout, a.dlse, a.needs)
        own_dalpha, of_rows = _without_rows(grads.alpha, a.dlse, call, saved)
        dquery, dalpha = _sum_over_ranks((grads.query, own_dalpha), a.lse.dtype, a.group)
        if dalpha is not None:
            dalpha = dalpha + of_rows
        return tuple(grads._replace(query=dquery, alpha=dalpha))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(NO_SECOND)


def _merge(own: Saved, problem: Problem, group: dist.ProcessGroup) -> Saved:
    """What forward would leave to backward over the keys of all ranks, from what it left over this rank's keys."""
    out, mbar = without_rounding(own), own.mbar
    m, sums, power, unit = _softmax_of(own)
    largest = m.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    weight = torch.where(m == largest, 1.0, power(m - largest)) * sums  # sums, not NaN, where no rank has a key
    rows = weight[..., None] * (out if mbar is None else torch.cat([out, mbar[..., None]], -1))
    # Where all keys of this rank score -inf its output is NaN. That counts only if the keys of every rank do.
    rows = rows.masked_fill(((m == -math.inf) & (weight == 0))[..., None], 0)
    total = torch.cat([rows, weight[..., None]], -1)
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    rows, sums = total[..., :-1] / total[..., -1:], total[..., -1]
    merged = with_remainder(rows[..., : problem.Dv].contiguous(), problem.dtype)
    mbar = None if mbar is None else rows[..., problem.Dv].contiguous()
    lse = largest * unit + sums.log()
    if own.normalizer is None:
        return Saved(*merged, lse, mbar, None)
    dead = largest == -math.inf
    inverse = (1 / sums).masked_fill(dead, 0).masked_fill(largest == math.inf, math.nan)
    return Saved(*merged, lse, mbar, torch.stack([largest.masked_fill(dead, math.inf), inverse], -1))


def _softmax_of(own: Saved) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], float]:
    """m and l of this rank's rows, such that the sum of exp(S) is power(m) * l, the power, and the natural logarithm of its base.

    In rows without a key m is -inf, in rows with a score of +inf it is +inf, and l is 1 in both.
    """
    assert own.lse is not None
    if own.normalizer is None:
        return own.lse, torch.ones_like(own.lse), torch.exp, 1.0
    m, inverse = own.normalizer.unbind(-1)
    dead = inverse == 0
    return m.masked_fill(dead, -math.inf), (1 / inverse).masked_fill(dead | (own.lse == math.inf), 1.0), torch.exp2, math.log(2)


def _without_rows(dalpha: Tensor | None, dlse: Tensor | None, call: Call, saved: Saved) -> tuple[Tensor | None, Tensor | float]:
    """This rank's dalpha without the last term of (8), and that term. It belongs to rows and not to keys, so every rank has added it."""
    if dalpha is None or dlse is None or saved.mbar is None:
        return dalpha, 0.0
    assert saved.lse is not None
    of_rows = (saved.mbar * dlse).masked_fill(saved.lse == float("-inf"), 0).sum((0, 2))
    is_added = call.problem.Nk > 0  # a rank without keys computes nothing
    return dalpha - of_rows if is_added else dalpha, of_rows


def _sum_over_ranks(grads: tuple[Tensor | None, ...], dtype: torch.dtype, group: dist.ProcessGroup) -> list[Tensor | None]:
    """The sums over ranks of the gradients that are given, in one message, added in dtype."""
    given = [grad for grad in grads if grad is not None]
    if not given:
        return [None] * len(grads)
    total = torch.cat([grad.flatten().to(dtype) for grad in given])
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    sums = iter(total.split([grad.numel() for grad in given]))
    return [None if grad is None else next(sums).view(grad.shape).to(grad.dtype) for grad in grads]
