"""Contestants on one data set. Each is trained with each seed, with the same steps, batches and inference for all.

    python -m examples.vos.study --data build/clips --out examples/results/vos_synthetic

The scores become a CSV file, a table and a plot. Runs that the CSV file already has from this machine are not repeated, so a study that was
stopped goes on.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from examples.shared.commands import DataError, Positive, PositiveOrNone, SettingError, cli, read_checkpoint
from examples.shared.plots import dots
from examples.shared.resumable import train
from examples.shared.rows import files_of, read, write
from examples.shared.where import here, note

from .config import CONFIGS, Config
from .data import Clip, read_clips
from .infer import need_scored, propagate, score
from .metrics import Score, mean_scores
from .train import Run, Trainer

CONTESTANTS = {  # name -> masking and cycles
    "soft": ("soft", "all"),
    "hard": ("hard", "all"),
    "detached": ("detached", "all"),
    "none": ("none", "all"),
    "ground": ("soft", "ground"),  # Its cycles end on the ground of another frame.
    "ground-detached": ("detached", "ground"),
    "frame0": ("soft", "frame0"),  # It sees the annotated frame alone.
    "oracle": ("soft", "frame0"),  # The same with every annotation that the clips have shows what could be won.
    "copy": None,  # The first mask stands in every frame, without a network.
}


class Row(NamedTuple):
    contestant: str
    seed: int
    steps: int
    frame: int  # -1 stands for all frames and objects, averaged as DAVIS does
    JF: float
    J: float
    F: float
    machine: str
    commit: str


def rows_of(contestant: str, seed: int, steps: int, scores: list[Score]) -> Iterable[Row]:
    """The row over all frames, and then one for each frame."""
    where = here()
    yield Row(contestant, seed, steps, -1, *mean_scores(scores), *where)
    for t in sorted({one.frame for one in scores}):
        yield Row(contestant, seed, steps, t, *mean_scores([one for one in scores if one.frame == t]), *where)


def contest(name: str, seed: int, config: Config, clips: list[Clip], judged: list[Clip], runs: Path, start: Any) -> list[Row]:
    """Train one contestant on `clips` and score it on `judged`. start: the weights to begin with, or None."""
    if CONTESTANTS[name] is None:
        return list(rows_of(name, seed, 0, [one for clip in judged for one in score(clip, [copied(clip)] * len(clip))]))
    masking, cycles = CONTESTANTS[name]
    if name == "oracle":
        clips = [dataclasses.replace(clip, frames=clip.frames[t:] + clip.frames[:t]) for clip in clips for t in clip.annotated()]
    trainer = Trainer(Run(config, masking, cycles, seed), clips, start=start)
    train(trainer, runs / f"{name}-{seed}", resume=True)
    return list(rows_of(name, seed, config.steps, [one for clip in judged for one in score(clip, propagate(trainer.model, clip, config))]))


def copied(clip: Clip) -> Tensor:
    """The label of each pixel of the first frame, int64 (H, W), 0 = background."""
    first = clip.first_mask()
    return torch.cat([1 - first.sum(0, keepdim=True), first]).argmax(0)


def table(rows: list[Row]) -> str:
    """The Markdown table: a line for each contestant on each machine, over its seeds; below it, where the runs come from."""
    lines = ["| contestant | machine | steps | J&F median | mean ± std | each seed | J | F |", "| --- " * 8 + "|"]
    whole = [row for row in rows if row.frame < 0]
    machines = list(dict.fromkeys(row.machine for row in whole))
    for name, machine in dict.fromkeys((row.contestant, row.machine) for row in whole):
        runs = sorted((row for row in whole if (row.contestant, row.machine) == (name, machine)), key=lambda row: row.seed)
        JF = [run.JF for run in runs]
        spread = f"{statistics.mean(JF):.1f} ± {statistics.stdev(JF) if len(JF) > 1 else 0:.1f} | {', '.join(f'{one:.1f}' for one in JF)}"
        J, F = (f"{statistics.mean(column):.1f}" for column in ([run.J for run in runs], [run.F for run in runs]))
        number = 1 + machines.index(machine)
        lines.append(f"| {name} | {number} | {runs[0].steps} | {statistics.median(JF):.1f} | {spread} | {J} | {F} |")
    return "\n".join(lines) + "\n\n" + note(whole)


def differences(rows: list[Row]) -> str:
    """The Markdown table of how far the first contestant is ahead of the others on each machine: of their means, with its standard error.

    Runs are not paired by seed. A seed decides weights and batches, but training is chaotic, and rounding alone takes two runs of one seed
    as far apart as two seeds.
    """
    JF: dict[tuple[str, str], list[float]] = {}  # (machine, contestant) -> one of each run
    for row in rows:
        if row.frame < 0:
            JF.setdefault((row.machine, row.contestant), []).append(row.JF)
    first, machines = rows[0].contestant, list(dict.fromkeys(machine for machine, _ in JF))
    lines = [f"| {first} is ahead of | machine | J&F, mean ± standard error | runs of each |", "| --- " * 4 + "|"]
    for (machine, name), there in JF.items():
        own = JF.get((machine, first), [])
        if name != first and len(own) > 1 and len(there) > 1:
            error = math.sqrt(sum(statistics.variance(runs) / len(runs) for runs in (own, there)))
            ahead = f"{statistics.mean(own) - statistics.mean(there):+.1f} ± {error:.1f}"
            lines.append(f"| {name} | {1 + machines.index(machine)} | {ahead} | {len(own)}, {len(there)} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Plot every run's J&F and the median, and beside it J&F over the frames as the mean of the runs."""
    import matplotlib.pyplot as plt

    figure, (seeds, course) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[1, 1.4])
    names = list(dict.fromkeys(row.contestant for row in rows))
    dots(seeds, {name: [row.JF for row in rows if row.contestant == name and row.frame < 0] for name in names}, statistics.median)
    seeds.set_ylabel("J&F, each run and the median")
    for i, name in enumerate(names):
        own = [row for row in rows if row.contestant == name and row.frame >= 0]
        frames = sorted({row.frame for row in own})
        JF = [statistics.mean(row.JF for row in own if row.frame == t) for t in frames]
        course.plot(frames, JF, "--" if i % 2 else "-", color=f"C{i}", label=name)  # Two lines may coincide.
    course.set(xlabel="frame", ylabel="J&F, mean of the runs")
    course.legend()
    figure.savefig(path, dpi=110)


