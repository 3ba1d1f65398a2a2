"""The main job, `make bench`: every backend of this machine checked against float64, then timed beside its peers, in one run.

Writes bench/results/<date>-<device>.jsonl, one row (rows.py) for each cell measured or skipped, and a report beside it (report.py).
`--full` (make bench-full) takes every named workload, both kinds of mask, float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from itertools import product
from pathlib import Path

import torch
from harness import Cell
from measure import Job, backends_to_time, describe_device, measure
from peers import PEERS, ours
from rows import BOTH, FORWARD, OURS, write
from validate import Validation, fitting, interpreted_triton, validate

import smattn
from smattn.testing import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"
SHORT = ("hodor_train", "hodor_infer", "queries100_b1", "self1k", "vit_cls")  # what a CPU does in minutes
INTERPRETED = ("hodor_train", "self1k")  # few queries and many: Triton's two regimes


def check(job: Job, names: list[str], cells: list[Cell]) -> None:
    """Validate every backend in every cell; exit when one is outside the budget, for a wrong kernel's time is no news."""
    print("\n== errors against float64", flush=True)
    wanted = dict.fromkeys((cell.workload.name, cell.mask, cell.dtype) for cell in cells)
    for (workload, mask, dtype), backend in product(wanted, names):
        _keep(job, validate(backend, fitting(WORKLOADS[workload]), mask, dtype, job.device))
    if job.device == "cpu":
        outcome = interpreted_triton(list(INTERPRETED))
        if isinstance(outcome, str):
            print(f"{OURS}triton, interpreted: skipped: {outcome}")
        for validation in outcome if isinstance(outcome, list) else []:
            _keep(job, validation)
            cell = Cell(WORKLOADS[validation.workload], validation.mask, getattr(torch, validation.dtype), job.device, BOTH)
            job.add(cell, validation.backend, skipped="interpreted: validated at a reduced size, never timed")
    outside = [f"{v.backend} {v.workload} {v.dtype} {v.mask}" for v in job.validations.values() if not v.within]
    if outside:
        sys.exit(f"outside the error budget, so nothing is timed: {', '.join(outside)}")


def _keep(job: Job, validation: Validation) -> None:
    job.validations[validation.backend, validation.workload, validation.mask, getattr(torch, validation.dtype)] = validation
    print("\n".join(validation.lines()), flush=True)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every named workload, uniform and blob masks, float32 and bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="only these")
    parser.add_argument("--seconds", type=float, default=1.0, help="time budget of one contestant in one cell (default 1)")
    args = parser.parse_args()

    everything = args.full or args.device != "cpu"
    workloads = args.workloads or (list(WORKLOADS) if everything else SHORT)
    masks = ("uniform", "blob") if args.full else ("uniform",)
    dtypes = (torch.float32, torch.bfloat16) if args.full else (torch.float32,) if args.device == "cpu" else (torch.bfloat16,)
    cells = [Cell(WORKLOADS[w], m, t, args.device, d) for w, t, m, d in product(workloads, dtypes, masks, (FORWARD, BOTH))]

    job = Job(args.device, args.seconds, " ".join(["python bench/run.py", *sys.argv[1:]]))
    print(f"{job.about['device']}; {job.about['versions']}; commit {job.about['commit']}")
    for name, status in smattn.backends().items():
        print(f"{name:10} {'available' if status.available else 'not available: ' + '; '.join(status.reasons)}")
    names = backends_to_time(args.device)
    check(job, names, cells)
    print("\n== time and peak extra memory, all contestants in turn", flush=True)
    for name in WORKLOADS:
        if name not in workloads:
            print(f"{name:14} skipped: {'not asked for' if args.workloads else 'too long for the short run on a CPU; make bench-full'}")
    measure(job, cells, [*map(ours, names), *PEERS])

    from report import summary, write_report  # matplotlib, which the memory measurement's processes need not import

    slug = re.sub(r"[^a-z0-9]+", "-", describe_device(args.device).lower()).strip("-")
    path = RESULTS / f"{datetime.date.today()}-{slug}{'-full' if args.full else ''}{'-part' if args.workloads else ''}.jsonl"
    write(job.rows, path)
    print("\n" + summary(job.rows))
    print(f"\nwrote {path} and {write_report(path)} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
