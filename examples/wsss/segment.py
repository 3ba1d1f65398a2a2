"""What the pseudo-masks are for: a segmentation network in plain torch learns from them, and then needs no labels.

    python -m examples.wsss.segment --data build/scenes --masks build/runs/full/train --out build/runs/full/segmentation
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.shared.commands import DEVICE, Positive, at_least, checked_device, cli

from .data import IGNORE, Scenes, read_mask, read_scenes
from .evaluate import score
from .pseudo_masks import save_masks
from .train import batch_of

WIDTH, BATCH, STEPS, LR = 16, 16, 200, 1e-2


class Network(nn.Module):
    """Goes down three scales and up again, with a connection across at each."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = [WIDTH, 2 * WIDTH, 4 * WIDTH]
        self.down = nn.ModuleList(_two_convolutions(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_two_convolutions(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(WIDTH, classes + 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 1 + C, H, W), background first, of images (B, 3, H, W) in [0, 1]."""
        x, across = 2 * image - 1, []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            across.append(x)
        for block, fine in zip(self.up, across[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, fine.shape[-2:], mode="bilinear"), fine], 1))
        return self.head(x)


def _two_convolutions(width: int, to: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (width, to):
        layers += [nn.Conv2d(channels, to, 3, padding=1, bias=False), nn.BatchNorm2d(to), nn.ReLU()]
    return nn.Sequential(*layers)


def fit(data: Scenes, masks: list[Tensor], size: int, seed: int = 0, device: str = "cpu", steps: int = STEPS) -> Network:
    """Train a network against masks (H, W) of the images, both resized to `size`. Pixels that are IGNORE do not count."""
    torch.manual_seed(seed)
    network = Network(len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    target = torch.stack([resized(mask, (size, size)) for mask in masks])
    g = torch.Generator().manual_seed(seed)
    with tqdm(range(steps), desc="segmentation") as bar:
        for _ in bar:
            images, chosen, mirror = batch_of(data, BATCH, size, g)
            truth = torch.where(mirror[:, None, None], target[chosen].flip(-1), target[chosen])
            loss = F.cross_entropy(network(images.to(device)), truth.to(device), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return network


@torch.no_grad()
def predict(network: Network, data: Scenes, size: int) -> list[Tensor]:
    """The mask of each image at its own size, int64 (H, W), 0 = background."""
    network.eval()
    device, masks = next(network.parameters()).device, []
    for scene in tqdm(data.scenes, desc="predictions", leave=False):
        logits = network(scene.image(size)[None].to(device).float() / 255)
        masks.append(F.interpolate(logits, scene.shape(), mode="bilinear")[0].argmax(0).cpu())
    return masks


def resized(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize a mask, int64 (H, W), by the nearest pixel."""
    return F.interpolate(mask[None, None].float(), shape, mode="nearest-exact")[0, 0].long()


def main(
    data: Path, masks: Path, out: Path, size: Annotated[int, at_least(4)] = 64, steps: Positive = STEPS, seed: int = 0, device: str = DEVICE
) -> None:
    """Train a segmentation network on pseudo-masks, and write what it predicts for val.

    Args:
        data: A folder in VOC layout.
        masks: Pseudo-masks of the training images.
        out: Where the predictions for val go.
        size: Images are resized to squares of this side.
        steps: How many to train.
        seed: Decides weights and batches.
        device: Where to train.
    """
    checked_device(device)
    train, val = read_scenes(data, "train"), read_scenes(data, "val")
    scenes = tqdm(train.scenes, desc="masks", leave=False)
    taught = [read_mask(masks / f"{scene.name}.png", scene.classes, scene.shape()) for scene in scenes]
    predictions = predict(fit(train, taught, size, seed, device, steps), val, size)
    save_masks(predictions, val, out)
    print(f"mIoU {score(predictions, [scene.mask() for scene in val.scenes], len(val.classes)).miou():.1f}")


if __name__ == "__main__":
    cli(main)
