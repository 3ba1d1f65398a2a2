"""The network. A frame and its soft masks become descriptors, and the descriptors of past frames become the masks of another frame.

An object has the same number in all frames. Clips of a batch that have fewer objects are filled up, and `present`, (B, O), tells which
objects there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smattn
from smattn.nn import Masking, SoftMaskedTransformerLayer

from .backbone import FeaturePyramid
from .config import Config

GRID = 3  # The background has a descriptor for each cell of a GRID x GRID grid.
CELLS = GRID * GRID


class Frame(NamedTuple):
    coarse: Tensor  # (B, C, H/s, W/s), where s is the configuration's stride
    fine: Tensor  # (B, C, 2H/s, 2W/s)


class VOS(nn.Module):
    """The whole network. masking: how the encoder's attention takes the masks."""

    def __init__(self, config: Config, masking: Masking = "soft") -> None:
        super().__init__()
        C = config.width
        self.pyramid = FeaturePyramid(config)
        self.kind = nn.Parameter(torch.randn(CELLS + 1, C) * C**-0.5)  # nine for the background, one that all objects share
        self.encoder = nn.ModuleList(
            SoftMaskedTransformerLayer(C, config.heads, dropout=config.dropout, alpha_init=config.alpha_init, masking=masking)
            for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(DecoderLayer(C, config.heads, config.dropout) for _ in range(config.decoder_layers))
        self.fuse = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(8, C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1))
        self.norm = nn.LayerNorm(C)
        self.classifier = nn.Linear(C, C)
        nn.init.eye_(self.classifier.weight)  # Descriptors begin as means of features, so matching starts from similarity.
        self.elsewhere = nn.Parameter(torch.randn(C) * C**-0.5)  # the background's catch-all channel

    def features(self, image: Tensor) -> Frame:
        """The feature maps of images (B, 3, H, W) in [0, 1]."""
        return Frame(*self.pyramid(image))

    def encode(self, frame: Frame, masks: Tensor, present: Tensor) -> Tensor:
        """Descriptors (B, 9 + O, C) of a frame under soft masks (B, O, h, w) of any size."""
        masks = F.interpolate(masks, frame.coarse.shape[-2:], mode="bilinear", antialias=True)
        background = (1 - masks.sum(1, keepdim=True)).clamp_min(0)
        soft = torch.cat([background * grid_cells(masks), masks], 1).flatten(2)  # (B, 9 + O, N)
        features = frame.coarse.flatten(2).mT  # (B, N, C)
        descriptors = mean_inside(features, soft)
        kind = torch.cat([self.kind[:CELLS], self.kind[CELLS:].expand(masks.shape[1], -1)])
        for layer in self.encoder:
            descriptors = layer(descriptors, features, soft, query_pos=kind, query_padding_mask=absent(present))
        return descriptors

    def decode(self, memory: list[Tensor], present: Tensor, frame: Frame) -> Tensor:
        """Logits (B, 1 + O, 2H/s, 2W/s), background first, from the descriptors of one or more other frames."""
        descriptors = torch.cat(memory, 1)  # (B, T * (9 + O), C)
        padding = absent(present).repeat(1, len(memory))
        is_object = (torch.arange(CELLS + present.shape[1], device=present.device) >= CELLS).repeat(len(memory))
        x = frame.coarse
        for layer in self.decoder:
            x = layer(x, descriptors, is_object, padding)
        x = F.interpolate(x, frame.fine.shape[-2:], mode="bilinear") + frame.fine
        pixels = self.norm((x + self.fuse(x)).movedim(1, -1))  # (B, h, w, C)
        channels = self.classifier(torch.stack(memory, 1))  # (B, T, 9 + O, C)
        logits = torch.einsum("btoc,bhwc->btohw", channels, pixels).amax(1) / pixels.shape[-1] ** 0.5
        elsewhere = (pixels @ self.elsewhere)[:, None]
        background = torch.cat([elsewhere, logits[:, :CELLS]], 1).amax(1, keepdim=True)
        objects = logits[:, CELLS:].masked_fill(~present[:, :, None, None], NEVER)
        return torch.cat([background, objects], 1)


NEVER = -1e4  # a finite logit that never wins


class DecoderLayer(nn.Module):
    """A post-norm layer for pixels: a residual convolution, attention to the descriptors, feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.convolution = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.kv_object, self.kv_background = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, descriptors: Tensor, is_object: Tensor, padding: Tensor) -> Tensor:
        """x (B, C, h, w), descriptors (B, K, C), is_object bool (K,) and padding bool (B, K) give a new x."""
        pixels = (x + self.convolution(x)).flatten(2).mT  # (B, N, C)
        kv = torch.where(is_object[:, None], self.kv_object(descriptors), self.kv_background(descriptors))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q_proj(pixels), *kv.chunk(2, -1)))
        dropout_p = self.dropout if self.training else 0.0
        read = smattn.soft_masked_attention(q, k, v, dropout_p=dropout_p, key_padding_mask=padding)
        pixels = self.norms[0](pixels + self.out_proj(read.transpose(1, 2).flatten(-2)))
        pixels = self.norms[1](pixels + self.feed_forward(pixels))
        return pixels.mT.unflatten(-1, x.shape[-2:])


def mean_inside(features: Tensor, masks: Tensor) -> Tensor:
    """The mean (B, K, C) of the features (B, N, C) where the masks (B, K, N) exceed 0.5.

    Where a mask nowhere exceeds 0.5 it is the mean weighted by the mask, and where that is 0 the mean of all. No gradient reaches the masks
    here: it comes through the attention or not at all.
    """
    masks = masks.detach()
    inside = (masks > 0.5).to(masks.dtype)
    weights = torch.where(inside.any(-1, keepdim=True), inside, masks + 1e-6)
    return (weights / weights.sum(-1, keepdim=True)) @ features


def grid_cells(masks: Tensor) -> Tensor:
    """Which of the 9 cells each pixel is in, one-hot (9, h, w)."""
    h, w = masks.shape[-2:]
    row, column = (torch.arange(side, device=masks.device) * GRID // side for side in (h, w))
    cell = row[:, None] * GRID + column
    return F.one_hot(cell, CELLS).movedim(-1, 0).to(masks.dtype)


def absent(present: Tensor) -> Tensor:
    """Which descriptors stand for no object, bool (B, 9 + O): those of objects that are not present."""
    return F.pad(~present, (CELLS, 0), value=False)
