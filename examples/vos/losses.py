"""Dice and cross-entropy of logits against the annotated frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def loss(logits: Tensor, mask: Tensor, present: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dice and cross-entropy, two scalars, of logits (B, 1 + O, h, w) resized to mask, one-hot (B, O, H, W).

    Pixels that are not `known`, bool (B, H, W), count for nothing. An object of the clip that this frame does not show counts in the
    cross-entropy alone.
    """
    logits = F.interpolate(logits, mask.shape[-2:], mode="bilinear")
    index = torch.cat([1 - mask.sum(1, keepdim=True), mask], 1).argmax(1)
    probability, shown = logits.softmax(1)[:, 1:], present & mask.flatten(2).any(-1)
    if known is None:
        return dice(probability, mask, shown), F.cross_entropy(logits, index)
    cross_entropy = (F.cross_entropy(logits, index, reduction="none") * known).sum() / known.sum().clamp_min(1)
    return dice(probability * known[:, None], mask * known[:, None], shown), cross_entropy


def dice(probability: Tensor, mask: Tensor, present: Tensor) -> Tensor:
    """1 - Dice, averaged over the objects that are present, bool (B, O). The background does not count.

    An object missed entirely costs the full 1, whatever else is right, and its gradient is not 0, because only the union is smoothed.
    """
    both = (probability * mask).sum((-2, -1))
    either = (probability + mask).sum((-2, -1))
    per_object = 1 - 2 * both / (either + 1e-6)
    return per_object[present].mean() if present.any() else probability.sum() * 0
