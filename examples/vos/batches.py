"""Training batches: three frames of a clip, of which the first is annotated, and that first frame again from another view.

A batch follows from seed and step. The other view is flipped, turned, moved, scaled and recoloured. Without it the cycles have an answer
that tracks nothing: masks that stay in their place come back to frame 0 unharmed, whatever has moved in between. One more picture has the
objects of the other view pasted over the frame between, because frame 0 shows its objects before one ground alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config
from .data import Clip


class Batch(NamedTuple):
    images: Tensor  # (B, 5, 3, H, W) in [0, 1]: frame 0, two later frames, frame 0 in another view, its objects pasted on frame 1
    mask: Tensor  # (B, O, H, W), one-hot, of frame 0
    mask_again: Tensor  # (B, O, H, W), of the other view of frame 0, pasted or not
    present: Tensor  # bool (B, O): which of the O objects the clip has


def sample(clips: list[Clip], config: Config, progress: float, g: torch.Generator) -> Batch:
    """Draw config.batch clips. The two later frames lie within a reach that grows with progress, from 0 to 1, to the whole clip."""
    items = [_item(clips[_below(len(clips), g)], config, progress, g) for _ in range(config.batch)]
    height = min(images.shape[-2] for images, _ in items)
    width = min(images.shape[-1] for images, _ in items)
    most = max(mask.shape[1] for _, mask in items)
    cropped = [_crop(images, mask, height, width, g) for images, mask in items]
    masks = torch.stack([F.pad(mask, (0, 0, 0, 0, 0, most - mask.shape[1])) for _, mask in cropped])
    mask, mask_again = masks.unbind(1)
    present = mask.flatten(2).any(-1)  # A crop may lose an object of frame 0 and not of the other view.
    return Batch(torch.stack([images for images, _ in cropped]), mask, mask_again * present[..., None, None], present)


def resized(images: Tensor, height: int | None) -> Tensor:
    """Resize frames (N, 3, H, W) to the given height, with both sides the nearest multiples of 8."""
    H, W = images.shape[-2:]
    scale = 1 if height is None else height / H
    size = [max(8, round(side * scale / 8) * 8) for side in (H, W)]
    return images if [H, W] == size else F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one-hot masks (O, H, W) by the nearest pixel."""
    return mask if mask.shape[-2:] == size else F.interpolate(mask[None], size, mode="nearest-exact")[0]


def _item(clip: Clip, config: Config, progress: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images (5, 3, H, W) and the two masks (2, O, H, W) of one clip."""
    reach = min(len(clip) - 1, 2 + int(progress * len(clip)))
    last = 1 + _below(reach, g) if len(clip) > 1 else 0
    between = 1 + _below(last, g) if last else 0
    images = resized(torch.stack([clip.image(t) for t in (0, between, last)]), config.height)
    mask = resized_mask(clip.first_mask(), images.shape[-2:])
    if _below(2, g):
        images, mask = images.flip(-1), mask.flip(-1)
    images = _recoloured(images, 0.2, g)
    again, mask_again = _other_view(images[0], mask, g)
    again = _recoloured(again, 0.1, g)
    pasted = torch.where(mask_again.any(0), again, images[1])
    return torch.cat([images, torch.stack([again, pasted])]), torch.stack([mask, mask_again])


def _recoloured(images: Tensor, by: float, g: torch.Generator) -> Tensor:
    gain, shift = (by * (2 * torch.rand(3, 1, 1, generator=g) - 1) for _ in range(2))
    return (images * (1 + gain) + shift / 2).clamp(0, 1)


def _other_view(image: Tensor, mask: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and mask (O, H, W) under one random similarity. What lies outside the picture is mirrored."""
    H, W = image.shape[-2:]
    angle, scale, down, right = (2 * torch.rand(4, generator=g) - 1).tolist()
    cos, sin = (f(0.3 * angle) * math.exp(0.25 * scale) for f in (math.cos, math.sin))
    flip = 1 - 2 * _below(2, g)
    affine = torch.tensor([[[flip * cos, -sin * H / W, 0.5 * right], [flip * sin * W / H, cos, 0.5 * down]]])
    grid = F.affine_grid(affine, [1, 3, H, W], align_corners=False)
    view, seen = (
        F.grid_sample(x[None], grid, mode=mode, padding_mode="reflection", align_corners=False)[0]
        for x, mode in ((image, "bilinear"), (mask, "nearest"))
    )
    return view, seen


def _crop(images: Tensor, mask: Tensor, height: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    top, left = (_below(1 + have - want, g) for have, want in zip(images.shape[-2:], (height, width), strict=True))
    window = (..., slice(top, top + height), slice(left, left + width))
    return images[window], mask[window]


def _below(n: int, g: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=g))
