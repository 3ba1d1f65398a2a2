"""One measured cell: the row of a result file, bench/results/*.jsonl, which has one JSON object a line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORWARD, BOTH = "forward", "forward+backward"
# What the caches hold before a call: what the same call left there, as in a loop, or nothing of it. GRAPH is WARM in a CUDA graph's replay.
WARM, COLD, GRAPH = "warm", "cold", "graph"
MATMUL = "matmul2048"  # the calibration: torch.mm at 2048^3 in the same run
LARGE_MATMUL, COPY = "matmul8192", "copy"
CEILINGS = (MATMUL, LARGE_MATMUL, COPY)  # what no kernel is expected to exceed
UNMASKED = "flash without mask"  # This is no peer: what the others take beyond it is the price of the mask.
OURS = "smattn/"  # A backend of smattn is named "smattn/cpu", say; any other name is a peer's.


def result_file(text: str) -> Path:
    """The type of an argument that is a result file."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text).resolve()


@dataclass(frozen=True)
class Row:
    """One contestant in one cell, timed or not."""

    workload: str
    shape: tuple[int, ...]  # B, H, Nq, Nk, D
    mask: str  # "uniform", "blob", "bias", or "none" for the ceilings
    dtype: str
    direction: str  # FORWARD or BOTH, which has the gradients of mask and alpha too
    cache: str  # WARM, COLD or GRAPH
    backend: str
    default: bool  # whether smattn takes this backend when none is named
    median_ms: float | None  # None when it was not timed; `skipped` then says why
    p10: float | None  # ms
    p90: float | None  # ms
    reps: int
    extra_bytes: int | None  # peak memory beyond io_bytes, None when it was not measured
    io_bytes: int  # inputs and outputs, and with BOTH the incoming and outgoing gradients
    flops: int
    matmul_ms: float | None  # torch.mm at 2048^3 just before and after this cell, which tells how quiet the machine was
    errors: dict[str, Any] | None  # the fields of validate.Validation for this backend
    skipped: str | None
    device: str
    threads: int
    versions: dict[str, str]
    commit: str
    command: str
    kernels: str = ""  # the instruction set of smattn's CPU kernels, and why it is this one; older files do not have it

    @property
    def ours(self) -> bool:
        return self.backend.startswith(OURS)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the file in one step, so that it never holds half of the rows, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    unfinished.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises TypeError when a line does not have the fields of Row."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(**{**row, "shape": tuple(row["shape"])}) for row in rows]
