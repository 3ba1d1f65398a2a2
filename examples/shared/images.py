"""Pictures and index images on disk, and lists of their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .commands import DataError

VOID = 255  # the index of pixels that belong to nothing, in VOC and in DAVIS


def voc_palette() -> np.ndarray:
    """VOC's and DAVIS's colours, uint8 (256, 3). The bits of an index, three at a time, become the high bits of red, green and blue."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def read_names(path: Path, of: str) -> list[str]:
    """The names that a text file lists, one a line; a name may have spaces in it. `of` says what they are names of."""
    if not path.exists():
        raise DataError(path, "no such file")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(path, f"cannot be read: {error}") from error
    names = [name for name in names if name]
    if not names:
        raise DataError(path, f"names no {of}")
    return names


def opened(path: Path) -> Image.Image:
    """The image, of which only the header has been read."""
    try:
        return Image.open(path)
    except Exception as error:  # whatever the readers raise, it is the file
        raise DataError(path, f"cannot be read: {error}") from error


def decoded(path: Path) -> Image.Image:
    """The whole image. A truncated file shows only here."""
    image = opened(path)
    try:
        image.load()
    except Exception as error:
        raise DataError(path, f"cannot be read: {error}") from error
    return image


def shape_of(path: Path) -> tuple[int, int]:
    """(height, width), from the header."""
    with opened(path) as image:
        return image.height, image.width


def read_index(path: Path) -> np.ndarray:
    """The index of each pixel of a palette or grey PNG, uint8 (height, width)."""
    image = decoded(path)
    if image.mode not in ("P", "L", "1"):
        raise DataError(path, f"expected a palette PNG, got mode {image.mode}")
    return np.array(image.convert("L") if image.mode == "1" else image)


def save_index(index: np.ndarray, path: Path) -> None:
    """Save an index uint8 (height, width) as a PNG of 8 bits with VOC's palette."""
    image = Image.fromarray(index).convert("P")
    image.putpalette(voc_palette().ravel().tolist())
    image.save(path, bits=8)
