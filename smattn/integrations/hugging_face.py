"""smattn's attention in every Hugging Face model that takes another implementation, by `attn_implementation="smattn"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import soft_masked_attention

NAME = "smattn"
UNSUPPORTED = ("softcap", "s_aux", "sinks", "output_attentions")  # what some models want of their attention beside masks and biases


def register_transformers() -> None:
    """Make "smattn" an attention implementation of transformers, for models that are made after this call.

        smattn.integrations.register_transformers()
        model = AutoModel.from_pretrained(name, attn_implementation="smattn")

    Masks, boolean or added, causal attention, grouped heads and position biases mean what they mean in transformers' "sdpa". A query that
    may attend to no key gives zeros, where "eager" gives the mean of all values. What a layer wants beside that is a ValueError when it
    runs: softcap (Gemma 2), sinks (GPT-OSS), output_attentions. Layers that do not ask transformers for an implementation keep their own,
    though their models may take the name: Mask2Former's decoder (see soften_mask2former), Bloom, XLNet, DeBERTa.

    Raises:
        ImportError: transformers is not installed, or is older than 5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, boolean_mask)


def boolean_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """transformers' boolean mask (B, 1, Nq, Nk), True = attend. None stands for a mask that rules nothing out, never for a causal one."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*arguments, **options | {"allow_is_causal_skip": False})
    return mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the layer, whose is_causal counts where the argument is None, as in "sdpa".
        query: (B, H, Nq, D). Its batch may be 1 where that of key is not.
        key, value: (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv).
        attention_mask: (B|1, H|1, Nq|1, Nk), bool with True = attend, or floating and added to the scores.
        scaling: factor on Q K^T, 1/sqrt(D) unless given.
        dropout: probability of dropping an attention weight; models give 0 in evaluation.
        is_causal: whether a query attends to no later key, where there is no attention_mask.
        position_bias: floating, added to the scores, in the shapes of attention_mask.
        options: anything else that a model passes. UNSUPPORTED among them are refused, and others have no effect.

    Returns:
        (B, Nq, H, Dv), and None in the place of the weights.

    Raises:
        ValueError: an option is not supported, or as in smattn.soft_masked_attention.
    """
    for name in UNSUPPORTED:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name}: expected none with attn_implementation={NAME!r}, got one")
    if query.shape[0] != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries that all images share
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    padding, mask = None, attention_mask
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        padding, mask = _read(attention_mask, query, key)
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    out = soft_masked_attention(
        query, key, value, mask, None if mask is None else 1.0,
        scale=scaling, dropout_p=dropout, key_padding_mask=padding, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _read(attended: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A boolean mask as (padding, None) where it is the same for all heads and queries, or else as (None, what is added to the scores)."""
    is_of_keys = attended.shape[1] == 1 and (attended.shape[2] == 1 or attended.stride(2) == 0)
    if is_of_keys:
        return ~attended[:, 0, 0].expand(key.shape[0], -1), None
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return None, torch.where(attended, zero, float("-inf"))
