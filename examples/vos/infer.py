"""Propagate the first annotation through a clip, score the result, and paint it.

    python -m examples.vos.infer --data build/clips --checkpoint build/runs/soft/checkpoint.pt --out build/shown
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from examples.shared.commands import DEVICE, DataError, checked_device, cli, of_this_system, read_checkpoint
from examples.shared.rows import write
from examples.shared.sheets import Cell, save_sheet

from .attention import attention_of_first_object
from .batches import resized, resized_mask
from .config import Config
from .cycle import soft_masks
from .data import Clip, read_clips
from .metrics import Score, frame_scores, mean_scores, official
from .model import VOS, Frame
from .pictures import Look, row, save_pictures


class Step(NamedTuple):
    """What the network says of one frame."""

    frame: Frame
    logits: Tensor  # (1, 1 + O, h, w), background first
    present: Tensor  # bool (1, O)


@torch.no_grad()
def steps(model: VOS, clip: Clip, config: Config) -> Iterator[Step]:
    """Go through the clip from its second frame on.

    A frame's masks come from the annotated frame and the config.history frames before it.
    """
    model.eval()
    device = next(model.parameters()).device
    present = torch.ones(1, clip.objects, dtype=torch.bool, device=device)

    def image(t: int) -> Tensor:
        return resized(clip.image(t)[None], config.height).to(device)

    given = resized_mask(clip.first_mask(), image(0).shape[-2:])
    annotated, past = model.encode(model.features(image(0)), given[None].to(device), present), []
    for t in tqdm(range(1, len(clip)), desc=f"frames of {clip.name}", leave=False):
        frame = model.features(image(t))
        logits = model.decode([annotated, *past], present, frame)
        past = [*past, model.encode(frame, soft_masks(logits), present)][-config.history :]
        yield Step(frame, logits, present)


def propagate(model: VOS, clip: Clip, config: Config, watch: Callable[[int, Step], None] = lambda t, step: None) -> list[Tensor]:
    """The label of each pixel of each frame, int64 (H, W), 0 = background; that of frame 0 is its annotation.

    watch is called with the number of every other frame and what the network says of it.
    """
    first = clip.first_mask()
    labels = [torch.cat([1 - first.sum(0, keepdim=True), first]).argmax(0)]
    for t, step in enumerate(steps(model, clip, config), 1):
        labels.append(F.interpolate(step.logits, first.shape[-2:], mode="bilinear")[0].argmax(0).cpu())
        watch(t, step)
    return labels


def scored(clip: Clip) -> list[int]:
    """The annotated frames that are scored. As in DAVIS, the first frame, which was given, and the last do not count."""
    return [t for t in clip.annotated() if 0 < t < len(clip) - 1]


def need_scored(data: Path, clips: list[Clip]) -> None:
    """Raise DataError where these clips of `data` have no frame to judge by."""
    if not any(map(scored, clips)):
        raise DataError(data, "no frame to judge by: none between the first frame and the last is annotated")


def score(clip: Clip, labels: list[Tensor]) -> list[Score]:
    """The scores of those frames."""
    bar = tqdm(scored(clip), desc=f"scores of {clip.name}", leave=False)
    return [one for t in bar for one in frame_scores(clip.name, t, labels[t], clip.mask(t))]


def load(checkpoint: Path, device: str = "cpu") -> tuple[VOS, Config]:
    """The model of a checkpoint, and its configuration."""
    saved = read_checkpoint(checkpoint, device, "run", "model")
    with of_this_system(checkpoint):
        config = Config(**saved["run"]["config"])
        model = VOS(config, saved["run"]["masking"]).to(device)
        model.load_state_dict(saved["model"])
    return model, config


def shown(model: VOS, clip: Clip, config: Config) -> tuple[list[Tensor], Look | None]:
    """The labels of a clip, and what the network has in mind of the frame in its middle; None where there is only the first frame."""
    looks = {}

    def watch(t: int, step: Step) -> None:
        if t == len(clip) // 2:
            masks = soft_masks(step.logits)
            looks[t] = Look(t, masks[0].cpu(), attention_of_first_object(model, step.frame, masks, step.present))

    labels = propagate(model, clip, config, watch)
    return labels, looks.get(len(clip) // 2)


def main(data: Path, checkpoint: Path, out: Path, split: str = "val", device: str = DEVICE) -> None:
    """Propagate the first annotation through every clip, score the result, and paint it.

    Args:
        data: A folder in DAVIS layout.
        checkpoint: What examples.vos.train wrote.
        out: Where overlays, GIFs, labels, sheet.png and scores.csv go.
        split: The clips to propagate through.
        device: Where to run the model.
    """
    model, config = load(checkpoint, checked_device(device))
    scores: list[Score] = []
    rows: dict[str, tuple[float, list[Cell | None]]] = {}  # clip -> J&F and its row of the sheet
    for clip in tqdm(read_clips(data, split), desc="clips"):
        labels, look = shown(model, clip, config)
        own = score(clip, labels)
        save_pictures(out, clip, labels)
        if own and look:
            scores += own
            JF = mean_scores(own)[0]
            rows[clip.name] = JF, row(clip, labels, look, JF)
    if scores:
        write(out / "scores.csv", scores, decimals=4)
        ranked = sorted(rows.values(), key=lambda one: one[0], reverse=True)
        chosen = sorted({0, len(ranked) // 2, len(ranked) - 1})
        save_sheet(out / "sheet.png", [ranked[i][1] for i in chosen])
        print("  ".join(f"{name} {value:.1f}" for name, value in official(scores).items()))
        print(f"{out / 'sheet.png'}: {'the best, the median and the worst clip' if len(ranked) > 2 else 'all clips'}")
    else:
        print(f"no frame of {split} can be scored: none between the first frame and the last is annotated")


if __name__ == "__main__":
    cli(main)
