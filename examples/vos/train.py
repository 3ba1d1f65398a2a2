"""Train from the first annotation of each clip.

    python -m examples.vos.train --data build/clips --out build/runs/soft

A step depends on the seed and its own number alone, so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import torch

from examples.shared.commands import DEVICE, PositiveOrNone, SettingError, checked_device, cli, read_checkpoint
from examples.shared.resumable import Resumable, train, warmup_and_cosine
from smattn.nn import Masking, SoftMaskedAttention, parameter_groups

from .batches import sample
from .config import CONFIGS, Config
from .cycle import CYCLES, run
from .data import Clip, read_clips
from .losses import loss
from .model import VOS


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a run: the same Run on the same clips gives the same weights."""

    config: Config
    masking: Masking = "soft"
    cycles: str = "all"
    seed: int = 0


class Trainer(Resumable):
    """Trains a VOS on clips. start: weights of another run to begin with."""

    LOG = ("step", "loss", "dice", "cross_entropy", "alpha_lowest", "alpha_highest")

    def __init__(self, run: Run, clips: list[Clip], device: str = "cpu", start: dict[str, Any] | None = None) -> None:
        torch.manual_seed(run.seed)
        self.run, self.clips, self.device, self.step = run, clips, device, 0
        self.model = VOS(run.config, run.masking).to(device)
        if start is not None:
            try:
                self.model.load_state_dict(start)
            except RuntimeError as error:
                raise SettingError(f"--start: its weights are not of a network with masking {run.masking!r} and these sizes") from error
        config = run.config
        groups = parameter_groups(self.model, alpha_lr=config.alpha_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_and_cosine(step, config))

    def advance(self) -> tuple[float, ...]:
        """Take one step; returns its row of the log."""
        config = self.run.config
        g = torch.Generator().manual_seed(1_000_003 * self.run.seed + self.step)
        torch.manual_seed(g.initial_seed())  # Dropout draws from the global generator.
        progress = self.step / config.steps
        batch = sample(self.clips, config, progress, g)
        batch = type(batch)(*(tensor.to(self.device) for tensor in batch))
        turns = CYCLES["frame0" if progress < config.cycles_from else self.run.cycles]
        ends = run(self.model, batch, turns[self.step % len(turns)])
        parts = torch.stack([torch.stack(loss(end.logits, batch.mask_again, batch.present, end.known)) for end in ends]).mean(0)
        self.optimizer.zero_grad()
        parts.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return (self.step, parts.sum().item(), *parts.tolist(), *alpha_range(self.model))


def alpha_range(model: VOS) -> tuple[float, float]:
    """The lowest and the highest alpha; NaN where nothing is masked."""
    alphas = [m.scaling_factors for m in model.modules() if isinstance(m, SoftMaskedAttention)]
    return (torch.cat(alphas).min().item(), torch.cat(alphas).max().item()) if alphas else (math.nan, math.nan)


def main(
    data: Path,
    out: Path,
    config: Literal[tuple(CONFIGS)] = "small",
    steps: PositiveOrNone = None,
    masking: Masking = "soft",
    cycles: Literal[tuple(CYCLES)] = "all",
    seed: int = 0,
    start: Path | None = None,
    resume: bool = False,
    device: str = DEVICE,
) -> None:
    """Train from the first annotation of each clip.

    Args:
        data: A folder in DAVIS layout.
        out: Where log.csv and checkpoint.pt go.
        config: Sizes, learning rates and the number of steps.
        steps: Instead of the configuration's.
        masking: How the encoder's attention takes the masks.
        cycles: The paths through the frames.
        seed: Decides weights and batches.
        start: A checkpoint whose weights to begin with.
        resume: Go on from the checkpoint in --out.
        device: Where to train.
    """
    checked_device(device)
    sizes = CONFIGS[config] if steps is None else dataclasses.replace(CONFIGS[config], steps=steps)
    weights = read_checkpoint(start, device, "model")["model"] if start else None
    train(Trainer(Run(sizes, masking, cycles, seed), read_clips(data, "train"), device, weights), out, resume)


if __name__ == "__main__":
    cli(main)
