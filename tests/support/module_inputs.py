"""Small inputs for the modules of smattn.nn."""

from __future__ import annotations

import torch

B, NQ, NK, WIDTH = 2, 5, 23, 32


def tensors(width=WIDTH, rng=0):
    """query (B, Nq, width), features (B, Nk, width) and a mask (B, Nq, Nk)."""
    g = torch.Generator().manual_seed(rng)
    return (
        torch.randn(B, NQ, width, generator=g),
        torch.randn(B, NK, width, generator=g),
        torch.rand(B, NQ, NK, generator=g).requires_grad_(),
    )
