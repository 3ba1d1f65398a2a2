"""Pictures and index images on disk, and the one error that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image


class DataError(ValueError):
    """Something is wrong with the data; the message begins with the file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """End a command with the line of a DataError instead of a traceback."""
    try:
        yield
    except DataError as error:
        raise SystemExit(str(error)) from None


def opened(path: Path) -> Image.Image:
    """The image, of which only the header has been read."""
    try:
        return Image.open(path)
    except (OSError, SyntaxError) as error:
        raise DataError(path, f"cannot be read: {error}") from error


def decoded(path: Path) -> Image.Image:
    """The whole image. A truncated file shows only here."""
    image = opened(path)
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise DataError(path, f"cannot be read: {error}") from error
    return image


def shape_of(path: Path) -> tuple[int, int]:
    """(height, width), from the header."""
    with opened(path) as image:
        return image.height, image.width


def read_index(path: Path) -> np.ndarray:
    """The index of each pixel of a palette PNG, uint8 (height, width)."""
    image = decoded(path)
    if image.mode not in ("P", "L"):
        raise DataError(path, f"expected a palette PNG, got mode {image.mode}")
    return np.array(image)


def save_index(index: np.ndarray, path: Path, palette: np.ndarray) -> None:
    """Save an index uint8 (height, width) as a PNG with that palette, uint8 (colours, 3)."""
    image = Image.fromarray(index).convert("P")
    image.putpalette(palette.ravel().tolist())
    image.save(path)
