"""Hard-Concrete gates: one on each attention head, and the expected number of them that are open as a loss (L0, arXiv 1712.01312)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1  # and the interval that the concrete variable is stretched to


class HardConcrete(nn.Module):
    """`count` gates, each 0 or 1: drawn in training, with the gradient of the stretched variable; open in evaluation where log_a > 0."""

    def __init__(self, count: int, log_a: float) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.full((count,), log_a))

    def forward(self) -> Tensor:
        """(count,) of zeros and ones."""
        if not self.training:
            return self.open().to(self.log_a.dtype)
        uniform = torch.rand_like(self.log_a).clamp(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((uniform.logit() + self.log_a) / TEMPERATURE)
        soft = (concrete * (HIGH - LOW) + LOW).clamp(0, 1)
        hard = (soft > 0.5).to(soft.dtype)
        return hard + soft - soft.detach()

    def open(self) -> Tensor:
        """bool (count,)."""
        return self.log_a > 0

    def expected_open(self) -> Tensor:
        """The sum of the probabilities of not being exactly 0."""
        return torch.sigmoid(self.log_a - TEMPERATURE * math.log(-LOW / HIGH)).sum()
