"""Images in VOC layout on disk, and everything that can be wrong with them.

    JPEGImages/<name>.jpg    Annotations/<name>.xml (the classes of the image)    ImageSets/Segmentation/{train,val}.txt
    SegmentationClass/<name>.png (palette, 0 = background, index = class, 255 = ignore)    classes.txt (unless the classes are VOC's)

Training reads images and Annotations alone. `Scene.mask` is for evaluation.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from examples.shared.commands import DataError
from examples.shared.images import VOID, decoded, read_index, read_names, shape_of

IGNORE = VOID
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One image on disk and the classes in it."""

    name: str
    path: Path
    mask_path: Path
    classes: int  # C, the number in the whole set
    labels: tuple[int, ...]  # at least one of 0 .. C-1

    def image(self, size: int) -> Tensor:
        """The image, uint8 (3, size, size)."""
        return torch.from_numpy(_pixels(self.path, size))

    def present(self) -> Tensor:
        """Which classes the image shows, bool (C,)."""
        present = torch.zeros(self.classes, dtype=torch.bool)
        present[list(self.labels)] = True
        return present

    def shape(self) -> tuple[int, int]:
        """(H, W), from the file's header."""
        return shape_of(self.path)

    def mask(self) -> Tensor:
        """The true mask at the image's own size, int64 (H, W): 0 = background, 1 + class, or IGNORE."""
        return read_mask(self.mask_path, self.classes, self.shape())


@dataclass(frozen=True)
class Scenes:
    """The images of a split, and the names of the classes without the background."""

    classes: tuple[str, ...]
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)


def read_scenes(root: Path, split: str) -> Scenes:
    """The images that ImageSets names for "train" or "val"."""
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names, classes = read_names(listed, "image"), read_classes(root)
    return Scenes(classes, tuple(_read_scene(root, name, classes) for name in tqdm(names, desc=split, leave=False)))


def read_classes(root: Path) -> tuple[str, ...]:
    """The classes that classes.txt names, one a line; where there is no such file, VOC's twenty."""
    path = root / "classes.txt"
    classes = tuple(read_names(path, "class")) if path.exists() else VOC_CLASSES
    if len(classes) >= IGNORE:
        raise DataError(path, f"names {len(classes)} classes, but an index PNG holds 254 beside the background and what is ignored")
    return classes


def read_mask(path: Path, classes: int, shape: tuple[int, int]) -> Tensor:
    """Read a mask of that shape from a palette PNG: int64 (H, W), 0 = background, 1 + class, or IGNORE."""
    index = read_index(path).astype(np.int64)
    beyond = index[(index > classes) & (index != IGNORE)]
    if beyond.size:
        raise DataError(path, f"class index {beyond.max()}, but there are {classes} classes")
    if index.shape != shape:
        raise DataError(path, f"is {index.shape[1]}x{index.shape[0]}, its image {shape[1]}x{shape[0]}")
    return torch.from_numpy(index)


def _read_scene(root: Path, name: str, classes: tuple[str, ...]) -> Scene:
    path, annotation = root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml"
    if not path.exists():
        raise DataError(path, "no such image")
    return Scene(name, path, root / "SegmentationClass" / f"{name}.png", len(classes), _labels(annotation, classes))


def _labels(path: Path, classes: tuple[str, ...]) -> tuple[int, ...]:
    try:
        names = {(item.text or "").strip() for item in ElementTree.parse(path).iterfind("object/name")}
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(path, f"cannot be read: {error}") from error
    if not names:
        raise DataError(path, "image without labels: no object is named")
    unknown = sorted(names - set(classes))
    if unknown:
        raise DataError(path, f"class {unknown[0]!r} is none of the {len(classes)}: {', '.join(classes)}")
    return tuple(sorted(classes.index(name) for name in names))


@lru_cache(maxsize=4096)
def _pixels(path: Path, size: int) -> np.ndarray:
    image = decoded(path).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.array(image).transpose(2, 0, 1))
