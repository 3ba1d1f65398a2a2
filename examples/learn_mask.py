"""A mask that nobody drew: learned from image labels alone, through the gradient that soft-masked attention has for its mask.

A picture is a mosaic of cells. Every cell has a colour and a grating. One cell, the object, has a colour between red and green, and its
grating is the picture's label. The mask head sees colour alone, so it can never know the label. The values that the attention reads hold
texture alone, so they never know where the object is. The one loss is the cross-entropy of the label. So the label is found only if the
mask is, and the mask is found only if a gradient comes through the attention. The inverted mask gains nothing: the other gratings are drawn
independently of the object's (if they excluded it, what is absent would tell the label), and alpha starts above 0. The same network is
trained in three ways:

    soft        smattn.nn.SoftMaskedAttention, the mask with its gradient
    detached    the same without that gradient
    hard        smattn.nn.HardMaskedAttention, which thresholds the mask, as most models do

    python -m examples.learn_mask           # trains 7 seeds of each and writes examples/results/learn_mask.csv and .png
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.shared.commands import Positive, cli
from examples.shared.maps import layer_map
from examples.shared.rows import RESULTS, write
from smattn.nn import HardMaskedAttention, SoftMaskedAttention, parameter_groups

MASKINGS = ("soft", "detached", "hard")
CLASSES, CELLS, SIDE = 6, 16, 32


class Pictures(NamedTuple):
    image: Tensor  # (B, 3, SIDE, SIDE)
    inside: Tensor  # bool (B, SIDE * SIDE): where the object is, which no loss sees
    label: Tensor  # int64 (B,): the object's grating


def draw(count: int, g: torch.Generator) -> Pictures:
    """Draw `count` mosaics of CELLS cells, of which cell 0 is the object."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    pixels = torch.stack([row, column], -1).view(1, -1, 2).float()  # (1, pixels, 2)
    cell = torch.cdist(pixels, torch.rand(count, CELLS, 2, generator=g) * SIDE).argmin(-1)  # (B, pixels)

    hue = (torch.rand(count, CELLS, generator=g) * 2 + 1) * (2 * math.pi / 3)  # The others have two thirds of the circle,
    hue[:, 0] = torch.rand(count, generator=g) * (2 * math.pi / 3)  # and the object the third between red and green.
    shift = torch.tensor([0.0, 2, 4]) * (math.pi / 3)
    colour = torch.cos(hue.gather(1, cell)[..., None] - shift) * 0.25  # (B, pixels, 3): the three channels sum to 0
    colour = colour + 0.05 * torch.randn(colour.shape, generator=g)

    grating = torch.randint(CLASSES, (count, CELLS), generator=g)
    angle = grating.gather(1, cell) * (math.pi / CLASSES)  # (B, pixels)
    phase = torch.rand(count, CELLS, generator=g).gather(1, cell) * (2 * math.pi)
    wave = torch.sin(1.5 * (pixels[..., 0] * torch.cos(angle) + pixels[..., 1] * torch.sin(angle)) + phase) * 0.2
    wave = wave + 0.05 * torch.randn(wave.shape, generator=g)

    image = (0.5 + colour + wave[..., None]).mT.reshape(count, 3, SIDE, SIDE)
    return Pictures(image, cell == 0, grating[:, 0])


