"""What a refused call probably meant: words in brackets for the end of its error, or none."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

SWAPPED = " (query and key look like (B, N, H, D): transpose axes 1 and 2)"
SHARED = " (to share it along the batch: {})"


def of_picture(name: str, mask: Tensor, keys: int) -> str:
    """For a mask that has the keys as a picture, (..., h, w) with h * w = Nk."""
    *_, height, width = (0, 0, *mask.shape)
    if mask.dim() < 3 or height * width != keys:
        return ""
    return f" (its last two axes hold {keys} keys: flatten them, by {name}.flatten(-2))"


def of_module_mask(mask: Tensor, keys: int) -> str:
    """For a module's mask without the batch axis, or with the keys as a picture."""
    return SHARED.format("mask[None]") if mask.dim() == 2 and mask.shape[-1] == keys else of_picture("mask", mask, keys)


def of_boolean_mask(name: str, mask: Tensor) -> str:
    """For a boolean mask, by the convention of scaled_dot_product_attention, whose True means that a key is attended."""
    if name != "mask" or mask.dtype != torch.bool:
        return ""
    bias = "torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)"
    return f" (where True is to be attended: {bias} with alpha=1; as a soft mask: mask.float())"


def of_missing_axes(name: str, mask: Tensor, query: Tensor, keys: int) -> str:
    """For a mask without the batch axes of query, or with the batch and the heads on one axis."""
    *batch, heads, rows, _ = query.shape
    *first, mask_rows, mask_keys = (1, 1, *mask.shape)[-3:]
    if mask.dim() not in (2, 3) or mask_rows not in (1, rows) or mask_keys != keys:
        return ""
    if mask.dim() == 2 or first == [heads]:
        return SHARED.format(f"{name}[{', '.join(['None'] * len(batch))}]")
    return f" (its first axis holds batch and heads: {name}.unflatten(0, {(*batch, heads)}))" if first == [prod(batch) * heads] else ""


def of_numbers(alpha: Any, heads: int) -> str:
    """For an alpha that is a list of numbers."""
    return f" (for a number a head: torch.tensor(alpha), of shape ({heads},))" if isinstance(alpha, (list, tuple)) else ""


def of_swapped_heads(query: Tensor, key: Tensor) -> str:
    """For a key with other heads than query: rows and heads changed places if the axis after them agrees and cannot be the rows."""
    (heads, rows), (key_heads, key_rows) = query.shape[-3:-1], key.shape[-3:-1]
    return SWAPPED if rows == key_rows and (heads % key_heads != 0 or heads > rows) else ""


def of_swapped_mask(mask: Tensor, query: Tensor, key: Tensor) -> str:
    """For a mask that would fit query and key with rows and heads in each other's place."""
    return SWAPPED if mask.dim() > 2 and mask.shape[-1] == key.shape[-3] and mask.shape[-2] in (1, query.shape[-3]) else ""


def of_swapped_padding(shape: Sequence[int], key: Tensor) -> str:
    """For a key padding mask that would fit keys with rows and heads in each other's place."""
    return SWAPPED if tuple(shape) == (*key.shape[:-3], key.shape[-3]) else ""
