"""Triangle attention, as models of protein structure have it, with the arguments of cuEquivariance's function of this name."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..attention import soft_masked_attention
from ..validate import fits

Auxiliary = tuple[Tensor, Tensor, None]


@overload
def triangle_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = ..., scale: float | None = ..., return_aux: Literal[False] = ...
) -> Tensor: ...


@overload
def triangle_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = ..., scale: float | None = ..., *, return_aux: Literal[True]
) -> Auxiliary: ...


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
) -> Tensor | Auxiliary:
    """Attention of each of N rows under one bias that the rows share: softmax(scale * Q K^T + bias) V.

    Triangle attention of AlphaFold 2 (Jumper et al., 2021, supplement, algorithms 13 and 14); equations (1)-(8) of smattn/reference.py with
    M = bias and alpha = 1. The bias is read in place, once for all rows, and its gradient is summed over the rows in a fixed order.

    Args:
        q: (B, N, H, Q, D), float16, bfloat16, float32 or float64, any B, N, Q and K. For B = 1 the batch axis may be left out,
            here and below.
        k, v: (B, N, H, K, D).
        bias: (B, 1, H, Q, K), any floating dtype; it is not cast.
        mask: bool (B, N, 1, 1, K), True = keep. None keeps every key.
        scale: factor on Q K^T, 1/sqrt(D) unless given.
        return_aux: also return the logsumexp of each row.

    Returns:
        (B, N, H, Q, D), q's dtype; a row whose keys are all masked is zeros, and so are its gradients. With return_aux also the logsumexp,
        (B, N, H, Q, 1) float32 (float64 for float64), differentiable, -inf for such a row; and None in the place of the rows' maximum,
        which no kernel here keeps.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v), ("bias", bias), *([] if mask is None else [("mask", mask)])):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if mask is not None and not fits(mask.shape, (*k.shape[:-3], 1, 1, k.shape[-2])):
        raise ValueError(f"mask: expected (B, N, 1, 1, K) = {(*k.shape[:-3], 1, 1, k.shape[-2])}, got {tuple(mask.shape)}")
    padding = None if mask is None else ~mask[..., 0, 0, :].bool()
    out, lse = soft_masked_attention(q, k, v, bias, 1.0, scale=scale, key_padding_mask=padding, return_lse=True)
    return (out, lse[..., None], None) if return_aux else out
