"""Dice and cross-entropy of logits against the annotated frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def loss(logits: Tensor, mask: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and cross-entropy, each a scalar: logits (B, 1 + O, h, w) brought to the size of mask, one-hot (B, O, H, W).

    An object that this frame does not show, though the clip has it, is the cross-entropy's alone.
    """
    logits = F.interpolate(logits, mask.shape[-2:], mode="bilinear")
    index = torch.cat([1 - mask.sum(1, keepdim=True), mask], 1).argmax(1)
    return dice(logits.softmax(1)[:, 1:], mask, present & mask.flatten(2).any(-1)), F.cross_entropy(logits, index)


def dice(probability: Tensor, mask: Tensor, present: Tensor) -> Tensor:
    """1 - Dice, mean over the objects that are there (present, bool (B, O)); the background has none.

    An object missed entirely costs the full 1, whatever else is right, and its gradient is not 0: only the union is smoothed.
    """
    both = (probability * mask).sum((-2, -1))
    either = (probability + mask).sum((-2, -1))
    per_object = 1 - 2 * both / (either + 1e-6)
    return per_object[present].mean() if present.any() else probability.sum() * 0