def main(
    data: Path,
    out: Path,
    runs: Path = Path("build/runs"),
    contestants: tuple[Literal[tuple(CONTESTANTS)], ...] = ("soft", "hard", "detached", "none", "copy"),
    seeds: Positive = 5,
    config: Literal[tuple(CONFIGS)] = "small",
    steps: PositiveOrNone = None,
    split: str = "val",
    alone: bool = False,
    start: Path | None = None,
) -> None:
    """Contestants on one data set: train each with each seed, and write their scores, a table and a plot.

    Args:
        data: A folder in DAVIS layout.
        out: The files to write, without .csv and .png.
        runs: Where checkpoints and logs go.
        contestants: Who takes part.
        seeds: How many runs of each.
        config: Sizes, learning rates and the number of steps.
        steps: Instead of the configuration's.
        split: The clips to judge by; training is on train.
        alone: Seed i trains on the i-th training clip alone, and is judged by that clip.
        start: A checkpoint whose weights every contestant begins with.
    """
    sizes = CONFIGS[config] if steps is None else dataclasses.replace(CONFIGS[config], steps=steps)
    found, drawn = files_of(out)
    clips, rows = read_clips(data, "train"), read(found, Row)
    judged = clips if alone else read_clips(data, split)
    parts = [slice(seed, seed + 1) if alone else slice(None) for seed in range(seeds)]  # of the clips, for each seed
    if other := {row.steps for row in rows} - {0, sizes.steps}:
        raise DataError(found, f"has rows of {min(other)} steps, not {sizes.steps}: another --out keeps them")
    if alone and seeds > len(clips):
        raise SettingError(f"--seeds: with --alone expected at most {len(clips)}, the clips of train, got {seeds}")
    for part in parts:
        need_scored(data, judged[part])
    weights = read_checkpoint(start, "cpu", "model")["model"] if start else None
    done = {(row.contestant, row.seed) for row in rows if row.machine == here().machine}
    for seed, part in enumerate(parts):
        for name in contestants:
            if (name, seed) not in done and (CONTESTANTS[name] or alone or seed == 0):
                rows += contest(name, seed, sizes, clips[part], judged[part], runs, weights)
                write(found, rows)
    plot(rows, drawn)
    print(table(rows))


if __name__ == "__main__":
    cli(main)
