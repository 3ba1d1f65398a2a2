"""Time and peak memory of a training step of a Mask2Former's decoder before and after its masks became soft, each in a process of its own.

    pip install ".[mask2former]"
    python examples/mask2former_cost.py     # writes examples/results/mask2former_cost.csv

The decoder is Hugging Face's with its default sizes (100 queries, 9 layers) and random weights, on random features of a 512 x 512 picture.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from smattn.integrations import soften_mask2former

SIDE, STEPS = 512, 3
MASKS = ("hard, detached", "soft")


class Cost(NamedTuple):
    masks: str
    seconds: float  # of processor time a step, median
    peak_mib: float  # of the process, less what it had before the first step


def step_of(masks: str) -> Callable[[], Tensor]:
    """A function that computes one step's loss."""
    from transformers import Mask2FormerConfig, Mask2FormerModel

    torch.manual_seed(0)
    model = Mask2FormerModel(Mask2FormerConfig()).train()
    if masks == "soft":
        soften_mask2former(model)
    width = model.config.hidden_dim
    levels = [torch.randn(1, width, SIDE // s, SIDE // s) for s in (32, 16, 8)]
    pixels = torch.randn(1, width, SIDE // 4, SIDE // 4)
    return lambda: model.transformer_module(levels, pixels).last_hidden_state.square().mean()


def measure(masks: str) -> Cost:
    """In this process, which does nothing else: its resident set is the answer."""
    step = step_of(masks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        step().backward()
        seconds.append(time.process_time() - began)
    return Cost(masks, statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def read(path: Path) -> list[Cost]:
    with open(path, newline="") as file:
        return [Cost(line[0], float(line[1]), float(line[2])) for line in list(csv.reader(file))[1:]]


def table(costs: list[Cost]) -> str:
    lines = ["| masks | processor seconds a step | memory of the step, MiB |", "| --- " * 3 + "|"]
    return "\n".join(lines + [f"| {c.masks} | {c.seconds:.2f} | {c.peak_mib:.0f} |" for c in costs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mask2former_cost.csv")
    parser.add_argument("--one", choices=MASKS, help="measure these here, and print the row")
    a = parser.parse_args()
    if a.one:
        csv.writer(sys.stdout, lineterminator="\n").writerow(measure(a.one))
        return
    costs = []
    for masks in MASKS:
        command = [sys.executable, __file__, "--one", masks]
        (line,) = csv.reader([subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout])
        costs.append(Cost(masks, float(line[1]), float(line[2])))
    with open(a.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Cost._fields)
        writer.writerows([cost.masks, f"{cost.seconds:.3f}", f"{cost.peak_mib:.0f}"] for cost in costs)
    print(table(costs))


if __name__ == "__main__":
    main()
