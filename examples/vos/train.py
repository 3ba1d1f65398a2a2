"""Train from the first annotation of each clip.

    python -m examples.vos.train --data build/clips --out build/runs/soft

A step depends on the seed and its own number alone, so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import torch

from examples.shared.commands import add_device, checked_device, read_checkpoint, said_in_one_line
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
            self.model.load_state_dict(start)
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


@said_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in DAVIS layout")
    parser.add_argument("--out", type=Path, required=True, help="where log.csv and checkpoint.pt go")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--masking", choices=get_args(Masking), default="soft")
    parser.add_argument("--cycles", choices=CYCLES, default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to begin with")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    add_device(parser)
    a = parser.parse_args()
    device = checked_device(a.device)
    config = CONFIGS[a.config] if a.steps is None else dataclasses.replace(CONFIGS[a.config], steps=a.steps)
    start = read_checkpoint(a.start, device, "model")["model"] if a.start else None
    trainer = Trainer(Run(config, a.masking, a.cycles, a.seed), read_clips(a.data, "train"), device, start)
    train(trainer, a.out, a.resume)


if __name__ == "__main__":
    main()