class Network(nn.Module):
    """Colour gives the mask, and what one query reads of the texture under that mask gives the label."""

    def __init__(self, masking: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.masking = masking
        self.mask_head = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
        self.texture = nn.Sequential(nn.Conv2d(1, width, 7, padding=3, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = HardMaskedAttention(width, heads) if masking == "hard" else SoftMaskedAttention(width, heads, alpha_init=4.0)
        self.classify = nn.Linear(width, CLASSES)

    def mask(self, image: Tensor) -> Tensor:
        """The mask (B, 1, SIDE * SIDE) in [0, 1]. It sees differences of channels, in which the gratings, equal in all, cancel."""
        red, green, blue = image.flatten(2).unbind(1)
        return self.mask_head(torch.stack([red - green, blue - green], -1) * 4).sigmoid().mT

    def features(self, image: Tensor) -> Tensor:
        """The texture (B, SIDE * SIDE, width)."""
        lightness = image.mean(1, keepdim=True) - 0.5  # The colours cancel here, for their channels sum to 0.
        return self.texture(4 * lightness).flatten(2).mT

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, CLASSES) and the mask."""
        mask, features = self.mask(image), self.features(image)
        query = self.query.expand(len(image), -1, -1)
        read = self.attention(query, features, features, mask.detach() if self.masking == "detached" else mask)
        return self.classify(read[:, 0]), mask


def overlap(mask: Tensor, inside: Tensor) -> float:
    """Intersection over union of mask > 0.5 and the object, over all pictures together."""
    chosen = mask[:, 0] > 0.5
    return ((chosen & inside).sum() / (chosen | inside).sum()).item()


class Row(NamedTuple):
    masking: str
    seed: int
    step: int
    mask_iou: float
    inverted_iou: float  # of 1 - mask
    accuracy: float


def evaluate(network: Network, pictures: Pictures, seed: int, step: int) -> Row:
    with torch.no_grad():
        logits, mask = network(pictures.image)
    accuracy = (logits.argmax(-1) == pictures.label).float().mean().item()
    return Row(network.masking, seed, step, overlap(mask, pictures.inside), overlap(1 - mask, pictures.inside), accuracy)


def train(masking: str, seed: int, steps: int = 600, batch: int = 32, every: int = 50, quiet: bool = False) -> tuple[Network, list[Row]]:
    """Train one network; returns it and its rows on pictures that it never saw. The seed decides weights and pictures."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    unseen = draw(128, torch.Generator().manual_seed(10_000 + seed))
    network = Network(masking)
    optimizer = torch.optim.AdamW(parameter_groups(network, alpha_lr=0.03), lr=3e-3, weight_decay=0.0)
    rows = []
    for step in tqdm(range(steps + 1), desc=f"{masking} {seed}", disable=quiet, leave=False):
        if step % every == 0 or step == steps:
            rows.append(evaluate(network, unseen, seed, step))
        if step == steps:
            break
        pictures = draw(batch, g)
        logits, mask = network(pictures.image)
        loss = nn.functional.cross_entropy(logits, pictures.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, rows


def table(rows: list[Row]) -> str:
    """The Markdown table: medians over seeds at the last step, with the lowest and highest in brackets."""
    last = max(row.step for row in rows)
    lines = ["| masking | seeds | mask IoU | IoU of the inverted mask | seeds that end inverted | accuracy |", "| --- " * 6 + "|"]
    for masking in dict.fromkeys(row.masking for row in rows):
        final = [row for row in rows if row.masking == masking and row.step == last]
        spread = [
            f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
            for values in zip(*((row.mask_iou, row.inverted_iou, row.accuracy) for row in final), strict=True)
        ]
        inverted = sum(row.inverted_iou > row.mask_iou for row in final)
        lines.append(f"| {masking} | {len(final)} | {spread[0]} | {spread[1]} | {inverted} | {spread[2]} |")
    return "\n".join(lines)


def plot(rows: list[Row], networks: dict[str, Network], path: Path) -> None:
    """Plot the IoU of every seed over the steps, and beside it pictures that no network saw, their masks, and where the soft one looks."""
    import matplotlib.pyplot as plt

    pictures = draw(4, torch.Generator().manual_seed(10_000))
    masks, named = {}, {}
    with torch.no_grad():
        for masking, network in networks.items():
            logits, masks[masking] = network(pictures.image)
            named[masking] = logits.argmax(-1)
    soft = networks["soft"]
    attention = layer_map(soft.attention, soft.query.expand(4, -1, -1), soft.features(pictures.image), masks["soft"])
    shown = {"picture": pictures.image.movedim(1, -1).clamp(0, 1), "soft mask": masks["soft"]}
    shown["attention"] = attention / attention.amax(-1, keepdim=True)
    shown |= {f"{masking} mask": mask for masking, mask in masks.items()}
    figure, axes = plt.subplot_mosaic(
        [["iou", *(f"{what} {i}" for i in range(4))] for what in shown],
        figsize=(10, 7), width_ratios=[3.6, 1, 1, 1, 1], layout="constrained",
    )  # fmt: skip
    plot_courses(axes["iou"], rows, list(networks))
    for what, images in shown.items():
        masking = what.removesuffix(" mask")
        for i, image in enumerate(images):
            axis = axes[f"{what} {i}"]
            axis.imshow(image.view(SIDE, SIDE, -1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.contour(pictures.inside[i].view(SIDE, SIDE).numpy(), [0.5], colors="red", linewidths=0.8)
            axis.set(xticks=[], yticks=[])
            if what == "picture":
                axis.set_title(f"grating {pictures.label[i]}", fontsize=8)
            elif masking in masks:
                score = overlap(masks[masking][i : i + 1], pictures.inside[i : i + 1])
                axis.set_title(f"IoU {score:.2f}, taken for {named[masking][i]}", fontsize=8)
        axes[f"{what} 0"].set_ylabel("its attention" if what == "attention" else what)
    figure.savefig(path, dpi=110)


def plot_courses(axis: Any, rows: list[Row], maskings: list[str]) -> None:
    """Draw the IoU of every seed over the steps, and the median of the seeds."""
    for colour, masking in enumerate(maskings):
        courses = [[row for row in rows if (row.masking, row.seed) == (masking, seed)] for seed in sorted({row.seed for row in rows})]
        steps = [row.step for row in courses[0]]
        for course in courses:
            axis.plot(steps, [row.mask_iou for row in course], f"C{colour}", alpha=0.3, linewidth=0.8)
        median = [statistics.median(row.mask_iou for row in at) for at in zip(*courses, strict=True)]
        line = "--" if colour == 2 else "-"  # The lines of detached and hard may coincide.
        axis.plot(steps, median, f"C{colour}{line}", label=f"{masking}, median of {len(courses)} seeds", linewidth=2)
    axis.set(xlabel="step", ylabel="mask IoU on unseen pictures", ylim=(0, 1))
    axis.legend(loc="center right")


def main(seeds: Positive = 7, steps: Positive = 300, out: Path = RESULTS) -> None:
    """Train all networks with each seed, and write rows and a plot.

    Args:
        seeds: How many runs of each.
        steps: How many to train.
        out: The folder to write.
    """
    rows: list[Row] = []
    networks = {}
    for masking in MASKINGS:
        for seed in range(seeds):
            network, course = train(masking, seed, steps)
            rows += course
            networks.setdefault(masking, network)
    write(out / "learn_mask.csv", rows, decimals=4)
    plot(rows, networks, out / "learn_mask.png")
    print(table(rows))


if __name__ == "__main__":
    cli(main)
