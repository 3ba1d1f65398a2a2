"""Where a layer of soft-masked attention looks."""

from __future__ import annotations

import torch
from torch import Tensor

import smattn
from smattn.nn import SoftMaskedAttention


@torch.no_grad()
def layer_map(layer: SoftMaskedAttention, query: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """The attention probabilities (B, Nq, Nk), mean over heads, of the layer's call with these queries, features as keys, and mask."""
    q, k = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (layer.q_proj(query), layer.k_proj(features)))
    return smattn.attention_map(q, k, mask, layer.scaling_factors)
