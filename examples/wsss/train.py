"""Train on image labels alone.

    python -m examples.wsss.train --data build/scenes --out build/runs/full

A step depends on the seed and its own number alone, so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from examples.shared.commands import DEVICE, PositiveOrNone, checked_device, cli, of_this_system, read_checkpoint
from examples.shared.resumable import Resumable, train, warmup_and_cosine

from . import losses
from .config import CONFIGS, Config
from .data import Scenes, read_scenes
from .gates import HardConcrete
from .model import ViT
from .pretrained import load_timm


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a run: the same Run on the same images gives the same weights."""

    config: Config
    classes: tuple[str, ...]
    seed: int = 0


class Trainer(Resumable):
    """Trains a ViT on scenes."""

    LOG = ("step", "loss", "classification", "diversity", "expected_open", "open_heads")

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
        """Take one step; returns its row of the log."""
        config = self.run.config
        g = torch.Generator().manual_seed(1_000_003 * self.run.seed + self.step)
        images, chosen, _ = batch_of(self.data, config.batch, config.size, g)
        present = torch.stack([self.data.scenes[i].present() for i in chosen.tolist()])
        images, present = images.to(self.device), present.to(self.device)
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))  # Gates and masking draw from the global generator.
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

    def shown(self, row: tuple[float, ...]) -> dict[str, Any]:
        return super().shown(row) | {"open": row[-1]}


def batch_of(data: Scenes, count: int, size: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images (count, 3, size, size) in [0, 1]; returns them, their numbers (count,) in the set, and which are mirrored, bool."""
    chosen = torch.randint(len(data), (count,), generator=g)
    mirror = torch.rand(count, generator=g) < 0.5
    images = torch.stack([data.scenes[i].image(size) for i in chosen.tolist()]).float() / 255
    return torch.where(mirror[:, None, None, None], images.flip(-1), images), chosen, mirror


def parameter_groups(model: ViT) -> list[dict[str, Any]]:
    """Groups for the optimizer: gates learn faster than the rest, and gates, norms, biases and tokens do not decay."""
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


def load(checkpoint: Path, device: str = "cpu") -> tuple[ViT, tuple[str, ...]]:
    """The model of a checkpoint, in evaluation mode, and the names of its classes."""
    saved = read_checkpoint(checkpoint, device, "run", "model")
    with of_this_system(checkpoint):
        model = ViT(Config(**saved["run"]["config"]), len(saved["run"]["classes"])).to(device)
        model.load_state_dict(saved["model"])
    return model.eval(), tuple(saved["run"]["classes"])


def main(
    data: Path,
    out: Path,
    config: Literal[tuple(CONFIGS)] = "small",
    size: PositiveOrNone = None,
    steps: PositiveOrNone = None,
    batch: PositiveOrNone = None,
    masking_rate: float | None = None,
    diversity: float | None = None,
    sparsity: float | None = None,
    register: bool | None = None,
    gates: bool | None = None,
    timm: str | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = DEVICE,
) -> None:
    """Train on image labels alone. What is None is the configuration's.

    Args:
        data: A folder in VOC layout.
        out: Where log.csv and checkpoint.pt go.
        config: Sizes, strengths and the number of steps.
        size: Images are resized to squares of this side.
        steps: How many to train.
        batch: Images a step.
        masking_rate: Of the tokens of absent classes.
        diversity: Weight of the loss that keeps the maps of two classes apart.
        sparsity: Weight of the expected number of open heads.
        register: One more token, which belongs to no class.
        gates: A gate on every head.
        timm: A timm ViT whose weights to begin with.
        seed: Decides weights and batches.
        resume: Go on from the checkpoint in --out.
        device: Where to train.
    """
    checked_device(device)
    instead = dict(
        size=size, steps=steps, batch=batch, masking_rate=masking_rate, diversity=diversity, sparsity=sparsity,
        register=register, gates=gates, timm=timm,
    )  # fmt: skip
    sizes = dataclasses.replace(CONFIGS[config], **{name: value for name, value in instead.items() if value is not None})
    scenes = read_scenes(data, "train")
    train(Trainer(Run(sizes, scenes.classes, seed), scenes, device), out, resume)


if __name__ == "__main__":
    cli(main)
