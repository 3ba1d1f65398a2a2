"""What training minimises: labels told right, few heads, and maps of classes that do not lie on one another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def classification(logits: Tensor, present: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, C) against present bool (B, C), mean over both."""
    return F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype))


def diversity(maps: Tensor) -> Tensor:
    """Mean square of the entries of C C^T - I, the rows of C the maps (B, C, h, w) scaled to length 1: 0 when no two overlap."""
    rows = F.normalize(maps.flatten(2), dim=-1)
    overlap = rows @ rows.mT
    return (overlap - torch.eye(overlap.shape[-1], device=maps.device)).square().mean()
