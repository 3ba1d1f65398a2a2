"""Train on image labels alone. A step depends on seed and number alone: a resumed run repeats an unbroken one bit for bit.

    python -m wsss.train --data scenes --out runs/full     # from the folder examples/
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import losses
from .config import CONFIGS, Config
from .data import Scenes, read_scenes
from .gates import HardConcrete
from .model import ViT
from .pretrained import load_timm

LOG = ("step", "loss", "classification", "diversity", "expected_open", "open_heads")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is: the same Run on the same images gives the same weights."""

    config: Config
    classes: tuple[str, ...]
    seed: int = 0


class Trainer:
    """A model, its optimizer and the step they are at."""

    def __init__(self, run: Run, data: Scenes, device: str = "cpu") -> None:
        torch.manual_seed(run.seed)
        self.run, self.data, self.device, self.step = run, data, device, 0
        config = run.config
        self.model = ViT(config, len(run.classes))
        if config.timm is not None:
            load_timm(self.model, config.timm)
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=config.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_and_cosine(step, config))

    def advance(self) -> tuple[float, ...]:
        """One step; the row of the log."""
        config = self.run.config
        g = torch.Generator().manual_seed(1_000_003 * self.run.seed + self.step)
        images, chosen, _ = batch_of(self.data, config.batch, config.size, g)
        present = torch.stack([self.data.scenes[i].present() for i in chosen.tolist()])
        images, present = images.to(self.device), present.to(self.device)
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))  # what the model draws: gates and masking
        self.model.train()
        logits, maps = self.model(images, present, with_maps=config.diversity > 0)
        told, expected_open = losses.classification(logits, present), self.model.expected_open()
        overlap = losses.diversity(maps) if maps is not None else logits.new_zeros(())
        loss = told + config.diversity * overlap + config.sparsity * expected_open
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return (self.step, loss.item(), told.item(), overlap.item(), expected_open.item(), sum(self.model.open_heads()))

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


def batch_of(data: Scenes, count: int, size: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 3, size, size) in [0, 1], which of the set they are (count,), and which are mirrored, bool (count,)."""
    chosen = torch.randint(len(data), (count,), generator=g)
    mirror = torch.rand(count, generator=g) < 0.5
    images = torch.stack([data.scenes[i].image(size) for i in chosen.tolist()]).float() / 255
    return torch.where(mirror[:, None, None, None], images.flip(-1), images), chosen, mirror


def parameter_groups(model: ViT) -> list[dict]:
    """Gates learn faster than the rest, and neither they nor norms, biases and tokens decay."""
    config = model.config
    gates = [gate.log_a for gate in model.modules() if isinstance(gate, HardConcrete)]
    rest = [p for p in model.parameters() if all(p is not gate for gate in gates)]
    decays = [p for p in rest if p.dim() > 1 and p is not model.extra_tokens and p is not model.pos_embed]
    others = [p for p in rest if all(p is not q for q in decays)]
    return [
        {"params": decays, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "lr": config.gate_lr * config.lr},
    ]


def warmup_and_cosine(step: int, config: Config) -> float:
    """The factor on the learning rates."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


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
            bar.set_postfix(loss=f"{row[1]:.3f}", open=row[-1])
            bar.update()
            if trainer.step % save_every == 0 or trainer.step == steps:
                file.flush()
                trainer.save(checkpoint)


def load(checkpoint: Path, device: str = "cpu") -> tuple[ViT, tuple[str, ...]]:
    """The model of a checkpoint, in evaluation, and the names of its classes."""
    saved = torch.load(checkpoint, map_location=device, weights_only=True)
    model = ViT(Config(**saved["run"]["config"]), len(saved["run"]["classes"])).to(device)
    model.load_state_dict(saved["model"])
    return model.eval(), tuple(saved["run"]["classes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in VOC layout")
    parser.add_argument("--out", type=Path, required=True, help="where log.csv and checkpoint.pt go")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    for name in ("size", "steps", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the configuration's")
    for name in ("masking-rate", "diversity", "sparsity"):
        parser.add_argument(f"--{name}", type=float, help="instead of the configuration's")
    for name in ("register", "gates"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="instead of the configuration's")
    parser.add_argument("--timm", help="a timm ViT whose weights to begin with, instead of the configuration's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    instead = ("size", "steps", "batch", "masking_rate", "diversity", "sparsity", "register", "gates", "timm")
    config = dataclasses.replace(CONFIGS[a.config], **{name: getattr(a, name) for name in instead if getattr(a, name) is not None})
    data = read_scenes(a.data, "train")
    train(Trainer(Run(config, data.classes, a.seed), data, a.device), a.out, a.resume)


if __name__ == "__main__":
    main()
