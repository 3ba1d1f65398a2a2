"""One measured cell: the row of a result file, bench/results/*.jsonl, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORWARD, BOTH = "forward", "forward+backward"
WARM, COLD = "warm", "cold"  # what the caches hold before a call: what the same call left there, in a loop, or nothing of it
GRAPH = "graph"  # as WARM, and replayed from a CUDA graph
MATMUL = "matmul2048"  # the calibration row: torch.mm at 2048^3, in the same run
LARGE_MATMUL, COPY = "matmul8192", "copy"  # with it the ceilings of a GPU: what no kernel is expected to exceed
CEILINGS = (MATMUL, LARGE_MATMUL, COPY)
UNMASKED = "flash without mask"  # no peer: the price of the mask is what the others take beyond it
OURS = "smattn/"  # a backend of smattn is "smattn/cpu"; any other name is a peer's


@dataclass(frozen=True)
class Row:
    workload: str
    shape: tuple[int, ...]  # B, H, Nq, Nk, D
    mask: str  # "uniform", "blob"; "none" for the ceilings
    dtype: str
    direction: str  # FORWARD or BOTH: every gradient, that of mask and alpha included
    cache: str  # WARM, COLD or GRAPH
    backend: str
    default: bool  # the backend that smattn takes when none is named
    median_ms: float | None  # None: not timed, `skipped` says why
    p10: float | None  # ms
    p90: float | None  # ms
    reps: int
    extra_bytes: int | None  # peak memory beyond io_bytes; None: not measured
    io_bytes: int  # inputs and outputs, and with BOTH the incoming and outgoing gradients
    flops: int
    matmul_ms: float | None  # torch.mm at 2048^3 just before and after this cell: how quiet the machine was
    errors: dict[str, Any] | None  # validate.Errors: what float64 says of this backend
    skipped: str | None
    device: str
    threads: int
    versions: dict[str, str]
    commit: str
    command: str

    @property
    def ours(self) -> bool:
        return self.backend.startswith(OURS)


def write(rows: Iterable[Row], path: Path) -> None:
    """In one step: whenever the process is killed, the file holds one call's rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    unfinished.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a file; TypeError when a line has not exactly the fields of Row."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(**{**row, "shape": tuple(row["shape"])}) for row in rows]
