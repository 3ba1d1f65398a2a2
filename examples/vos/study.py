"""Contestants on one data set. Each is trained with each seed, with the same steps, batches and inference for all.

    python -m examples.vos.study --data build/clips --out examples/results/vos_synthetic

The scores become a CSV file, a table and a plot. Runs that the CSV file already has are not repeated, so a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.shared.commands import read_checkpoint, said_in_one_line
from examples.shared.plots import dots
from examples.shared.resumable import train
from examples.shared.rows import read, write

from .config import CONFIGS, Config
from .data import Clip, read_clips
from .infer import propagate, score
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


def rows_of(contestant: str, seed: int, steps: int, scores: list[Score]) -> Iterable[Row]:
    """The row over all frames, and then one for each frame."""
    yield Row(contestant, seed, steps, -1, *mean_scores(scores))
    for t in sorted({one.frame for one in scores}):
        yield Row(contestant, seed, steps, t, *mean_scores([one for one in scores if one.frame == t]))


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
    """The Markdown table: a line for each contestant, over its seeds."""
    lines = ["| contestant | seeds | steps | J&F median | mean ± std | lowest to highest | J | F |", "| --- " * 8 + "|"]
    for name in dict.fromkeys(row.contestant for row in rows):
        runs = [row for row in rows if row.contestant == name and row.frame < 0]
        JF = [run.JF for run in runs]
        spread = f"{statistics.mean(JF):.1f} ± {statistics.stdev(JF) if len(JF) > 1 else 0:.1f} | {min(JF):.1f} to {max(JF):.1f}"
        J, F = (f"{statistics.mean(column):.1f}" for column in ([run.J for run in runs], [run.F for run in runs]))
        lines.append(f"| {name} | {len(runs)} | {runs[0].steps} | {statistics.median(JF):.1f} | {spread} | {J} | {F} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Plot every seed's J&F and the median, and beside it J&F over the frames as the mean of the seeds."""
    import matplotlib.pyplot as plt

    figure, (seeds, course) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[1, 1.4])
    names = list(dict.fromkeys(row.contestant for row in rows))
    dots(seeds, {name: [row.JF for row in rows if row.contestant == name and row.frame < 0] for name in names}, statistics.median)
    seeds.set_ylabel("J&F, each seed and the median")
    for i, name in enumerate(names):
        own = [row for row in rows if row.contestant == name and row.frame >= 0]
        frames = sorted({row.frame for row in own})
        JF = [statistics.mean(row.JF for row in own if row.frame == t) for t in frames]
        course.plot(frames, JF, "--" if i % 2 else "-", color=f"C{i}", label=name)  # Two lines may coincide.
    course.set(xlabel="frame", ylabel="J&F, mean of the seeds")
    course.legend()
    figure.savefig(path, dpi=110)


@said_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in DAVIS layout")
    parser.add_argument("--out", type=Path, required=True, help="the files to write, without .csv and .png")
    parser.add_argument("--runs", type=Path, default=Path("build/runs"), help="where checkpoints and logs go")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=["soft", "hard", "detached", "none", "copy"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--split", default="val", help="the clips to judge by; training is on train")
    parser.add_argument("--alone", action="store_true", help="seed i trains on the i-th training clip alone, and is judged by that clip")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights every contestant begins with")
    a = parser.parse_args()
    config = CONFIGS[a.config] if a.steps is None else dataclasses.replace(CONFIGS[a.config], steps=a.steps)
    clips, rows = read_clips(a.data, "train"), read(a.out.with_suffix(".csv"), Row)
    judged = clips if a.alone else read_clips(a.data, a.split)
    start = read_checkpoint(a.start, "cpu", "model")["model"] if a.start else None
    done = {(row.contestant, row.seed) for row in rows}
    for seed in range(a.seeds):
        for name in a.contestants:
            if (name, seed) not in done and (CONTESTANTS[name] or a.alone or seed == 0):
                own = slice(seed, seed + 1) if a.alone else slice(None)
                rows += contest(name, seed, config, clips[own], judged[own], a.runs, start)
                write(a.out.with_suffix(".csv"), rows)
    plot(rows, a.out.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
