"""Training batches: three frames of a clip, the first annotated, flipped and recoloured alike; a function of seed and step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config
from .data import Clip

FRAMES = 3


class Batch(NamedTuple):
    images: Tensor  # (B, FRAMES, 3, H, W) in [0, 1]; frame 0 is the annotated one
    mask: Tensor  # (B, O, H, W) one-hot, of frame 0
    present: Tensor  # bool (B, O): which of the O objects the clip has


def sample(clips: list[Clip], config: Config, progress: float, g: torch.Generator) -> Batch:
    """config.batch clips; the two other frames lie within a reach that grows with progress (0 to 1) to the whole clip."""
    items = [_item(clips[_below(len(clips), g)], config, progress, g) for _ in range(config.batch)]
    height = min(images.shape[-2] for images, _ in items)
    width = min(images.shape[-1] for images, _ in items)
    most = max(len(mask) for _, mask in items)
    cropped = [_crop(images, mask, height, width, g) for images, mask in items]
    masks = torch.stack([F.pad(mask, (0, 0, 0, 0, 0, most - len(mask))) for _, mask in cropped])
    return Batch(torch.stack([images for images, _ in cropped]), masks, masks.flatten(2).any(-1))


def resized(images: Tensor, height: int | None) -> Tensor:
    """Frames (..., 3, H, W) at the given height, both sides to the nearest multiples of 8."""
    H, W = images.shape[-2:]
    scale = 1 if height is None else height / H
    size = [max(8, round(side * scale / 8) * 8) for side in (H, W)]
    return images if [H, W] == size else F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """One-hot masks (O, H, W), by the nearest pixel."""
    return mask if mask.shape[-2:] == size else F.interpolate(mask[None], size, mode="nearest-exact")[0]


def _item(clip: Clip, config: Config, progress: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    reach = min(len(clip) - 1, 2 + int(progress * len(clip)))
    last = 1 + _below(reach, g) if len(clip) > 1 else 0
    between = 1 + _below(last, g) if last else 0
    images = resized(torch.stack([clip.image(t) for t in (0, between, last)]), config.height)
    mask = resized_mask(clip.first_mask(), images.shape[-2:])
    if _below(2, g):
        images, mask = images.flip(-1), mask.flip(-1)
    gain = 1 + 0.2 * (2 * torch.rand(3, 1, 1, generator=g) - 1)
    shift = 0.1 * (2 * torch.rand(3, 1, 1, generator=g) - 1)
    return (images * gain + shift).clamp(0, 1), mask


def _crop(images: Tensor, mask: Tensor, height: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    top, left = (_below(1 + have - want, g) for have, want in zip(images.shape[-2:], (height, width), strict=True))
    window = (..., slice(top, top + height), slice(left, left + width))
    return images[window], mask[window]


def _below(n: int, g: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=g))
