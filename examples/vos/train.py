"""Train from the first annotation of each clip. A step depends on seed and number alone: a resumed run repeats an unbroken one bit for bit.

    python -m vos.train --data clips --out runs/soft     # from the folder examples/
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from smattn.nn import Masking, SoftMaskedAttention, parameter_groups

from .batches import sample
from .config import CONFIGS, Config
from .cycle import CYCLES, run
from .data import Clip, read_clips, said_in_one_line
from .losses import loss
from .model import VOS

LOG = ("step", "loss", "dice", "cross_entropy", "alpha_lowest", "alpha_highest")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is: the same Run on the same clips gives the same weights."""

    config: Config
    masking: Masking = "soft"
    cycles: str = "all"
    seed: int = 0


class Trainer:
    """A model, its optimizer and the step they are at."""

    def __init__(self, run: Run, clips: list[Clip], device: str = "cpu", start: dict[str, Any] | None = None) -> None:
        torch.manual_seed(run.seed)
        self.run, self.clips, self.device, self.step = run, clips, device, 0
        self.model = VOS(run.config, run.masking).to(device)
        if start is not None:  # weights of another run to begin with
            self.model.load_state_dict(start)
        config = run.config
        groups = parameter_groups(self.model, alpha_lr=config.alpha_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_and_cosine(step, config))

    def advance(self) -> tuple[float, ...]:
        """One step; the row of the log."""
        config = self.run.config
        g = torch.Generator().manual_seed(1_000_003 * self.run.seed + self.step)
        torch.manual_seed(g.initial_seed())  # dropout's
        progress = self.step / config.steps
        batch = sample(self.clips, config, progress, g)
        batch = type(batch)(*(tensor.to(self.device) for tensor in batch))
        turns = CYCLES["frame0" if progress < config.cycles_from else self.run.cycles]
        ends = run(self.model, batch, turns[self.step % len(turns)])
        parts = torch.stack([torch.stack(loss(logits, batch.mask_again, batch.present)) for logits in ends]).mean(0)
        self.optimizer.zero_grad()
        parts.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return (self.step, parts.sum().item(), *parts.tolist(), *alpha_range(self.model))

    def save(self, path: Path) -> None:
        """Written beside and renamed: a run that is killed leaves the checkpoint before."""
        saved = {
            "run": dataclasses.asdict(self.run),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        torch.save(saved, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def restore(self, path: Path) -> None:
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["run"] != dataclasses.asdict(self.run):
            raise ValueError(f"{path}: a checkpoint of another run, {saved['run']}; this one is {dataclasses.asdict(self.run)}")
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])


def warmup_and_cosine(step: int, config: Config) -> float:
    """The factor on the learning rates."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def alpha_range(model: VOS) -> tuple[float, float]:
    alphas = [m.scaling_factors for m in model.modules() if isinstance(m, SoftMaskedAttention)]
    return (torch.cat(alphas).min().item(), torch.cat(alphas).max().item()) if alphas else (math.nan, math.nan)


def train(trainer: Trainer, out: Path, resume: bool = False, save_every: int = 100, stop: int | None = None) -> None:
    """To the last step (or to `stop`), with out/log.csv and out/checkpoint.pt."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log, kept = out / "checkpoint.pt", out / "log.csv", []
    if resume and checkpoint.exists():
        trainer.restore(checkpoint)
        with open(log, newline="") as file:  # rows after the checkpoint are of steps that will be repeated
            kept = [row for row in csv.reader(file)][1 : 1 + trainer.step]
    steps = trainer.run.config.steps if stop is None else stop
    with open(log, "w", newline="") as file, tqdm(total=steps, initial=trainer.step, desc=out.name) as bar:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([LOG, *kept])
        while trainer.step < steps:
            row = trainer.advance()
            writer.writerow([row[0], *(f"{value:.6g}" for value in row[1:])])
            bar.set_postfix(loss=f"{row[1]:.3f}")
            bar.update()
            if trainer.step % save_every == 0 or trainer.step == steps:
                file.flush()
                trainer.save(checkpoint)


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    config = CONFIGS[a.config] if a.steps is None else dataclasses.replace(CONFIGS[a.config], steps=a.steps)
    start = torch.load(a.start, map_location=a.device, weights_only=True)["model"] if a.start else None
    trainer = Trainer(Run(config, a.masking, a.cycles, a.seed), read_clips(a.data, "train"), a.device, start)
    train(trainer, a.out, a.resume)


if __name__ == "__main__":
    main()
