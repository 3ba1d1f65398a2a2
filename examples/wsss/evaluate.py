"""How good masks and maps are: mIoU as VOC defines it, and token accuracy.

    python -m wsss.evaluate --data scenes --split val --masks runs/full/val     # from the folder examples/
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .data import IGNORE, read_index, read_scenes


class Confusion:
    """Pixels counted by (true class, predicted class) over a whole set; IGNORE in the truth counts nowhere."""

    def __init__(self, classes: int) -> None:
        self.count = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)  # background first

    def add(self, mask: Tensor, truth: Tensor) -> None:
        """Two int64 (H, W)."""
        n, counted = len(self.count), truth != IGNORE
        self.count += torch.bincount(n * truth[counted] + mask[counted], minlength=n * n).view(n, n)

    def iou(self) -> Tensor:
        """(1 + C,), of each class over the whole set; NaN where it is in neither masks nor truth."""
        both = self.count.diagonal()
        return both / (self.count.sum(0) + self.count.sum(1) - both)

    def miou(self) -> float:
        """Percent, background included."""
        return 100 * self.iou().nanmean().item()


def score(masks: Iterable[Tensor], truth: Iterable[Tensor], classes: int) -> Confusion:
    confusion = Confusion(classes)
    for mask, true in zip(masks, truth, strict=True):
        confusion.add(mask, true)
    return confusion


def tokens_right(maps: Tensor, truth: Tensor) -> tuple[int, int]:
    """Of the classes that show in truth (H, W): how many have, of all maps (C, H, W), the largest mean inside; and how many there are."""
    shown = [c for c in range(len(maps)) if (truth == 1 + c).any()]
    right = [maps[:, truth == 1 + c].mean(1).argmax().item() == c for c in shown]
    return sum(right), len(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in VOC layout")
    parser.add_argument("--split", default="val")
    parser.add_argument("--masks", type=Path, required=True, help="a folder with a <name>.png for every image of the split")
    a = parser.parse_args()
    data = read_scenes(a.data, a.split)
    masks = (read_index(a.masks / f"{scene.name}.png", scene.classes, scene.shape()) for scene in data.scenes)
    confusion = score(masks, (scene.mask() for scene in data.scenes), len(data.classes))
    for name, iou in zip(("background", *data.classes), confusion.iou().tolist(), strict=True):
        print(f"{name:12} {100 * iou:5.1f}")
    print(f"{'mIoU':12} {confusion.miou():5.1f}")


if __name__ == "__main__":
    main()
