"""One call as one thing: what it is about, its tensors, what forward leaves to backward, and the gradients wanted and computed.

Everything here is a named tuple of canonical tensors (see canonical.py), passed whole from the ops down to the kernels of every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax, alpha, lse and every accumulation: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sharing(NamedTuple):
    """Batch elements that share a mask: mask number n is read by the elements n * own_step + i * share_step, for i below sharers."""

    masks: int
    sharers: int
    own_step: int
    share_step: int


def remainder_dtype(dtype: torch.dtype) -> torch.dtype:
    """What holds the remainder of an output of this dtype, in as many bytes as the output."""
    return torch.int16 if dtype == torch.bfloat16 else dtype


REMAINDER_SCALE = 256  # else the remainder of a small float16 would be rounded to a multiple of 2^-24; a power of two rounds nothing


class Problem(NamedTuple):
    """Sizes, dtypes and flags of one call: all that a backend needs to say whether it can run the call, and how."""

    B: int
    H: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int  # 0 for an attention map, which has no value
    dtype: torch.dtype
    mask_dtype: torch.dtype | None
    mask_shape: tuple[int, int, int, int, int] | None  # (outer|1, inner|1, H|1, Nq|1, Nk) with outer * inner = B
    device_type: str
    has_padding: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    allow_tf32: bool = False
    mask_is_logits: bool = False

    @property
    def acc_dtype(self) -> torch.dtype:
        return acc_dtype(self.dtype)

    @property
    def inner_batch(self) -> int:
        """How many batch elements make one step along the first axis of the mask: batch element b reads its place (b // this, b % this)."""
        outer, inner, *_ = self.mask_shape or (1, 1)
        if inner > 1:
            return inner
        return self.B // outer if outer > 1 else 1

    @property
    def sharing(self) -> Sharing:
        """Which batch elements share a mask. Without a mask each has its own."""
        outer, inner, *_ = self.mask_shape or (self.B, 1)
        masks = outer * inner
        sharers = self.B // masks if masks > 0 else 0
        return Sharing(masks, sharers, sharers, 1) if inner == 1 else Sharing(masks, sharers, 1, masks)

    @property
    def is_empty(self) -> bool:
        """Whether the call has no scores at all."""
        return 0 in (self.B, self.Nq, self.Nk)


class Call(NamedTuple):
    """A problem and its tensors. Forward reads them all, and backward reads the same ones again."""

    problem: Problem
    query: Tensor  # (B, H, Nq, D)
    key: Tensor  # (B, Hkv, Nk, D)
    value: Tensor | None  # (B, Hkv, Nk, Dv); None for an attention map
    mask: Tensor | None  # (outer|1, inner|1, H|1, Nq|1, Nk), any strides and floating dtype: M, or logits if problem.mask_is_logits
    alpha: Tensor | None  # (H,) in the accumulation dtype, given exactly when mask is
    key_padding_mask: Tensor | None  # (B, Nk) bool, True = padding
    seed: Tensor | None = None  # (1,) int64, given exactly when problem.dropout_p > 0
    head_weights: Tensor | None = None  # (H,), contiguous, in the accumulation dtype; given exactly for an attention map


class Saved(NamedTuple):
    """What forward leaves to backward. Rows are in the accumulation dtype. All is contiguous when forward leaves it."""

    out: Tensor | None  # (B, H, Nq, Dv), the output; without it backward sums delta as P*dP, reference.py (5)
    remainder: Tensor | None  # what rounding took from out, see with_remainder; None where nothing was rounded
    lse: Tensor | None  # (B, H, Nq); forward leaves it always, and backward reads it where there is no normalizer
    mbar: Tensor | None  # (B, H, Nq), reference.py (8), for the gradient of alpha
    normalizer: Tensor | None  # m and 1/l of reference.py (2), with scores in base 2, (B, H, Nq, 2); see normalizer_shape

    def contiguous(self) -> Saved:
        """The same as the kernels in C++ read it, wherever it has been since forward."""
        return Saved(*(None if x is None else x.contiguous() for x in self))


def normalizer_shape(problem: Problem) -> tuple[int, ...] | None:
    """The shape of the normalizer in float32 and float64; None in 16 bits and TF32, where backward rebuilds P from lse.

    P = 2^(S - m) / l; in a dead row m and 1/l are +inf and 0. Rebuilt from lse, every P of a row is off by what rounding took from lse.
    Beside the roundings of 16 bits and TF32 that is nothing, but over thousands of keys of small scores it is more than the error budget.
    """
    is_exact = problem.dtype == problem.acc_dtype and not problem.allow_tf32
    return (problem.B, problem.H, problem.Nq, 2) if is_exact else None


def without_rounding(saved: Saved) -> Tensor:
    """The output in the accumulation dtype, from the first two fields of Saved."""
    assert saved.out is not None, "forward was not asked to save its output"
    out = saved.out.to(acc_dtype(saved.out.dtype))
    if saved.remainder is None:
        return out
    if saved.remainder.dtype == torch.int16:
        return (out.view(torch.int32) + saved.remainder).view(torch.float32)
    return out + saved.remainder.to(out.dtype) / REMAINDER_SCALE


def with_remainder(unrounded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The first two fields of Saved, from the output in the accumulation dtype.

    A bfloat16 is the upper half of a float32, so the distance of their bits fits in an int16, and the two are the float32 again. Only a tie
    that was rounded down is one more than an int16 holds. Of float16 it is REMAINDER_SCALE times the difference, in float16.
    """
    out = unrounded.to(dtype)
    if out.dtype == unrounded.dtype:
        return out, None
    if remainder_dtype(dtype) == torch.int16:
        distance = unrounded.view(torch.int32) - out.to(torch.float32).view(torch.int32)
        return out, distance.clamp(-(2**15), 2**15 - 1).to(torch.int16)
    return out, ((unrounded - out) * REMAINDER_SCALE).to(dtype)


class Needs(NamedTuple):
    """Which gradients are wanted. A backend computes no other."""

    query: bool
    key: bool
    value: bool
    mask: bool
    alpha: bool
    head_weights: bool = False


class Gradients(NamedTuple):
    """The gradients of one call, each in its input's shape and dtype, None where none is wanted."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None  # of mask_logits, where the call gives those
    alpha: Tensor | None = None
    head_weights: Tensor | None = None


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None = None,
    head_weights: Tensor | None = None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    allow_tf32: bool = False,
    mask_is_logits: bool = False,
) -> Call:
    """The call of canonical tensors that validate.py has accepted."""
    B, H, Nq, D = query.shape
    _, Hkv, Nk, _ = key.shape
    problem = Problem(
        B, H, Hkv, Nq, Nk, D,
        0 if value is None else value.shape[3],
        query.dtype,
        None if mask is None else mask.dtype,
        None if mask is None else tuple(mask.shape),  # type: ignore[arg-type]  # it has five axes
        query.device.type,
        key_padding_mask is not None,
        scale,
        dropout_p,
        allow_tf32,
        mask_is_logits,
    )  # fmt: skip
    return Call(problem, query, key, value, mask, alpha, key_padding_mask, seed, head_weights)
