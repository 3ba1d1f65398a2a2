"""A vision transformer with a token for every class, whose attention to the patches is the class's map.

Tokens are [C classes | P patches | register]. No layer stacks attention matrices: the rows of the class tokens, summed over the open heads,
come from smattn.attention_map, beside the main call. Parameters have timm's names, so that its weights load (pretrained.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import smattn

from .config import Config
from .gates import HardConcrete


class Output(NamedTuple):
    logits: Tensor  # (B, C)
    maps: Tensor | None  # (B, C, side, side): attention of class tokens to patches, mean over open heads, sum over layers


class ViT(nn.Module):
    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        width = config.width
        self.config, self.classes = config, classes
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, width, config.patch, config.patch))
        self.extra_tokens = nn.Parameter(torch.randn(classes + config.register, width) * 0.02)  # position included: each has its own
        self.pos_embed = nn.Parameter(torch.randn(config.grid**2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(classes * width, classes)  # every logit can read every class token: hence the masking

    def forward(self, image: Tensor, present: Tensor | None = None, with_maps: bool = True, all_heads: bool = False) -> Output:
        """image (B, 3, size, size) in [0, 1]; present bool (B, C), needed in training; all_heads: closed ones count in the maps too."""
        B, C, config = len(image), self.classes, self.config
        patches = self.patch_embed(2 * image - 1).flatten(2).mT + self.pos_embed
        extra = self.extra_tokens.expand(B, -1, -1)
        x = torch.cat([extra[:, :C], patches, extra[:, C:]], 1)
        maps = None
        for block in self.blocks:
            x, rows = block(x, C if with_maps else 0, all_heads)
            maps = rows if maps is None else maps + rows
        classes = self.norm(x[:, :C])
        if self.training:
            if present is None:
                raise ValueError("present: expected bool (B, C) in training, got None")
            classes = masked(classes, present, config.masking_rate)
        assert maps is not None
        shaped = maps[:, :, C : C + config.grid**2].unflatten(-1, (config.grid, config.grid)) if with_maps else None
        return Output(self.head(classes.flatten(1)), shaped)

    def expected_open(self) -> Tensor:
        """The number of heads that the penalty counts, all layers together."""
        expected = [module.expected_open() for module in self.modules() if isinstance(module, HardConcrete)]
        return torch.stack(expected).sum() if expected else self.head.weight.new_zeros(())

    def open_heads(self) -> list[int]:
        """In each layer."""
        layers = [module for module in self.modules() if isinstance(module, Attention)]
        return [layer.heads if layer.gates is None else int(layer.gates.open().sum()) for layer in layers]


def masked(tokens: Tensor, present: Tensor, rate: float) -> Tensor:
    """Class tokens (B, C, width) with those of absent classes set to 0 at random; tokens of present classes stay."""
    keep = present | (torch.rand(present.shape, device=present.device) >= rate)
    return tokens * keep[..., None]


class Block(nn.Module):
    """Pre-norm, as in timm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(config)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, config.mlp * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(config.mlp * width, width))

    def forward(self, x: Tensor, rows: int, all_heads: bool) -> tuple[Tensor, Tensor]:
        attended, maps = self.attn(self.norm1(x), rows, all_heads)
        x = x + attended
        return x + self.mlp(self.norm2(x)), maps


class Attention(nn.Module):
    """Self-attention whose heads have gates, and the map of its first tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.gates = HardConcrete(config.heads, config.gate_init) if config.gates else None

    def forward(self, x: Tensor, rows: int, all_heads: bool) -> tuple[Tensor, Tensor]:
        """x (B, N, width) to the same, and the map (B, rows, N): the mean over open heads, 0 where none is."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D), not copied
        gates = x.new_ones(self.heads) if self.gates is None else self.gates()
        out = smattn.soft_masked_attention(query, key, value) * gates[:, None, None]
        weights = torch.ones_like(gates) if all_heads else gates
        maps = smattn.attention_map(query[:, :, :rows], key, head_weights=weights / weights.sum().clamp_min(1))
        return self.proj(out.transpose(1, 2).flatten(2)), maps
