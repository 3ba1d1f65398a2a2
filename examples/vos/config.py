"""Sizes, from those for two cores and minutes to the papers'. They differ in values alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    backbone: str = "small"  # or a name that timm.create_model(features_only=True) knows, where timm is installed
    pretrained: bool = False  # timm's weights, which "small" does not have
    width: int = 32  # C, of descriptors and of both feature maps
    stride: int = 4  # of the features that descriptors read; masks are predicted at half this stride
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    dropout: float = 0.0
    alpha_init: float | tuple[float, ...] | None = None  # None stands for HODOR's pattern.
    height: int | None = None  # Frames are resized to this height, both sides to multiples of 8; None keeps their size.
    batch: int = 4  # clips a step
    steps: int = 240
    lr: float = 3e-3
    alpha_lr: float = 1e-2
    weight_decay: float = 1e-4
    warmup: int = 20  # steps of linear warm-up, after which a cosine decays to 0
    cycles_from: float = 0.5  # The steps before this share of them see frame 0 alone: a cycle betters only masks that are some good.
    history: int = 7  # the past frames that inference keeps besides the annotated one


CONFIGS = {
    "small": Config(),
    "clip": Config(height=128, batch=2, steps=160),  # for one real clip on two cores
    "figure": Config(height=64, batch=2, steps=160),  # for smaller pictures, by which the choice was made
    "paper": Config(
        backbone="swin_tiny_patch4_window7_224", pretrained=True, width=256, stride=8, heads=8, encoder_layers=5, decoder_layers=5,
        dropout=0.1, height=480, batch=8, steps=20_000, lr=1e-4, alpha_lr=1e-2, weight_decay=0.05, warmup=1000,
    ),
}  # fmt: skip
