"""Sizes, from two cores and minutes to the papers': values, not other code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    backbone: str = "small"  # or any name that timm.create_model(features_only=True) knows, if timm is installed
    pretrained: bool = False  # timm's weights; "small" has none
    width: int = 32  # C: of descriptors and of both feature maps
    stride: int = 4  # of the features that descriptors read; masks are predicted at half of it
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    dropout: float = 0.0
    alpha_init: float | tuple[float, ...] | None = None  # None: HODOR's pattern
    height: int | None = None  # frames are resized to this height, width to scale, both to multiples of 8; None: as they are
    batch: int = 4  # clips a step
    steps: int = 240
    lr: float = 3e-3
    alpha_lr: float = 1e-2
    weight_decay: float = 1e-4
    warmup: int = 20  # steps of linear warm-up; cosine decay to 0 after
    cycles_from: float = 0.5  # share of the steps that see frame 0 alone: masks must be some good before a cycle can better them
    history: int = 7  # past frames that inference keeps, besides the annotated one


CONFIGS = {
    "small": Config(),
    "clip": Config(height=128, batch=2, steps=160),  # one real clip on two cores
    "figure": Config(height=64, batch=2, steps=160),  # the same for smaller pictures, to choose by
    "paper": Config(
        backbone="swin_tiny_patch4_window7_224", pretrained=True, width=256, stride=8, heads=8, encoder_layers=5, decoder_layers=5,
        dropout=0.1, height=480, batch=8, steps=20_000, lr=1e-4, alpha_lr=1e-2, weight_decay=0.05, warmup=1000,
    ),
}  # fmt: skip
