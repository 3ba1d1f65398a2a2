"""Time and peak memory of a training step, with the backend that smattn takes and with the reference, each in a process of its own.

    python -m vos.cost     # from the folder examples/; writes results/vos_cost.csv
"""

from __future__ import annotations

import argparse
import csv
import functools
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import smattn
from smattn import nn as smattn_nn

from .batches import Batch
from .config import Config
from .cycle import HISTORY, SELF, run
from .losses import loss
from .model import VOS

SIZES = {"64x96, 4 clips, stride 4": (4, 64, 96, 4), "480x856, 1 clip, stride 8": (1, 480, 856, 8)}
OBJECTS, STEPS = 3, 5


class Cost(NamedTuple):
    size: str
    backend: str
    seconds: float  # of a step, median
    peak_mib: float  # of the process


def measure(size: str, backend: str) -> Cost:
    """In this process, which does nothing else: its resident set is the answer."""
    if backend != "default":
        fixed = functools.partial(smattn.soft_masked_attention, backend=backend)
        smattn.soft_masked_attention = smattn_nn.soft_masked_attention = fixed
    B, H, W, stride = SIZES[size]
    torch.manual_seed(0)
    model = VOS(Config(stride=stride, encoder_layers=5, decoder_layers=5))
    mask = torch.zeros(B, OBJECTS, H, W)
    for o in range(OBJECTS):
        mask[:, o, H // 4 : H // 2, (2 * o + 1) * W // 8 : (2 * o + 2) * W // 8] = 1
    batch = Batch(torch.rand(B, 5, 3, H, W), mask, mask, torch.ones(B, OBJECTS, dtype=torch.bool))
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        sum(sum(loss(end.logits, batch.mask_again, batch.present)) for end in run(model, batch, (SELF, HISTORY))).backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - began)
    return Cost(size, backend, statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def read(path: Path) -> list[Cost]:
    with open(path, newline="") as file:
        return [Cost(line[0], line[1], float(line[2]), float(line[3])) for line in list(csv.reader(file))[1:]]


def table(costs: list[Cost]) -> str:
    lines = ["| frames | attention | seconds a step | peak of the process, MiB |", "| --- " * 4 + "|"]
    return "\n".join(lines + [f"| {c.size} | {c.backend} | {c.seconds:.2f} | {c.peak_mib:.0f} |" for c in costs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/vos_cost.csv"))
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "BACKEND"), help="measure this one here, and print it")
    a = parser.parse_args()
    if a.one:
        csv.writer(sys.stdout, lineterminator="\n").writerow(measure(*a.one))
        return
    costs = []
    for size in SIZES:
        for backend in ("default", "reference"):
            command = [sys.executable, "-m", "vos.cost", "--one", size, backend]
            (line,) = csv.reader([subprocess.run(command, check=True, capture_output=True, text=True).stdout])
            costs.append(Cost(size, backend, float(line[2]), float(line[3])))
    with open(a.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Cost._fields)
        writer.writerows([*cost[:2], f"{cost.seconds:.3f}", f"{cost.peak_mib:.0f}"] for cost in costs)
    print(table(costs))


if __name__ == "__main__":
    main()
