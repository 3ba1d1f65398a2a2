"""The public functions: each validates its arguments, brings them into canonical form and calls its operation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import ops
from .autograd import AttentionMap, SoftMaskedAttention, apply, outputs_to_save
from .backends import resolve
from .canonical import allow_tf32, alpha_of, autocast, draw_seed, five_axes, of_batch, one_batch_axis, per_head, scale_of
from .validate import validate


@overload
def soft_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = ..., alpha: float | Tensor | None = ..., *,
    mask_logits: Tensor | None = ..., scale: float | None = ..., dropout_p: float = ..., key_padding_mask: Tensor | None = ...,
    enable_gqa: bool = ..., return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def soft_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = ..., alpha: float | Tensor | None = ..., *,
    mask_logits: Tensor | None = ..., scale: float | None = ..., dropout_p: float = ..., key_padding_mask: Tensor | None = ...,
    enable_gqa: bool = ..., return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def soft_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    alpha: float | Tensor | None = None,
    *,
    mask_logits: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a continuous mask, softmax(scale * Q K^T + alpha_h * M) V, differentiable in Q, K, V, M and alpha.

    Soft-masked attention of arXiv 2206.00182 (section 3); equations (1)-(8) of smattn/reference.py.

    In place of B there may be several batch axes, the same in every tensor, and the mask's may have size 1 along any of them: a bias that N
    rows of B pictures share is (B, 1, H, Nq, Nk) beside a query (B, N, H, Nq, D). It is neither expanded nor copied for that.

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, Nk, D), query's dtype. H % Hkv == 0.
        value: (B, Hkv, Nk, Dv), query's dtype. Dv may differ from D.
        mask: soft mask M, usually in [0, 1] (not checked): (B|1, Nq|1, Nk), shared by all heads, or (B|1, H|1, Nq|1, Nk); any floating
            dtype, any strides. Broadcasting is by size-1 axes, over which its gradient is summed; an expanded mask has an expanded one.
            Prefer float32: with alpha = 32 a bfloat16 mask near 1 moves a logit by 0.125.
        alpha: how strongly each head follows the mask, in logits: a float, or a tensor of shape () or (H,); 1 unless given. Finite: an
            infinite one may leave NaN in any gradient. Refused where there is no mask.
            Pass a tensor for what changes: torch.compile makes a new graph for each float, here and in scale and dropout_p.
        mask_logits: instead of mask, of the same shapes and dtypes: M = sigmoid(mask_logits), held nowhere on the CPU, nor on a GPU for up
            to 128 queries.
        scale: factor on Q K^T, 1/sqrt(D) unless given. A score past 2.3e38 (1.2e308 in float64) may count as infinite: kept in base 2.
        dropout_p: probability, in [0, 1), of dropping an attention weight; the others are scaled by 1/(1 - dropout_p).
        key_padding_mask: bool (B, Nk), True = padding, not attended (nn.MultiheadAttention's convention). Padded keys may hold NaN;
            a query with no key left gives zeros, lse = -inf and zero gradients.
        enable_gqa: allow fewer heads in key and value than in query.
        return_lse: also return the logsumexp of the scores.
        backend: "triton", "cuda", "cpu" or "reference", used or refused, never replaced; None takes the best that can run the call.

    Returns:
        (B, H, Nq, Dv) in query's dtype; with return_lse also (B, H, Nq), natural logarithm, differentiable, in float32 or float64.
        Under autocast q, k, v that are floating and not float64 are cast to the autocast dtype, the output's dtype; mask and alpha are not.

    Raises:
        TypeError, ValueError: an argument is not as above (the message names it), or the backend asked for cannot run the call.
        NotImplementedError: second derivatives, except with backend="reference"; forward-mode differentiation.

    Deterministic: the same inputs give the same bits, forward and backward. Dropout draws one int64 from torch's generator per call.
    """
    query, key, value = autocast(query, key, value)
    validate(
        query, key, value, mask, alpha, mask_logits=mask_logits, scale=scale, dropout_p=dropout_p,
        key_padding_mask=key_padding_mask, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    batch = query.shape[:-3]
    query, key, value = (one_batch_axis(tensor, 3) for tensor in (query, key, value))
    alpha_h = per_head(alpha_of(alpha, mask, mask_logits), query)
    save_out, save_mbar = outputs_to_save(query, key, mask, mask_logits, alpha_h)
    arguments = ops.ForwardArguments(
        query=query,
        key=key,
        value=value,
        mask=five_axes(mask, batch),
        mask_logits=five_axes(mask_logits, batch),
        alpha=alpha_h,
        key_padding_mask=one_batch_axis(key_padding_mask, 1),
        seed=None,
        scale=scale_of(scale, query),
        dropout_p=float(dropout_p),
        allow_tf32=allow_tf32(query),
        save_out=save_out,
        save_mbar=save_mbar,
        backend=backend or "",
    )
    if dropout_p > 0:
        if backend and not torch.compiler.is_compiling() and not query.is_meta:
            resolve(ops.attention_call(arguments).problem, backend, "forward")  # refuses before the generator has moved
        arguments = arguments._replace(seed=draw_seed(query.device))
    out, lse, *_ = apply(SoftMaskedAttention, ops.forward, arguments)
    out = of_batch(out, batch)
    return (out, of_batch(lse, batch)) if return_lse else out


def attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    alpha: float | Tensor | None = None,
    *,
    mask_logits: Tensor | None = None,
    head_weights: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The attention probabilities summed over heads with weights, differentiable in every float input.

    Equations (9), (10) of smattn/reference.py; the class-token maps of arXiv 2507.06848 are its rows.

    Pass only the query rows you want (a ViT's class tokens, say): the result is (B, Nq, Nk), whatever the number of heads.

    Args:
        query, key, mask, alpha, mask_logits, scale, key_padding_mask, enable_gqa, backend: as in soft_masked_attention.
        head_weights: (H,), floating, any sign; 1/H each unless given.

    Returns:
        (B, Nq, Nk) float32 (float64 for float64 inputs), zero at padded keys; never autocast.

    Raises:
        TypeError, ValueError, NotImplementedError: as soft_masked_attention.
    """
    query, key = autocast(query, key)
    validate(
        query, key, None, mask, alpha, mask_logits=mask_logits, head_weights=head_weights, scale=scale,
        key_padding_mask=key_padding_mask, enable_gqa=enable_gqa, backend=backend, is_map=True,
    )  # fmt: skip
    batch = query.shape[:-3]
    query, key = one_batch_axis(query, 3), one_batch_axis(key, 3)
    arguments = ops.MapArguments(
        query=query,
        key=key,
        mask=five_axes(mask, batch),
        mask_logits=five_axes(mask_logits, batch),
        alpha=per_head(alpha_of(alpha, mask, mask_logits), query),
        head_weights=per_head(1.0 / query.shape[1] if head_weights is None else head_weights, query),
        key_padding_mask=one_batch_axis(key_padding_mask, 1),
        scale=scale_of(scale, query),
        allow_tf32=allow_tf32(query),
        backend=backend or "",
    )
    result: Tensor = apply(AttentionMap, ops.attention_map, arguments)[0]
    return of_batch(result, batch)
