"""Where does the gradient through the masks pay? `soft` beside `detached`, one thing changed at a time from what the comparison uses.

    python -m examples.vos.search --data build/clips     # writes examples/results/vos_search.csv

Runs that the CSV file already has are not repeated, so a search that was stopped goes on.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from examples.shared.commands import Positive, cli
from examples.shared.resumable import train
from examples.shared.rows import RESULTS, read, write

from . import study
from .config import Config
from .data import Clip, read_clips
from .infer import need_scored, propagate, score
from .metrics import mean_scores
from .synthetic import clip, write_clips
from .train import Run, Trainer

SMALL = 0.6  # the size of the objects, as a share of the usual one
SETTINGS = {  # name -> configuration, cycles and size of the objects
    "alpha starts at 4 in every head": (Config(alpha_init=4.0), "all", 1),
    "alpha learns at 0.3, not 0.01": (Config(alpha_lr=0.3), "all", 1),
    "cycles of four steps alone": (Config(), "long", 1),
    "cycles from a tenth of the steps on, not from half": (Config(cycles_from=0.1), "all", 1),
    "objects of 0.6 the size": (Config(), "all", SMALL),
}


class Found(NamedTuple):
    setting: str
    masking: str
    seed: int
    JF: float
    J: float
    F: float


def contest(setting: str, masking: str, seed: int, clips: list[Clip], judged: list[Clip], runs: Path) -> Found:
    """Train one masking in one setting on `clips` and score it on `judged`."""
    config, cycles, _ = SETTINGS[setting]
    trainer = Trainer(Run(config, masking, cycles, seed), clips)
    train(trainer, runs / f"{setting.replace(' ', '-')}-{masking}-{seed}", resume=True)
    scores = [one for clip in judged for one in score(clip, propagate(trainer.model, clip, config))]
    return Found(setting, masking, seed, *mean_scores(scores))


def unchanged(rows: list[study.Row]) -> list[Found]:
    """The comparison's own runs on its first machine, which is the search's: the search stands beside them."""
    machine = rows[0].machine
    return [Found("nothing", row.contestant, row.seed, row.JF, row.J, row.F) for row in rows if row.frame < 0 and row.machine == machine]


def table(found: list[Found], other: str = "detached") -> str:
    """The Markdown table. Differences are between runs of the same seed, which see the same batches."""
    lines = [f"| changed | seeds | soft | {other} | soft - {other}, mean ± std | each seed |", "| --- " * 6 + "|"]
    for setting in dict.fromkeys(one.setting for one in found):
        JF = {(one.masking, one.seed): one.JF for one in found if one.setting == setting}
        seeds = sorted(seed for masking, seed in JF if masking == "soft" and (other, seed) in JF)
        soft, beside = ([JF[masking, seed] for seed in seeds] for masking in ("soft", other))
        gains = [a - b for a, b in zip(soft, beside, strict=True)]
        spread = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) if len(gains) > 1 else 0:.1f}"
        means = f"{statistics.mean(soft):.1f} | {statistics.mean(beside):.1f}"
        lines.append(f"| {setting} | {len(seeds)} | {means} | {spread} | {', '.join(f'{gain:+.1f}' for gain in gains)} |")
    return "\n".join(lines)


def main(
    data: Path,
    out: Path = RESULTS / "vos_search.csv",
    runs: Path = Path("build/runs/search"),
    settings: tuple[Literal[tuple(SETTINGS)], ...] = tuple(SETTINGS),
    seeds: Positive = 3,
) -> None:
    """Train soft and detached masks in every setting, with each seed, and write their scores and a table.

    Args:
        data: A folder in DAVIS layout; small objects get one beside the runs.
        out: The file to write.
        runs: Where checkpoints and logs go.
        settings: What to change, one at a time.
        seeds: How many runs of each.
    """
    found = read(out, Found)
    done = {one[:3] for one in found}
    for setting in settings:
        root = data
        if SETTINGS[setting][2] != 1:
            root = runs / "clips"
            if not root.exists():
                write_clips(root, 400, 20, 10, make=partial(clip, size=SETTINGS[setting][2]))
        clips, judged = read_clips(root, "train"), read_clips(root, "val")
        need_scored(root, judged)
        for seed in range(seeds):
            for masking in ("soft", "detached"):
                if (setting, masking, seed) not in done:
                    found.append(contest(setting, masking, seed, clips, judged, runs))
                    write(out, found)
    print(table(found))


if __name__ == "__main__":
    cli(main)
