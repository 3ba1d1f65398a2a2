"""timm's weights for a ViT with class tokens: its layers load as they are, its class token starts all of ours, positions are resized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from examples.shared.commands import SettingError
from examples.shared.timm_models import create_model

if TYPE_CHECKING:
    from .model import ViT


@torch.no_grad()
def load_timm(model: ViT, name: str, pretrained: bool = True) -> None:
    """Load the weights of a timm model. Raises what create_model raises, and SettingError where width, patch or depth differ."""
    theirs = create_model(name, pretrained=pretrained, num_classes=0).state_dict()
    class_token, positions = theirs.pop("cls_token")[0], theirs.pop("pos_embed")[0]
    ours = model.state_dict()
    shared = {key for key in ours if key.startswith(("patch_embed.", "blocks.", "norm.")) and "gates" not in key}
    wrong = sorted(shared ^ set(theirs)) or sorted(key for key in shared if ours[key].shape != theirs[key].shape)
    if wrong:
        c = model.config
        raise SettingError(f"{name}: not a ViT of width {c.width}, patch {c.patch} and depth {c.depth}: {wrong[0]}")
    model.load_state_dict(theirs, strict=False)
    side = int(len(positions) ** 0.5)
    prefix = len(positions) - side**2  # The class token's position comes first.
    of_patches = positions[prefix:].mT.unflatten(-1, (side, side))[None]
    grid = model.config.grid
    model.pos_embed.copy_(F.interpolate(of_patches, (grid, grid), mode="bicubic").flatten(2)[0].mT)
    model.extra_tokens.add_(class_token + positions[:prefix].sum(0))  # The small random parts that they had tell them apart.
