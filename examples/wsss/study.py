"""The ablation. Each variant is trained with each seed, with the same steps and images for all.

    python -m examples.wsss.study --data build/scenes --out examples/results/wsss_synthetic

The scores become a CSV file, a table and a plot. Rows that the CSV file already has are not computed again, so a study that was stopped
goes on. Each run takes its thresholds from training images, and all scores are of the val split.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from examples.shared.commands import Positive, cli
from examples.shared.plots import dots
from examples.shared.resumable import train
from examples.shared.rows import files_of, read, write
from examples.shared.where import here, note

from .config import CONFIGS, Config
from .data import Scenes, read_scenes
from .evaluate import score, tokens_right
from .pictures import save_scenes
from .pseudo_masks import CHOSEN_ON, Seen, Thresholds, choose, enlarged, pseudo_masks, see
from .segment import fit, predict
from .train import Run, Trainer

VARIANTS: dict[str, dict[str, Any]] = {  # name -> what differs from the configuration
    "full": {},
    "masking 0": {"masking_rate": 0.0},
    "masking 1": {"masking_rate": 1.0},
    "no gates": {"gates": False},
    "no register": {"register": False},
    "no diversity": {"diversity": 0.0},
}
SEGMENTED = ("full",)  # A segmentation network learns from the pseudo-masks of these variants.
SCORES = ("token_accuracy", "pseudo", "pseudo_all_heads", "segmentation", "labels_right")


class Row(NamedTuple):
    variant: str
    seed: int
    steps: int
    token_accuracy: float  # percent, as the next four are
    pseudo: float  # mIoU of the pseudo-masks
    pseudo_all_heads: float  # the same with the closed heads in the maps and thresholds chosen again
    segmentation: float  # mIoU of the network that learned from the pseudo-masks, NaN where there is none
    labels_right: float  # share of the (image, class) pairs that the classifier gets right
    open_heads: int
    heads: int
    low: float
    high: float
    machine: str
    commit: str


def compute(variant: str, seed: int, config: Config, train_data: Scenes, val: Scenes, runs: Path) -> Row:
    """Train one variant with one seed and score it on val."""
    out = runs / f"{variant.replace(' ', '-')}-{seed}"
    trainer = Trainer(Run(dataclasses.replace(config, **VARIANTS[variant]), train_data.classes, seed), train_data)
    train(trainer, out, resume=True)
    model, truth = trainer.model, [scene.mask() for scene in val.scenes]
    few = Scenes(train_data.classes, train_data.scenes[:CHOSEN_ON])

    def judged(all_heads: bool) -> tuple[Seen, Thresholds, list[Tensor], float]:
        thresholds, seen = choose(see(model, few, all_heads), few), see(model, val, all_heads)
        masks = pseudo_masks(seen, val, thresholds)
        return seen, thresholds, masks, score(masks, truth, len(val.classes)).miou()

    seen, thresholds, masks, pseudo = judged(all_heads=False)
    open_heads = sum(model.open_heads())
    everything = pseudo if open_heads == config.depth * config.heads else judged(all_heads=True)[-1]
    images = zip(tqdm(seen.maps, desc="token accuracy", leave=False), truth, strict=True)
    counts = [tokens_right(enlarged(maps, true.shape), true) for maps, true in images]
    right, shown = map(sum, zip(*counts, strict=True))
    present = torch.stack([scene.present() for scene in val.scenes])
    told = ((seen.probability > 0.5) == present).float().mean().item()
    segmentation, predictions = float("nan"), list[Tensor]()
    if variant in SEGMENTED:
        network = fit(train_data, pseudo_masks(see(model, train_data), train_data, thresholds), config.size, seed)
        predictions = predict(network, val, config.size)
        segmentation = score(predictions, truth, len(val.classes)).miou()
    kinds = {"pseudo-mask": masks} | ({"segmentation": predictions} if predictions else {})
    save_scenes(out / "sheet.png", val, seen.maps, kinds)
    return Row(
        variant, seed, config.steps, 100 * right / shown, pseudo, everything, segmentation, 100 * told,
        open_heads, config.depth * config.heads, *thresholds, *here(),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The Markdown table: a line for each variant, over its seeds; below it, where the runs come from."""
    scores = ["token accuracy", "pseudo-mask mIoU", "with closed heads in", "segmentation mIoU", "labels right"]
    header = ["variant", "seeds", *scores, "open heads"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for name in dict.fromkeys(row.variant for row in rows):
        runs = [row for row in rows if row.variant == name]
        columns = (spread([getattr(run, column) for run in runs]) for column in SCORES)
        heads = f"{', '.join(str(run.open_heads) for run in runs)} of {runs[0].heads}"
        lines.append(f"| {name} | {len(runs)} | {' | '.join(columns)} | {heads} |")
    return "\n".join(lines) + "\n\n" + note(rows)


def spread(values: list[float]) -> str:
    """The mean with [lowest, highest], or a dash where a value is NaN."""
    if any(value != value for value in values):
        return "–"
    return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def plot(rows: list[Row], path: Path) -> None:
    """Plot token accuracy and mIoU of every run, and their means."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.variant for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    titles = {"token_accuracy": "token accuracy, %", "pseudo": "mIoU of the pseudo-masks, %"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        dots(panel, {name: [getattr(row, column) for row in rows if row.variant == name] for name in names}, statistics.mean)
        panel.set_title(title)
        panel.tick_params("x", rotation=20)
        panel.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main(
    data: Path,
    out: Path,
    runs: Path = Path("build/runs"),
    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS),
    seeds: Positive = 3,
    config: Literal[tuple(CONFIGS)] = "small",
) -> None:
    """The ablation: train each variant with each seed, and write their scores, a table and a plot.

    Args:
        data: A folder in VOC layout.
        out: The files to write, without .csv and .png.
        runs: Where checkpoints, logs and sheets go.
        variants: Who takes part.
        seeds: How many runs of each.
        config: Sizes, learning rates and the number of steps.
    """
    found, drawn = files_of(out)
    train_data, val, rows = read_scenes(data, "train"), read_scenes(data, "val"), read(found, Row)
    for variant in variants:
        for seed in range(seeds):
            if all((row.variant, row.seed) != (variant, seed) for row in rows):
                rows.append(compute(variant, seed, CONFIGS[config], train_data, val, runs))
                rows.sort(key=lambda row: (list(VARIANTS).index(row.variant), row.seed))
                write(found, rows)
    plot(rows, drawn)
    print(table(rows))


if __name__ == "__main__":
    cli(main)
