"""What a GPU does at best: copying, and multiplying large matrices. `python -m bench.measuring.ceilings` prints it.

Every benchmark on a GPU begins with these rows.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.measuring.clock import time_interleaved, warm_up
from bench.measuring.job import Job
from bench.measuring.machine import device
from bench.measuring.measure import matmul_call
from bench.reporting.rows import CEILINGS, COPY, LARGE_MATMUL, Row

COPY_BYTES = 2**32
LARGE_SIDE = 8192


def measure_ceilings(job: Job, dtype: torch.dtype, copy_bytes: int = COPY_BYTES, side: int = LARGE_SIDE) -> None:
    """Add two rows, a copy of so many bytes and torch.mm at side^3."""
    source = torch.randn(copy_bytes // 4, device=job.device)
    target = torch.empty_like(source)
    calls = {COPY: lambda: target.copy_(source), LARGE_MATMUL: matmul_call(dtype, job.device, side)}
    for call in calls.values():
        warm_up(call, job.device)
    taken = time_interleaved(calls, job.device, job.seconds)
    shape, moved = (source.numel(),), 2 * source.nbytes
    job.add_row("torch.copy_", taken[COPY], workload=COPY, shape=shape, dtype=source.dtype, io_bytes=moved, flops=0)
    job.add_matmul(dtype, taken[LARGE_MATMUL], LARGE_MATMUL, side)
    job.save()


def table(rows: list[Row]) -> str:
    """A line for each ceiling: the median rate, and those of the tenth and ninetieth percentile."""
    return "\n".join(line(row) for row in rows if row.workload in CEILINGS and row.median_ms)


def line(row: Row) -> str:
    amount, unit = (row.io_bytes / 1e9, "TB/s, read and written") if row.workload == COPY else (row.flops / 1e9, "TFLOP/s")
    low, rate, high = (amount / time for time in (row.p90, row.median_ms, row.p10) if time)
    size = " x ".join(map(str, row.shape))
    return f"{row.backend}, {row.dtype}, {size}: {rate:.3g} {unit} (10th to 90th percentile {low:.3g} to {high:.3g})."


def rate(rows: list[Row], workload: str) -> float | None:
    """The best bytes or operations a second; None when it was not measured."""
    measured = [row for row in rows if row.workload == workload and row.median_ms]
    return max((1e3 * (row.flops or row.io_bytes) / row.median_ms for row in measured if row.median_ms), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", type=device, default="cuda", help="cpu or cuda")
    parser.add_argument("--copy-bytes", type=int, default=COPY_BYTES)
    parser.add_argument("--side", type=int, default=LARGE_SIDE)
    args = parser.parse_args()
    job = Job(args.device, 0.5, " ".join(["python -m bench.measuring.ceilings", *sys.argv[1:]]))
    for dtype in (torch.bfloat16, torch.float32):
        measure_ceilings(job, dtype, args.copy_bytes, args.side)
    print(f"{job.about['device']}\n{table(job.rows)}")


if __name__ == "__main__":
    main()
