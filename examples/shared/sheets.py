"""A sheet of captioned pictures: what went in, what was made of it, and how good that is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

WIDTH = 2.0  # of a picture, in inches


class Cell(NamedTuple):
    caption: str
    picture: Any  # an image, or an array or a tensor: colours (h, w, 3), or values (h, w), which are drawn from dark to bright
    bright: float | None = None  # The value that is brightest, 0 being darkest; None stretches from the least value to the greatest.


def save_sheet(path: Path, rows: Sequence[Sequence[Cell | None]]) -> None:
    """Save rows of cells, which need not be equally long; None leaves a place empty, but not the first."""
    columns = list(zip_longest(*rows))
    shapes = [np.asarray(row[0].picture).shape for row in rows]
    heights = [WIDTH * height / width + 0.25 for height, width, *_ in shapes]
    figure = Figure((WIDTH * len(columns), sum(heights)), dpi=110, layout="constrained")
    places = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights).T
    for axes, column in zip(places, columns, strict=True):
        for axis, cell in zip(axes, column, strict=True):
            axis.axis("off")
            if cell:
                lowest = None if cell.bright is None else 0
                axis.imshow(np.asarray(cell.picture), cmap="inferno", vmin=lowest, vmax=cell.bright, interpolation="nearest")
                axis.set_title(cell.caption, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
