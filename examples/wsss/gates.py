"""Hard-Concrete gates (arXiv 1712.01312): each attention head has one, and the expected number of open gates is an L0 loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 0.33
LOW, HIGH = -0.1, 1.1  # the interval that the concrete variable is stretched to


class HardConcrete(nn.Module):
    """`count` gates, each 0 or 1. In training they are drawn and have the gradient of the stretched variable; in evaluation a gate is open
    where its log_a > 0.
    """

    def __init__(self, count: int, log_a: float) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.full((count,), log_a))

    def forward(self) -> Tensor:
        """The gates, (count,) zeros and ones."""
        if not self.training:
            return self.open().to(self.log_a.dtype)
        uniform = torch.rand_like(self.log_a).clamp(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((uniform.logit() + self.log_a) / TEMPERATURE)
        soft = (concrete * (HIGH - LOW) + LOW).clamp(0, 1)
        hard = (soft > 0.5).to(soft.dtype)
        return hard + soft - soft.detach()

    def open(self) -> Tensor:
        """Which gates are open in evaluation, bool (count,)."""
        return self.log_a > 0

    def expected_open(self) -> Tensor:
        """The expected number of gates that are not exactly 0."""
        return torch.sigmoid(self.log_a - TEMPERATURE * math.log(-LOW / HIGH)).sum()
