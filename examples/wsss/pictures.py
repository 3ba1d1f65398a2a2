"""A sheet of images of a split: the image, the map of each present class, the masks with their mIoU on this image, and the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from examples.shared.images import decoded, voc_palette
from examples.shared.sheets import Cell, save_sheet

from .data import Scene, Scenes
from .evaluate import score

SHOWN = 4  # the first images of a split


def save_scenes(path: Path, data: Scenes, maps: Tensor, masks: Mapping[str, Sequence[Tensor]]) -> None:
    """Save a sheet of the first images, a row for each.

    Args:
        path: The file to write.
        data: The images, of which those without a mask on disk show neither a truth nor a score.
        maps: Class maps (I, C, side, side) of at least the first images.
        masks: Masks (H, W) of at least the first images, by what they are called.
    """
    scenes = data.scenes[:SHOWN]
    most = max(len(scene.labels) for scene in scenes)
    rows = []
    for i, scene in enumerate(scenes):
        attention: list[Cell | None] = [Cell(f"attention, {data.classes[c]}", maps[i, c]) for c in scene.labels]
        attention += [None] * (most - len(attention))
        results = [_judged(name, those[i], scene) for name, those in masks.items()]
        truth = [Cell("truth", _coloured(scene.mask()))] if scene.mask_path.exists() else []
        rows.append([Cell(scene.name, decoded(scene.path)), *attention, *results, *truth])
    save_sheet(path, rows)


def _judged(name: str, mask: Tensor, scene: Scene) -> Cell:
    """A mask with its mIoU in percent, over the classes that it or the truth has."""
    judged = f", mIoU {score([mask], [scene.mask()], scene.classes).miou():.0f}" if scene.mask_path.exists() else ""
    return Cell(f"{name}{judged}", _coloured(mask))


def _coloured(mask: Tensor) -> np.ndarray:
    return voc_palette()[mask.numpy()]
