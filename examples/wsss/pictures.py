"""A sheet of pictures: the image, the map of each present class, the masks and the truth, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from examples.shared.images import voc_palette

from .data import Scene

SIDE, GAP, TITLE = 128, 4, 14


def save_sheet(path: Path, shown: list[tuple[Scene, Tensor, list[Tensor]]], classes: tuple[str, ...], titles: list[str]) -> None:
    """Save a sheet. Each (scene, maps (C, side, side), masks (H, W)) has a row: image, maps of its classes, masks, truth.

    A map is drawn from its least value, dark, to its greatest, bright. `titles` name the masks.
    """
    most = max(len(scene.labels) for scene, _, _ in shown)
    columns = 2 + most + len(titles)
    sheet = Image.new("RGB", (columns * (SIDE + GAP), len(shown) * (SIDE + TITLE + GAP)), "white")
    for r, (scene, maps, masks) in enumerate(shown):
        cells = {0: ("image", Image.open(scene.path).convert("RGB"))}
        cells |= {1 + i: (classes[c], heat(maps[c])) for i, c in enumerate(scene.labels)}
        for i, (title, mask) in enumerate(zip([*titles, "truth"], [*masks, scene.mask()], strict=True)):
            cells[1 + most + i] = (title, Image.fromarray(voc_palette()[mask.numpy()]))
        for column, (title, picture) in cells.items():
            at = column * (SIDE + GAP), r * (SIDE + TITLE + GAP)
            ImageDraw.Draw(sheet).text(at, title, fill="black")
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (at[0], at[1] + TITLE))
    sheet.save(path)


def heat(values: Tensor) -> Image.Image:
    """Draw values (h, w), from black through red and yellow to white."""
    low, high = values.min(), values.max()
    level = ((values - low) / (high - low).clamp_min(1e-12)).numpy()[..., None]
    return Image.fromarray((np.clip(3 * level - np.arange(3), 0, 1) * 255).astype(np.uint8))
