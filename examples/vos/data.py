"""Clips in DAVIS layout on disk, and everything that can be wrong with them.

    JPEGImages/480p/<clip>/00000.jpg    Annotations/480p/<clip>/00000.png (palette, index = object)    ImageSets/2017/{train,val}.txt

Training reads the first annotation of a clip and no other, and only through `first_mask`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.shared.images import DataError, decoded, read_index, shape_of

RESOLUTION, YEAR = "480p", "2017"


@dataclass(frozen=True)
class Clip:
    """One clip on disk that has been checked: the first frame's annotation has at least one object, and no number is left out."""

    name: str
    frames: tuple[Path, ...]
    annotations: Path  # folder
    objects: int

    def __len__(self) -> int:
        return len(self.frames)

    def image(self, t: int) -> Tensor:
        """Frame t, (3, height, width) in [0, 1]."""
        return torch.from_numpy(_read_image(self.frames[t])).movedim(-1, 0).float() / 255

    def first_mask(self) -> Tensor:
        """The annotation of frame 0, one-hot (objects, height, width)."""
        return self._one_hot(0)

    def mask(self, t: int) -> Tensor:
        """The annotation of any frame, one-hot (objects, height, width). It is for evaluation."""
        return self._one_hot(t)

    def annotated(self) -> list[int]:
        """The frames that have an annotation."""
        return [t for t, frame in enumerate(self.frames) if self._annotation(frame).exists()]

    def _annotation(self, frame: Path) -> Path:
        return self.annotations / f"{frame.stem}.png"

    def _one_hot(self, t: int) -> Tensor:
        path = self._annotation(self.frames[t])
        index = read_annotation(path)
        if index.max() > self.objects:
            raise DataError(path, f"palette index {index.max()}, but the first frame has {self.objects} objects")
        height, width = shape_of(self.frames[t])
        if index.shape != (height, width):
            raise DataError(path, f"is {index.shape[1]}x{index.shape[0]}, its frame {width}x{height}")
        return torch.from_numpy(index[None] == np.arange(1, self.objects + 1)[:, None, None]).float()


def read_clips(root: Path, split: str) -> list[Clip]:
    """The clips that ImageSets names for "train" or "val"."""
    names = root / "ImageSets" / YEAR / f"{split}.txt"
    if not names.exists():
        raise DataError(names, "no such file")
    clips = [read_clip(root, name) for name in names.read_text().split()]
    if not clips:
        raise DataError(names, "names no clip")
    return clips


def read_clip(root: Path, name: str) -> Clip:
    images, annotations = (root / kind / RESOLUTION / name for kind in ("JPEGImages", "Annotations"))
    frames = tuple(sorted(images.glob("*.jpg")))
    if not frames:
        raise DataError(images, "no .jpg frame here")
    first = annotations / f"{frames[0].stem}.png"
    index = read_annotation(first)
    objects = int(index.max())
    if objects == 0:
        raise DataError(first, "no object in the first frame")
    empty = sorted(set(range(1, objects + 1)) - set(np.unique(index).tolist()))
    if empty:
        raise DataError(first, f"object {empty[0]} of {objects} is empty in the first frame")
    clip = Clip(name, frames, annotations, objects)
    clip.first_mask()
    height, width = shape_of(frames[0])
    for frame in frames[1:]:
        if (size := shape_of(frame)) != (height, width):
            raise DataError(frame, f"is {size[1]}x{size[0]}, the first frame {width}x{height}")
    return clip


def read_annotation(path: Path) -> np.ndarray:
    """The object of each pixel, uint8 (height, width), 0 = background."""
    if not path.exists():
        raise DataError(path, "no annotation")
    return read_index(path)


@lru_cache(maxsize=512)
def _read_image(path: Path) -> np.ndarray:
    return np.array(decoded(path).convert("RGB"))
