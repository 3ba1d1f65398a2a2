"""Time and peak memory of a training step, with the backend that smattn takes and with the reference, each in a process of its own.

    python -m examples.vos.cost     # writes examples/results/vos_cost.csv
"""

from __future__ import annotations

import csv
import functools
import resource
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import smattn
from examples.shared.commands import cli
from examples.shared.rows import RESULTS, write
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
    seconds: float  # of a step, the median
    peak_mib: int  # of the process


def measure(size: str, backend: str) -> Cost:
    """Measure in this process, which does nothing else, so that its resident set is the answer."""
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
    return Cost(size, backend, statistics.median(seconds), round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def table(costs: list[Cost]) -> str:
    """The Markdown table."""
    lines = ["| frames | attention | seconds a step | peak of the process, MiB |", "| --- " * 4 + "|"]
    return "\n".join(lines + [f"| {c.size} | {c.backend} | {c.seconds:.2f} | {c.peak_mib} |" for c in costs])


def main(out: Path = RESULTS / "vos_cost.csv", one: tuple[str, str] | None = None) -> None:
    """Measure time and peak memory of a training step, by the default backend and by the reference.

    Args:
        out: The file to write.
        one: Measure this size with this backend here, print it, and write nothing.
    """
    if one:
        csv.writer(sys.stdout, lineterminator="\n").writerow(measure(*one))
        return
    costs = []
    for size, backend in tqdm(list(product(SIZES, ("default", "reference"))), desc="cost"):
        command = [sys.executable, "-m", "examples.vos.cost", "--one", size, backend]
        (line,) = csv.reader([subprocess.run(command, check=True, capture_output=True, text=True).stdout])
        costs.append(Cost(size, backend, float(line[2]), int(line[3])))
    write(out, costs, decimals=3)
    print(table(costs))


if __name__ == "__main__":
    cli(main)
