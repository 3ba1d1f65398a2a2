"""A vision transformer with a token for every class, whose attention to the patches is the class's map.

The tokens are [C classes | P patches | register]. No layer stacks attention matrices: smattn.attention_map gives the rows of the class
tokens, averaged over the open heads, beside the main call. Parameters have timm's names, so that its weights load (pretrained.py).
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
    maps: Tensor | None  # (B, C, side, side): attention of class tokens to patches, averaged over open heads and summed over layers


class ViT(nn.Module):
    """The transformer for `classes` classes."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        width = config.width
        self.config, self.classes = config, classes
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, width, config.patch, config.patch))
        self.extra_tokens = nn.Parameter(torch.randn(classes + config.register, width) * 0.02)  # A token's position is part of it.
        self.pos_embed = nn.Parameter(torch.randn(config.grid**2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(classes * width, classes)  # Every logit can read every class token, which is why tokens are masked.

    def forward(self, image: Tensor, present: Tensor | None = None, with_maps: bool = True, all_heads: bool = False) -> Output:
        """image (B, 3, size, size) in [0, 1]; present bool (B, C), needed in training; all_heads: closed heads count in the maps too."""
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
        """The number of open heads that the penalty counts, over all layers."""
        expected = [module.expected_open() for module in self.modules() if isinstance(module, HardConcrete)]
        return torch.stack(expected).sum() if expected else self.head.weight.new_zeros(())

    def open_heads(self) -> list[int]:
        """The number of open heads in each layer."""
        layers = [module for module in self.modules() if isinstance(module, Attention)]
        return [layer.heads if layer.gates is None else int(layer.gates.open().sum()) for layer in layers]


def masked(tokens: Tensor, present: Tensor, rate: float) -> Tensor:
    """Set class tokens (B, C, width) of absent classes to 0 at random, with probability `rate`. Those of present classes stay."""
    keep = present | (torch.rand(present.shape, device=present.device) >= rate)
    return tokens * keep[..., None]


class Block(nn.Module):
    """A pre-norm layer, as in timm."""

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
    """Self-attention whose heads have gates, with the map of its first tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.gates = HardConcrete(config.heads, config.gate_init) if config.gates else None

    def forward(self, x: Tensor, rows: int, all_heads: bool) -> tuple[Tensor, Tensor]:
        """The attended x, (B, N, width) as x itself, and the map (B, rows, N), the mean over open heads, or 0 where no head is open."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # Each is a view, (B, H, N, D).
        gates = x.new_ones(self.heads) if self.gates is None else self.gates()
        out = smattn.soft_masked_attention(query, key, value) * gates[:, None, None]
        weights = torch.ones_like(gates) if all_heads else gates
        maps = smattn.attention_map(query[:, :, :rows], key, head_weights=weights / weights.sum().clamp_min(1))
        return self.proj(out.transpose(1, 2).flatten(2)), maps
