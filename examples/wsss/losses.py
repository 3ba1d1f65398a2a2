"""What training minimises besides the number of open heads: wrong labels, and maps of two classes that overlap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def classification(logits: Tensor, present: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, C) against present, bool (B, C), as the mean over both axes."""
    return F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype))


def diversity(maps: Tensor) -> Tensor:
    """Mean square of the entries of R R^T - I, 0 when no two maps overlap. The rows of R are the maps (B, C, h, w), scaled to length 1."""
    rows = F.normalize(maps.flatten(2), dim=-1)
    overlap = rows @ rows.mT
    return (overlap - torch.eye(overlap.shape[-1], device=maps.device)).square().mean()
