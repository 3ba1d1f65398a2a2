"""How good masks and maps are: mIoU as VOC defines it, and token accuracy.

    python -m examples.wsss.evaluate --data build/scenes --split val --masks build/runs/full/val
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from examples.shared.commands import cli

from .data import IGNORE, read_mask, read_scenes


class Confusion:
    """Counts pixels by (true class, predicted class) over a whole set.

    Pixels whose truth is IGNORE do not count. Where only the prediction is IGNORE, a pixel is a miss of its true class.
    """

    def __init__(self, classes: int) -> None:
        # Background comes first. The last column has the misses that are no class's.
        self.count = torch.zeros(classes + 1, classes + 2, dtype=torch.int64)

    def add(self, mask: Tensor, truth: Tensor) -> None:
        """Count a mask and its truth, both int64 (H, W)."""
        rows, columns = self.count.shape
        counted = truth != IGNORE
        predicted = torch.where(mask == IGNORE, columns - 1, mask)[counted]
        self.count += torch.bincount(columns * truth[counted] + predicted, minlength=rows * columns).view(rows, columns)

    def iou(self) -> Tensor:
        """The IoU of each class over the whole set, (1 + C,); NaN for a class that is neither in the masks nor in the truth."""
        both = self.count.diagonal()
        return both / (self.count[:, :-1].sum(0) + self.count.sum(1) - both)

    def miou(self) -> float:
        """The mean IoU in percent, background included."""
        return 100 * self.iou().nanmean().item()


def score(masks: Iterable[Tensor], truth: Iterable[Tensor], classes: int) -> Confusion:
    """Count all masks against their truth."""
    confusion = Confusion(classes)
    for mask, true in zip(masks, truth, strict=True):
        confusion.add(mask, true)
    return confusion


def tokens_right(maps: Tensor, truth: Tensor) -> tuple[int, int]:
    """How many of the classes that truth (H, W) shows have, among all maps (C, H, W), the largest mean inside their region; and how many
    classes it shows.
    """
    shown = [c for c in range(len(maps)) if (truth == 1 + c).any()]
    right = [maps[:, truth == 1 + c].mean(1).argmax().item() == c for c in shown]
    return sum(right), len(shown)


def main(data: Path, masks: Path, split: str = "val") -> None:
    """How good masks are: the IoU of each class over the whole split, and their mean.

    Args:
        data: A folder in VOC layout.
        masks: A folder with a <name>.png for every image of the split.
        split: The images to judge by.
    """
    truth = read_scenes(data, split)
    scenes = tqdm(truth.scenes, desc="scores", leave=False)
    read = (read_mask(masks / f"{scene.name}.png", scene.classes, scene.shape()) for scene in scenes)
    confusion = score(read, (scene.mask() for scene in truth.scenes), len(truth.classes))
    for name, iou in zip(("background", *truth.classes), confusion.iou().tolist(), strict=True):
        print(f"{name:12} {100 * iou:5.1f}")
    print(f"{'mIoU':12} {confusion.miou():5.1f}")


if __name__ == "__main__":
    cli(main)
