"""Clips in DAVIS layout on disk, and everything that can be wrong with them.

    JPEGImages/480p/<clip>/00000.jpg    Annotations/480p/<clip>/00000.png (palette, index = object)    ImageSets/2017/{train,val}.txt

Frames may be PNG, and are in the order of the numbers in their names. Objects may have any numbers from 1 to 254, and 255 is void, which
counts as background. A grey annotation of 0 and 255 alone is the mask of one object, as in DAVIS 2016.

Training reads the first annotation of a clip and no other, and only through `first_mask`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.shared.commands import DataError
from examples.shared.images import VOID, decoded, opened, read_index, read_names, shape_of

RESOLUTION, YEAR = "480p", "2017"
FRAMES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Clip:
    """One clip on disk that has been checked: the first frame's annotation has at least one object."""

    name: str
    frames: tuple[Path, ...]
    annotations: Path  # folder
    ids: tuple[int, ...]  # the index that each object has in the annotations, ascending

    @property
    def objects(self) -> int:
        return len(self.ids)

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
        if unknown := sorted(indices_of(index) - {VOID, *self.ids}):
            raise DataError(path, f"object {unknown[0]}, which the first frame does not show")
        height, width = shape_of(self.frames[t])
        if index.shape != (height, width):
            raise DataError(path, f"is {index.shape[1]}x{index.shape[0]}, its frame {width}x{height}")
        return torch.from_numpy(index[None] == np.array(self.ids)[:, None, None]).float()


def read_clips(root: Path, split: str) -> list[Clip]:
    """The clips that ImageSets names for "train" or "val"."""
    names = read_names(root / "ImageSets" / YEAR / f"{split}.txt", "clip")
    return [read_clip(root, name) for name in tqdm(names, desc=split, leave=False)]


def read_clip(root: Path, name: str) -> Clip:
    images, annotations = (root / kind / RESOLUTION / name for kind in ("JPEGImages", "Annotations"))
    frames = tuple(sorted((path for path in images.glob("*") if path.suffix.lower() in FRAMES), key=_in_time))
    if not frames:
        raise DataError(images, "no .jpg or .png frame here")
    for one, other in pairwise(frames):
        if one.stem == other.stem:
            raise DataError(images, f"frame {one.stem} is there twice, as {' and '.join(sorted((one.suffix, other.suffix)))}")
    clip = Clip(name, frames, annotations, _objects(annotations / f"{frames[0].stem}.png"))
    clip.first_mask()
    height, width = shape_of(frames[0])
    for frame in frames[1:]:
        if (size := shape_of(frame)) != (height, width):
            raise DataError(frame, f"is {size[1]}x{size[0]}, the first frame {width}x{height}")
    return clip


def _in_time(frame: Path) -> tuple[list[str | int], str]:
    """What frames are sorted by: the numbers in their names count as numbers, so that 2 comes before 10."""
    parts: list[str | int] = list(re.split(r"(\d+)", frame.stem))
    parts[1::2] = map(int, parts[1::2])
    return parts, frame.stem


def _objects(path: Path) -> tuple[int, ...]:
    """The indices of the objects in the first frame's annotation."""
    shown = indices_of(read_annotation(path))
    is_mask = shown == {VOID} and opened(path).mode != "P"
    if not is_mask:
        shown -= {VOID}
    if not shown:
        raise DataError(path, "no object in the first frame")
    return tuple(sorted(shown))


def indices_of(index: np.ndarray) -> set[int]:
    """The indices that an annotation has besides 0, the background."""
    return set(np.bincount(index.ravel(), minlength=256).nonzero()[0].tolist()) - {0}


def read_annotation(path: Path) -> np.ndarray:
    """The index of each pixel, uint8 (height, width), 0 = background, 255 = void."""
    if not path.exists():
        raise DataError(path, "no annotation")
    return read_index(path)


@lru_cache(maxsize=512)
def _read_image(path: Path) -> np.ndarray:
    return np.array(decoded(path).convert("RGB"))
