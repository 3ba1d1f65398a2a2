"""The public functions: validate, bring the arguments into canonical form, call the operation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import ops
from .autograd import AttentionMap, SoftMaskedAttention, call, what_backward_reads
from .backends import resolve
from .problem import acc_dtype, describe, validate


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

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, Nk, D), query's dtype. H % Hkv == 0.
        value: (B, Hkv, Nk, Dv), query's dtype. Dv may differ from D.
        mask: soft mask M, usually in [0, 1] (not checked): (B|1, Nq|1, Nk), shared by all heads, or (B|1, H|1, Nq|1, Nk); any floating
            dtype, any strides. Broadcasting is by size-1 axes, over which its gradient is summed; an expanded mask has an expanded one.
            Prefer float32: with alpha = 32 a bfloat16 mask near 1 moves a logit by 0.125.
        alpha: how strongly each head follows the mask, in logits: a float, or a tensor of shape () or (H,). Given exactly when M is.
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
        NotImplementedError: second derivatives but by backend="reference", forward-mode differentiation.

    Deterministic: the same inputs give the same bits, forward and backward. Dropout draws one int64 from torch's generator per call.
    """
    query, key, value = _autocast(query, key, value)
    validate(
        query, key, value, mask, alpha, mask_logits=mask_logits, scale=scale, dropout_p=dropout_p,
        key_padding_mask=key_padding_mask, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    alpha_h = _per_head(alpha, query)
    out, lse = call(
        SoftMaskedAttention, query, key, value, _four_axes(mask), _four_axes(mask_logits), alpha_h, key_padding_mask,
        _seed(query, key, value, mask, mask_logits, key_padding_mask, dropout_p, backend) if dropout_p > 0 else None,
        query.shape[3] ** -0.5 if scale is None else float(scale), float(dropout_p),
        _allow_tf32(query), *what_backward_reads(query, key, mask, mask_logits, alpha_h), backend or "", op=ops.forward,
    )[:2]  # fmt: skip
    return (out, lse) if return_lse else out


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
    query, key = _autocast(query, key)
    validate(
        query, key, None, mask, alpha, mask_logits=mask_logits, head_weights=head_weights, scale=scale,
        key_padding_mask=key_padding_mask, enable_gqa=enable_gqa, backend=backend, is_map=True,
    )  # fmt: skip
    H = query.shape[1]
    weights = _per_head(1.0 / H if head_weights is None else head_weights, query)
    result: Tensor = call(
        AttentionMap, query, key, _four_axes(mask), _four_axes(mask_logits), _per_head(alpha, query), weights, key_padding_mask,
        query.shape[3] ** -0.5 if scale is None else float(scale), _allow_tf32(query), backend or "", op=ops.attention_map,
    )[0]  # fmt: skip
    return result


def draw_seed(device: torch.device) -> Tensor:
    """One call's dropout seed, int64 (1,), from torch's generator: a tensor, so that compile, checkpointing and CUDA graphs replay it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _seed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_logits: Tensor | None,
    key_padding_mask: Tensor | None, dropout_p: float, backend: str | None,
) -> Tensor:  # fmt: skip
    """draw_seed, but a backend that was named and cannot run the call refuses before the generator has moved."""
    if backend and not torch.compiler.is_compiling():
        masks = (_four_axes(mask), _four_axes(mask_logits))
        resolve(describe(query, key, value, *masks, key_padding_mask, 1.0, float(dropout_p), False), backend, "forward")
    return draw_seed(query.device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the autocast dtype of the first one's device, where autocast is on; anything that it does not cast as it is."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else ""
    if not kind or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == kind else t
        for t in tensors
    )


def _four_axes(mask: Tensor | None) -> Tensor | None:
    return mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask


def _per_head(scalars: float | Tensor | None, query: Tensor) -> Tensor | None:
    """alpha or head_weights as (H,) in the accumulation dtype."""
    if scalars is None:
        return None
    acc = acc_dtype(query.dtype)
    if isinstance(scalars, Tensor) and scalars.dim() == 1 and scalars.dtype == acc:
        return scalars  # neither view nor cast, which autograd would have to undo
    if not isinstance(scalars, Tensor):
        return torch.full((query.shape[1],), scalars, dtype=acc, device=query.device)
    return scalars.to(acc).expand(query.shape[1])


def _allow_tf32(query: Tensor) -> bool:
    """Whether float32 products may be TF32: read once a call, backward uses forward's."""
    return query.device.type == "cuda" and query.dtype == torch.float32 and _torch_allows_tf32()


def _torch_allows_tf32() -> bool:
    # not allow_tf32: that one raises once the setting was made by its newer name, fp32_precision
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


# Dynamo cannot trace the getter, but guards on what it reads. The mark is what torch.compiler.assume_constant_result sets; that
# would import Dynamo, and Triton with it, wherever smattn is imported.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
