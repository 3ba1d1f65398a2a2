"""Make pseudo-masks of class-token maps, for images whose labels are known.

    python -m examples.wsss.pseudo_masks --data build/scenes --checkpoint build/runs/full/checkpoint.pt --out build/runs/full/train
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from examples.shared.commands import DEVICE, DataError, checked_device, cli
from examples.shared.images import save_index

from .data import Scenes, read_scenes
from .evaluate import score
from .model import ViT
from .pictures import save_scenes
from .train import load

UNDECIDED = -1


class Thresholds(NamedTuple):
    """Thresholds on a map that was divided by its own mean over the image."""

    low: float  # A pixel at which all present classes are below is background.
    high: float  # A pixel at which a class is above belongs to it.


CHOICES = tuple(Thresholds(share * high, high) for high in (1.0, 1.4, 1.8, 2.2, 2.6, 3.0) for share in (0.7, 0.85, 1.0))
CHOSEN_ON = 100  # the number of training images that decide


class Seen(NamedTuple):
    """What the model says of each of the I images of a split."""

    maps: Tensor  # (I, C, side, side)
    probability: Tensor  # (I, C)


@torch.no_grad()
def see(model: ViT, data: Scenes, all_heads: bool = False, batch: int = 32) -> Seen:
    """Run the model in evaluation mode, where nothing is masked. all_heads: the maps have the closed heads in them too."""
    model.eval()
    device, parts = next(model.parameters()).device, []
    for start in tqdm(range(0, len(data), batch), desc="maps", leave=False):
        images = torch.stack([scene.image(model.config.size) for scene in data.scenes[start : start + batch]])
        logits, maps = model(images.to(device).float() / 255, all_heads=all_heads)
        parts.append((maps.cpu(), logits.sigmoid().cpu()))
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


def enlarged(maps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize maps (C, side, side) to the image's shape."""
    return F.interpolate(maps[None], shape, mode="bilinear")[0]


def pseudo_mask(maps: Tensor, probability: Tensor, present: Tensor, thresholds: Thresholds) -> Tensor:
    """The mask int64 (H, W), 0 = background, of maps (C, H, W), probability (C,) and present bool (C,).

    A class is painted where its map is above `high`, a likelier class over a less likely one. Between `low` and `high` the nearest label
    decides.
    """
    ratio = maps / maps.mean((1, 2), keepdim=True).clamp_min(1e-12)
    label = torch.full(maps.shape[1:], UNDECIDED)
    label[ratio[present].amax(0) < thresholds.low] = 0
    for c in sorted(present.nonzero().flatten().tolist(), key=lambda c: probability[c].item()):
        label[ratio[c] > thresholds.high] = 1 + c
    return filled(label)


def filled(label: Tensor) -> Tensor:
    """Give each UNDECIDED pixel of (H, W) the label of the nearest decided one; where none is decided, all become background."""
    undecided = label == UNDECIDED
    if undecided.all():
        return torch.zeros_like(label)
    row, column = distance_transform_edt(undecided.numpy(), return_distances=False, return_indices=True)
    return label[torch.from_numpy(row).long(), torch.from_numpy(column).long()]


def pseudo_masks(seen: Seen, data: Scenes, thresholds: Thresholds) -> list[Tensor]:
    """The mask of each image, at its own size."""
    masks = []
    images = zip(tqdm(data.scenes, desc="pseudo-masks", leave=False), seen.maps, seen.probability, strict=True)
    for scene, maps, probability in images:
        masks.append(pseudo_mask(enlarged(maps, scene.shape()), probability, scene.present(), thresholds))
    return masks


def choose(seen: Seen, data: Scenes) -> Thresholds:
    """The choice with the best mIoU on the first CHOSEN_ON images. It reads their masks, so give it training images."""
    few = Scenes(data.classes, data.scenes[:CHOSEN_ON])
    truth = [scene.mask() for scene in few.scenes]
    first = Seen(seen.maps[:CHOSEN_ON], seen.probability[:CHOSEN_ON])

    def miou(thresholds: Thresholds) -> float:
        return score(pseudo_masks(first, few, thresholds), truth, len(data.classes)).miou()

    return max(tqdm(CHOICES, desc="thresholds", leave=False), key=miou)


def save_masks(masks: list[Tensor], data: Scenes, out: Path) -> None:
    """Write out/<name>.png for each image, with VOC's palette."""
    out.mkdir(parents=True, exist_ok=True)
    for scene, mask in zip(tqdm(data.scenes, desc="writing", leave=False), masks, strict=True):
        save_index(mask.to(torch.uint8).numpy(), out / f"{scene.name}.png")


def main(
    data: Path,
    checkpoint: Path,
    out: Path,
    split: str = "train",
    thresholds: tuple[float, float] | None = None,
    device: str = DEVICE,
) -> None:
    """Make pseudo-masks of class-token maps, for images whose labels are known.

    Args:
        data: A folder in VOC layout.
        checkpoint: What examples.wsss.train wrote.
        out: Where the masks go; beside it, <out>-sheet.png shows the first images with their maps and masks.
        split: The images to make masks for.
        thresholds: The lower and the higher one; otherwise chosen on training images.
        device: Where to run the model.
    """
    model, classes = load(checkpoint, checked_device(device))
    scenes = read_scenes(data, split)
    if scenes.classes != classes:
        raise DataError(data, f"classes {', '.join(scenes.classes)}; the checkpoint's are {', '.join(classes)}")
    if thresholds:
        chosen = Thresholds(*thresholds)
    else:
        train = read_scenes(data, "train")
        few = Scenes(train.classes, train.scenes[:CHOSEN_ON])
        chosen = choose(see(model, few), few)
    seen = see(model, scenes)
    masks, sheet = pseudo_masks(seen, scenes, chosen), out.with_name(f"{out.name}-sheet.png")
    save_masks(masks, scenes, out)
    save_scenes(sheet, scenes, seen.maps, {"pseudo-mask": masks})
    print(f"{len(scenes)} pseudo-masks in {out}; thresholds {chosen.low:.2f} {chosen.high:.2f}; the first images in {sheet}")


if __name__ == "__main__":
    cli(main)
