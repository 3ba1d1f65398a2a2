"""Sizes and strengths, from those for one core and minutes to the paper's. They differ in values alone."""

from __future__ import annotations

from dataclasses import dataclass

from examples.shared.commands import SettingError


@dataclass(frozen=True)
class Config:
    size: int = 64  # images are resized to squares of this side
    patch: int = 8
    width: int = 96
    depth: int = 3
    heads: int = 6
    mlp: int = 2  # the hidden width as a multiple of the width
    register: bool = True  # one more token that belongs to no class
    timm: str | None = None  # a timm ViT of the same width, depth and patch whose weights to begin with
    masking_rate: float = 0.5  # of the tokens of absent classes, in training
    gates: bool = True  # a Hard-Concrete gate on every head
    sparsity: float = 0.01  # weight of the expected number of open heads
    gate_init: float = 1.0  # log_a of every gate at the start; a gate is open when it is above 0
    gate_lr: float = 10.0  # as a multiple of lr
    diversity: float = 0.1  # weight of the loss that keeps the maps of two classes apart
    batch: int = 32
    steps: int = 700
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 30  # steps of linear warm-up, after which a cosine decays to 0

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise SettingError(f"size: expected a multiple of the patch, {self.patch}, got {self.size}")
        if self.width % self.heads:
            raise SettingError(f"width: expected a multiple of the {self.heads} heads, got {self.width}")
        if not 0 <= self.masking_rate <= 1:
            raise SettingError(f"masking_rate: expected a probability in [0, 1], got {self.masking_rate}")

    @property
    def grid(self) -> int:
        """The number of patches on a side."""
        return self.size // self.patch


CONFIGS = {
    "small": Config(),
    "paper": Config(
        size=512, patch=16, width=768, depth=12, heads=16, mlp=4, timm="vit_base_patch16_224", batch=8, steps=40_000, lr=2e-5, warmup=1000,
    ),
}  # fmt: skip
