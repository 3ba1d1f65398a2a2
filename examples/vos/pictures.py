"""Predictions to look at: each frame with its objects tinted and outlined, as PNG and as one animated GIF, and labels as palette PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from examples.shared.images import save_index, voc_palette

from .data import Clip
from .metrics import edges


def overlay(image: Tensor, label: Tensor) -> Image.Image:
    """Tint the objects of image (3, H, W) in [0, 1] by label, int (H, W) with 0 = background. Tiny pictures are enlarged."""
    pixels = (image.movedim(0, -1).numpy() * 255).astype(np.uint8)
    colours = voc_palette()[label.numpy()]
    tinted = np.where((label > 0).numpy()[..., None], pixels // 2 + colours // 2, pixels)
    for o in label.unique().tolist():
        if o:
            tinted[edges(label == o).numpy()] = 255
    picture, times = Image.fromarray(tinted.astype(np.uint8)), max(1, 192 // len(tinted))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def save_pictures(folder: Path, clip: Clip, labels: list[Tensor]) -> None:
    """Write the clip's frames as folder/<clip>/00000.png and so on, folder/<clip>.gif, and the labels under folder/labels/<clip>.

    In the labels' files the objects have the indices of the clip's annotations.
    """
    shown, indexed = folder / clip.name, folder / "labels" / clip.name
    for kind in (shown, indexed):
        kind.mkdir(parents=True, exist_ok=True)
    overlays, ids = [], np.array([0, *clip.ids], np.uint8)
    for t, label in enumerate(tqdm(labels, desc=f"pictures of {clip.name}", leave=False)):
        overlays.append(overlay(clip.image(t), label))
        overlays[-1].save(shown / f"{t:05}.png")
        save_index(ids[label.numpy()], indexed / f"{t:05}.png")
    overlays[0].save(folder / f"{clip.name}.gif", save_all=True, append_images=overlays[1:], duration=120, loop=0)


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
