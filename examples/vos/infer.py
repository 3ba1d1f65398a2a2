"""Propagate the first annotation through a clip, score the result, and paint it.

    python -m examples.vos.infer --data build/clips --checkpoint build/runs/soft/checkpoint.pt --out build/shown
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from examples.shared.commands import DEVICE, checked_device, cli, of_this_system, read_checkpoint
from examples.shared.rows import write

from .batches import resized, resized_mask
from .config import Config
from .cycle import soft_masks
from .data import Clip, read_clips
from .metrics import Score, frame_scores, mean_scores, official
from .model import VOS
from .pictures import save_pictures, save_sheet


@torch.no_grad()
def propagate(model: VOS, clip: Clip, config: Config) -> list[Tensor]:
    """The label of each pixel of each frame, int64 (H, W), 0 = background; that of frame 0 is its annotation.

    A frame's masks come from the annotated frame and the config.history frames before it.
    """
    model.eval()
    device = next(model.parameters()).device
    first = clip.first_mask()
    present = torch.ones(1, clip.objects, dtype=torch.bool, device=device)

    def image(t: int) -> Tensor:
        return resized(clip.image(t)[None], config.height).to(device)

    given = resized_mask(first, image(0).shape[-2:])
    annotated, past = model.encode(model.features(image(0)), given[None].to(device), present), []
    labels = [torch.cat([1 - first.sum(0, keepdim=True), first]).argmax(0)]
    for t in tqdm(range(1, len(clip)), desc=clip.name, leave=False):
        frame = model.features(image(t))
        logits = model.decode([annotated, *past], present, frame)
        past = [*past, model.encode(frame, soft_masks(logits), present)][-config.history :]
        labels.append(F.interpolate(logits, first.shape[-2:], mode="bilinear")[0].argmax(0).cpu())
    return labels


def score(clip: Clip, labels: list[Tensor]) -> list[Score]:
    """The scores of the annotated frames. As in DAVIS, the first frame, which was given, and the last do not count."""
    frames = [t for t in clip.annotated() if 0 < t < len(clip) - 1]
    bar = tqdm(frames, desc=f"scores of {clip.name}", leave=False)
    return [one for t in bar for one in frame_scores(clip.name, t, labels[t], clip.mask(t))]


def load(checkpoint: Path, device: str = "cpu") -> tuple[VOS, Config]:
    """The model of a checkpoint, and its configuration."""
    saved = read_checkpoint(checkpoint, device, "run", "model")
    with of_this_system(checkpoint):
        config = Config(**saved["run"]["config"])
        model = VOS(config, saved["run"]["masking"]).to(device)
        model.load_state_dict(saved["model"])
    return model, config


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
    for clip in tqdm(read_clips(data, split), desc="clips"):
        labels = propagate(model, clip, config)
        scores += score(clip, labels)
        save_pictures(out, clip, labels)
    if scores:
        write(out / "scores.csv", scores, decimals=4)
        of_clips = {name: mean_scores([one for one in scores if one.clip == name])[0] for name in {one.clip: None for one in scores}}
        ranked = sorted(of_clips, key=of_clips.__getitem__, reverse=True)
        shown = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
        save_sheet(out, shown)
        print("  ".join(f"{name} {value:.1f}" for name, value in official(scores).items()))
        print("sheet.png: best, median and worst clip,", ", ".join(f"{name} {of_clips[name]:.1f}" for name in shown))


if __name__ == "__main__":
    cli(main)
