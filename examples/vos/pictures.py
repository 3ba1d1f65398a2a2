"""Predictions to look at: each frame with its objects tinted and outlined, as PNG and as one animated GIF, and labels as palette PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from examples.shared.images import save_index

from .metrics import edges
from .synthetic import PALETTE


def overlay(image: Tensor, label: Tensor) -> Image.Image:
    """Tint the objects of image (3, H, W) in [0, 1] by label, int (H, W) with 0 = background. Tiny pictures are enlarged."""
    pixels = (image.movedim(0, -1).numpy() * 255).astype(np.uint8)
    colours = PALETTE[1 + (label.numpy() - 1) % (len(PALETTE) - 1)]
    tinted = np.where((label > 0).numpy()[..., None], pixels // 2 + colours // 2, pixels)
    for o in label.unique().tolist():
        if o:
            tinted[edges(label == o).numpy()] = 255
    picture, times = Image.fromarray(tinted.astype(np.uint8)), max(1, 192 // len(tinted))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def save_pictures(folder: Path, name: str, images: list[Tensor], labels: list[Tensor]) -> None:
    """Write folder/name/00000.png and so on, folder/name.gif, and the labels under folder/labels/name."""
    overlays = [overlay(image, label) for image, label in zip(images, labels, strict=True)]
    for kind in (folder / name, folder / "labels" / name):
        kind.mkdir(parents=True, exist_ok=True)
    for t, (picture, label) in enumerate(zip(overlays, labels, strict=True)):
        picture.save(folder / name / f"{t:05}.png")
        save_index(label.numpy().astype(np.uint8), folder / "labels" / name / f"{t:05}.png", PALETTE)
    overlays[0].save(folder / f"{name}.gif", save_all=True, append_images=overlays[1:], duration=120, loop=0)


def save_sheet(folder: Path, names: list[str], columns: int = 5) -> None:
    """Write folder/sheet.png, with a row for each clip: frames from its first overlay to its last."""
    rows = []
    for name in names:
        overlays = sorted((folder / name).glob("*.png"))
        chosen = [overlays[round(i * (len(overlays) - 1) / (columns - 1))] for i in range(columns)]
        rows.append([Image.open(path) for path in chosen])
    width, height = (max(getattr(row[0], side) for row in rows) for side in ("width", "height"))
    sheet = Image.new("RGB", (columns * width, len(rows) * height), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (c * width, r * height))
    sheet.save(folder / "sheet.png")
