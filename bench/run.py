"""The main job, `make bench`: check every backend of this machine against float64, then time it beside its peers, in one run.

It writes bench/results/<date>-<device>.jsonl, with a row (rows.py) for each cell measured or skipped, and a report beside it (report.py).
`--full` (make bench-full) takes every named workload, both kinds of mask, float32 and bfloat16. On a GPU every run does so, in bfloat16
alone, and has the ceilings beside it (ceilings.py), CUDA graphs, and torch's flash attention without a mask. Rows are saved as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from itertools import product

import torch

import smattn
from bench.measuring.ceilings import measure_ceilings
from bench.measuring.cell import Cell
from bench.measuring.compile import compile_ahead
from bench.measuring.job import Job, available_backends
from bench.measuring.machine import HELD_TO, ROOT, device
from bench.measuring.measure import measure
from bench.measuring.peers import PEERS, WITHOUT_MASK, Contestant, cpu_kernels, ours
from bench.measuring.validate import interpreted_triton
from bench.reporting.rows import BOTH, FORWARD, OURS
from smattn.testing import WORKLOADS

SHORT = ("hodor_train", "hodor_infer", "queries100_b1", "self1k", "vit_cls", "pair128")  # A CPU does these in minutes.
ALSO_COLD = ("hodor_train", "hodor_infer")  # In use a network runs between two calls, so keys and values come from memory.
COLD_ON_A_GPU = (*ALSO_COLD, "queries100", "queries100_b1", "video64k")  # Memory bounds these.
GRAPHS = ("hodor_train", "hodor_infer")  # Their launches cost more than the work.
COMPILING = 0.4  # the most of the time that may go by before anything is measured
NOT_COMPILED = ROOT / "build" / "not-compiled.json"  # A run leaves it to one with `--compile not`.
INTERPRETED = ("hodor_train", "self1k")  # They have few queries and many, Triton's two regimes.


def check_interpreted(job: Job) -> None:
    """Validate interpreted Triton at reduced sizes, and add rows that say so."""
    outcome = interpreted_triton(list(INTERPRETED))
    if isinstance(outcome, str):
        print(f"{OURS}triton, interpreted: skipped: {outcome}")
        return
    for validation in outcome:
        job.keep(validation)
        cell = Cell(WORKLOADS[validation.workload], validation.mask, getattr(torch, validation.dtype), job.device, BOTH)
        job.add(cell, validation.backend, skipped="interpreted: validated at a reduced size, never timed")


def chosen_cells(args: argparse.Namespace, on_a_gpu: bool) -> list[Cell]:
    """The cells that the command line asks for. The masks of a shape stand side by side, for what a peer compiles serves both."""
    workloads = args.workloads or (list(WORKLOADS) if args.full or on_a_gpu else SHORT)
    masks = 2 if args.full or on_a_gpu else 1
    dtypes = (torch.float32, torch.bfloat16) if args.full else (torch.bfloat16,) if on_a_gpu else (torch.float32,)
    if args.dtypes:
        dtypes = tuple(getattr(torch, name) for name in args.dtypes)
    cold, graphs = (COLD_ON_A_GPU, GRAPHS) if on_a_gpu else (ALSO_COLD, ())
    order = product(workloads, dtypes, (FORWARD, BOTH))
    return [
        Cell(WORKLOADS[name], mask, dtype, args.device, direction, also_cold=name in cold, also_graph=name in graphs)
        for name, dtype, direction in order
        for mask in WORKLOADS[name].masks[:masks]
    ]


def compiled(args: argparse.Namespace, cells: list[Cell], contestants: list[Contestant], began: float, where: str) -> dict[str, str]:
    """Which peers compile_ahead could not compile, and why, now or in an earlier process. where: the machine and the versions of all."""
    if args.compile == "not":
        kept: dict[str, dict[str, str]] = json.loads(NOT_COMPILED.read_text()) if NOT_COMPILED.exists() else {}
        return kept.get(where, {})
    found: dict[str, str] = {}

    def keep() -> None:  # At once, because the process may be told to stop.
        NOT_COMPILED.parent.mkdir(exist_ok=True)
        NOT_COMPILED.write_text(json.dumps({where: found}))

    def cannot(peer: str, why: str) -> None:
        found[peer] = why
        keep()

    keep()
    compile_ahead(cells, contestants, cannot, until=began + 60 * args.minutes * (COMPILING if args.compile == "first" else 1.0))
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every named workload, every kind of mask, float32 and bfloat16")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="only these")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"], help="only these")
    parser.add_argument("--kernels", choices=cpu_kernels(), default="", help="CPU kernels of this instruction set, and peers held to it")
    parser.add_argument("--seconds", type=float, default=0.5, help="time budget of one contestant in one cell (default 0.5)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--compile", choices=("first", "only", "not"), default="first", help="what peers compile, ahead of all")
    args = parser.parse_args()
    if args.kernels and args.device != "cpu":
        parser.error("--kernels: they are the CPU's, which --device cpu times")
    return args


def describe(job: Job) -> None:
    """Print where this happens: the machine, the backends, and the CPU kernels that run."""
    print(f"{job.about['device']}; {job.about['versions']}; commit {job.about['commit']}")
    for name, status in smattn.backends().items():
        print(f"{name:10} {'available' if status.available else 'not available: ' + '; '.join(status.reasons)}")
    if kernels := job.about["kernels"]:
        print(f"CPU kernels: {kernels}; this processor runs {', '.join(cpu_kernels())}")


def main() -> None:
    began = time.monotonic()
    args = options()
    held_to = HELD_TO.get(args.kernels, {})
    if not held_to.items() <= os.environ.items():  # They are read when torch is loaded.
        os.execve(sys.executable, [sys.executable, "-m", "bench.run", *sys.argv[1:]], os.environ | held_to)
    on_a_gpu = torch.device(args.device).type == "cuda"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / f"inductor{args.kernels}"))  # What peers compile.
    if not on_a_gpu:  # Each process compiles by itself: a pool of compilers would run beside those that measure.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    until = began + 60 * args.minutes
    cells = chosen_cells(args, on_a_gpu)
    job = Job(args.device, args.seconds, " ".join(["python -m bench.run", *sys.argv[1:]]), args.kernels)
    labels = ["full"] * args.full + (args.workloads or []) + [args.kernels] * bool(args.kernels) + (args.dtypes or [])
    job.file = job.path(*labels)
    describe(job)
    names = ["cpu"] if args.kernels else available_backends(args.device)
    timed = [name for name in names if name != "reference"] or names  # The reference is slow by design, and timed only where it is alone.
    contestants = [*(ours(name, args.kernels) for name in timed), *PEERS, *[WITHOUT_MASK] * on_a_gpu]
    where = ", ".join(map(str, (job.about["device"], job.about["versions"], job.about["commit"])))
    job.not_compiled = compiled(args, cells, contestants, began, where)
    if args.compile == "only":
        return
    if on_a_gpu:
        measure_ceilings(job, cells[0].dtype)
    try:
        print("\n== errors against float64", flush=True)
        if args.device == "cpu" and not args.kernels:
            check_interpreted(job)
        job.check(timed if on_a_gpu else names, cells, until)
        print("\n== time and peak extra memory, all contestants in turn", flush=True)
        for name in sorted(WORKLOADS.keys() - {cell.workload.name for cell in cells}, key=list(WORKLOADS).index):
            print(f"{name:14} skipped: {'not asked for' if args.workloads else 'too long for the short run on a CPU; make bench-full'}")
        measure(job, cells, contestants, until)
    except KeyboardInterrupt:  # What there is becomes a report.
        print("\nstopped", flush=True)
    conclude(job, began)
    sys.exit(job.verdict())


def conclude(job: Job, began: float) -> None:
    """Print the summary and write the report."""
    from bench.reporting.report import summary, write_report  # matplotlib, which the processes that measure memory need not import

    assert job.file is not None
    seconds = f"after {time.monotonic() - began:.0f} s"
    if any(row.median_ms and row.workload in WORKLOADS for row in job.rows):
        print("\n" + summary(job.rows))
        print(f"\nwrote {job.file} and {write_report(job.file)} {seconds}")
    else:
        print(f"\nno cell was measured; wrote {job.file} {seconds}")


if __name__ == "__main__":
    main()
