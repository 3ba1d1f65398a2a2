"""Training that resumes bit for bit. It is for examples in which each step depends on nothing but the seed and the step's number."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .commands import DataError, read_checkpoint


class Resumable:
    """A model, its optimizer and the step that they have reached. A subclass sets these attributes and defines `advance`."""

    LOG: tuple[str, ...]  # the columns of the log
    run: Any  # a dataclass that says what the run is; run.config has `steps`
    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    device: str

    def advance(self) -> tuple[float, ...]:
        """Take one step; returns its row of the log: step, loss, and what else LOG names."""
        raise NotImplementedError

    def shown(self, row: tuple[float, ...]) -> dict[str, Any]:
        """What the progress bar shows of a row."""
        return {"loss": f"{row[1]:.3f}"}

    def save(self, path: Path) -> None:
        """Write the checkpoint beside and rename it, so that a run that is killed leaves the one before."""
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
        saved = read_checkpoint(path, self.device, "run", "step", "model", "optimizer", "schedule")
        if differences := _differences(saved["run"], dataclasses.asdict(self.run)):
            raise DataError(path, f"a checkpoint of another run, with {'; '.join(differences)}")
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])


def _differences(there: dict[str, Any], here: dict[str, Any], within: str = "") -> list[str]:
    """What the two runs do not have in common, "name value there, not value here" each."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{within}{name}.")
        elif one != other:
            found.append(f"{within}{name} {one}, not {other}")
    return found


def warmup_and_cosine(step: int, config: Any) -> float:
    """The factor on the learning rates. config has `steps` and `warmup`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def train(trainer: Resumable, out: Path, resume: bool = False, save_every: int = 100, stop: int | None = None) -> None:
    """Train to the last step, or to `stop`. Writes out/log.csv and out/checkpoint.pt, and without `resume` never over those of a run."""
    checkpoint, log, kept = out / "checkpoint.pt", out / "log.csv", []
    if not resume and (checkpoint.exists() or log.exists()):
        raise DataError(out, "has a run in it already: --resume goes on with it, another --out keeps it")
    out.mkdir(parents=True, exist_ok=True)
    if resume and checkpoint.exists():
        trainer.restore(checkpoint)
        with open(log, newline="") as file:  # The steps after the checkpoint will be repeated.
            kept = [row for row in csv.reader(file)][1 : 1 + trainer.step]
    steps = trainer.run.config.steps if stop is None else stop
    with open(log, "w", newline="") as file, tqdm(total=steps, initial=trainer.step, desc=out.name) as bar:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([trainer.LOG, *kept])
        while trainer.step < steps:
            row = trainer.advance()
            writer.writerow([row[0], *(f"{value:.6g}" for value in row[1:])])
            bar.set_postfix(**trainer.shown(row))
            bar.update()
            if trainer.step % save_every == 0 or trainer.step == steps:
                file.flush()
                trainer.save(checkpoint)
