"""Predictions to look at: each frame with its objects tinted and outlined, as PNG and as one animated GIF, labels as palette PNG, and a
sheet of clips: what was given, a frame, its soft masks, where the object's descriptor looks, and the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from examples.shared.images import save_index, voc_palette
from examples.shared.sheets import Cell

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
    """Write the clip's frames under folder/<clip>, folder/<clip>.gif, and the labels under folder/labels/<clip>.

    Files have the names of the clip's frames, and in those of labels the objects have the indices of the clip's annotations.
    """
    shown, indexed = folder / clip.name, folder / "labels" / clip.name
    for kind in (shown, indexed):
        kind.mkdir(parents=True, exist_ok=True)
    overlays, ids = [], np.array([0, *clip.ids], np.uint8)
    for t, label in enumerate(tqdm(labels, desc=f"pictures of {clip.name}", leave=False)):
        name = f"{clip.frames[t].stem}.png"
        overlays.append(overlay(clip.image(t), label))
        overlays[-1].save(shown / name)
        save_index(ids[label.numpy()], indexed / name)
    overlays[0].save(folder / f"{clip.name}.gif", save_all=True, append_images=overlays[1:], duration=120, loop=0)


class Look(NamedTuple):
    """What the network has in mind of one frame."""

    frame: int
    masks: Tensor  # soft, (O, h, w)
    attention: Tensor | None  # of the first object's descriptor to the frame, (h, w)


def row(clip: Clip, labels: list[Tensor], look: Look, score: float) -> list[Cell | None]:
    """A clip's row of the sheet. score: its J&F in percent."""
    t, last = look.frame, len(labels) - 1
    return [
        Cell(f"{clip.name}, frame 0: mask given", overlay(clip.image(0), labels[0])),
        Cell(f"frame {t}", clip.image(t).movedim(0, -1)),
        Cell("soft masks, summed", look.masks.sum(0), bright=1),
        look.attention if look.attention is None else Cell("attention of object 1", look.attention),
        Cell(f"result, frame {t}", overlay(clip.image(t), labels[t])),
        Cell(f"result, frame {last}; J&F {score:.1f}", overlay(clip.image(last), labels[last])),
    ]
