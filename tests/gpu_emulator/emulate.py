"""`make emulate PROBLEMS=n SEED=s`: drawn problems through the compiled kernels, and what Triton's execute, kernel by kernel.

The first problem of each specialisation runs on the CUDA C++ kernels too. A failure does not end it. A run that was stopped, or that
--minutes ended, goes on where it was, as long as nothing changed that it depends on, and tries again what failed. `--write` leaves the
table of a run that came to its end in bench/results/emulated-kernels.csv.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from smattn.kernels.tiles import Tile, block_of
from smattn.kernels.tools import positive
from smattn.kernels.tools.sources import sources

from . import cuda_backend
from .backend import CHIPS, install, name_of
from .compile import CACHE, written_whole
from .counters import Counts
from .problems import TOGETHER, check, problems

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "emulated-kernels.csv"
HEAD = (
    "kernel", "arch", "bytes", "D", "block_m", "block_n", "warps", "launches", "instructions_a_score", "exp2_a_score", "flops_over_needed",
    "bytes_a_load", "sectors_a_load", "narrow_loads_a_score", "mask_bytes_a_thread", "wavefronts_a_request",
)  # fmt: skip


CUDA = "CUDA C++"  # beside sm_80 and sm_90 in the count of problems


class Key(NamedTuple):
    kernel: str
    arch: int
    bytes: int
    D: int
    tile: Tile


class Total:
    """What all launches of a kernel with one tile executed, and what they had to."""

    def __init__(self) -> None:
        self.counts, self.launches, self.scores, self.needed = Counts(), 0, 0, 0.0

    def row(self) -> tuple[str, ...]:
        c = self.counts
        figures = (
            sum(c.instructions.values()) * 32 / max(1, self.scores), c.instructions["exp2"] * 32 / max(1, self.scores),
            c.tensor_flops / self.needed if self.needed else 0.0,
            c.requested_bytes["load"] / max(1, c.requests["load"]), c.sectors["load"] / max(1, c.requests["load"]),
            c.narrow_loads * 32 / max(1, self.scores), c.bytes_a_thread("mask_ptr"), c.wavefronts / max(1, c.requests["shared"]),
        )  # fmt: skip
        return (str(self.launches), *(f"{figure:.2f}" for figure in figures))


def products(arguments: dict[str, Any], kernel: str) -> int:
    """How many columns a score's products have together: D for q k and for each gradient that is a sum of q or k, Dv for the others."""
    D, Dv = arguments["D"], arguments.get("DV", 0)
    if kernel in ("forward", "partial"):
        return D + Dv
    if kernel in ("map", "map_means"):
        return D
    needs = {name.removeprefix("NEED_") for name, wanted in arguments.items() if name.startswith("NEED_") and wanted}
    return D * (1 + len(needs & {"DQ", "DK"})) + Dv * (needs != {"DV"}) + Dv * ("DV" in needs)  # dV alone does without dP


def scores_of(arguments: dict[str, Any]) -> int:
    """How many scores a kernel goes over; 0 where it goes over none."""
    if "q_ptr" not in arguments:
        return 0
    B, H, Nq, _ = arguments["q_ptr"].shape
    return B * H * Nq * arguments["Nk"]


def add_up(totals: dict[Key, Total], arch: int, launched: list[tuple[str, Tile, dict[str, Any], Counts]]) -> None:
    for kernel, tile, arguments, counts in launched:
        if not (scores := scores_of(arguments)):
            continue
        head = block_of(max(arguments["D"], arguments.get("DV", 0)))
        query = arguments["q_ptr"]
        size = query.element_size() if isinstance(query, torch.Tensor) else query.base.element_size()
        total = totals.setdefault(Key(kernel, arch, size, head, tile), Total())
        total.counts.add(counts)
        total.launches += 1
        total.scores += scores
        if counts.tensor_flops:  # else the products are in float32, by other instructions
            total.needed += 2 * scores * products(arguments, kernel)


def rows(totals: dict[Key, Total]) -> list[tuple[str, ...]]:
    return [
        (k.kernel, str(k.arch), str(k.bytes), str(k.D), str(k.tile.block_m), str(k.tile.block_n), str(k.tile.warps), *total.row())
        for k, total in sorted(totals.items(), key=lambda item: (*item[0][:-1], str(item[0].tile)))
    ]


def text(totals: dict[Key, Total]) -> str:
    lines = (HEAD, *rows(totals))
    return "\n".join("  ".join(f"{figure:>{len(name)}}" for figure, name in zip(line, HEAD, strict=True)) for line in lines)


def of_what_runs() -> str:
    """A hash of all that a run's results depend on, in this tree and in Triton."""
    folders = ("kernels", "csrc", "smattn", "tests/gpu_emulator", "tests/support")
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".csv", ".h", ".cpp", ".cu"))
    return hashlib.sha256(triton.__version__.encode() + b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def write(path: Path, totals: dict[Key, Total], summary: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with path.open("w", newline="") as file:
        file.write(f"# {summary}\n# triton {triton.__version__}, commit {commit}, kernels/*.py sha256 {sources()}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEAD)
        table.writerows(rows(totals))


@dataclass
class Progress:
    """What a run has done."""

    problems: int = 0
    ran: Counter[str] = field(default_factory=Counter)  # problems by chip, and launches
    failures: dict[tuple[int, str], str] = field(default_factory=dict)  # by problem and what ran it
    totals: dict[Key, Total] = field(default_factory=dict)

    def summary(self, seed: int) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.ran.items()))
        without = "" if shutil.which("nvcc") else "; no CUDA C++ kernel ran, since there is no nvcc here"
        return f"seed {seed}: {self.problems} problems ({counts}), {len(self.failures)} failed{without}"


def keep(progress: Progress, path: Path) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_bytes(pickle.dumps(progress))


def run(progress: Progress, seed: int, count: int, until: float, kept: Path) -> None:
    """Problems up to `count`, or up to a time. What was done is kept in a file, whenever a specialisation is through.

    Of what an earlier run did only those are tried again that failed; they are counted once.
    """
    emulated = install(*CHIPS)
    for row in emulated.values():
        row.detailed = True
    cuda = cuda_backend.install() if shutil.which("nvcc") else None
    for number, (drawn, case) in enumerate(itertools.islice(problems(seed), count)):
        again = number < progress.problems
        if again and all(number != failed for failed, _ in progress.failures):
            continue
        if number % TOGETHER == 0 and not again:
            keep(progress, kept)
            if time.monotonic() > until:
                break
        ways = [(f"sm_{drawn.arch}", name_of(drawn.arch), emulated[drawn.arch])]
        if cuda is not None and number % TOGETHER == 0:
            ways.append((CUDA, cuda_backend.NAME, cuda))
        for way, name, row in ways:
            row.counts.clear()
            progress.failures.pop((number, way), None)
            try:
                check(drawn, case, name, row)
            except Exception as error:  # whatever is thrown belongs in the result
                sizes = f"Nq {case.query.shape[2]}, Nk {case.key.shape[2]}"
                failure = f"problem {number} on {way}, {drawn}, {sizes}: {type(error).__name__}: {error}"
                progress.failures[number, way] = failure
                print(f"FAILED {failure}", flush=True)
            progress.ran[way] += not again
            progress.ran["launches"] += 0 if again else len(row.counts)
        if not again:
            add_up(progress.totals, drawn.arch, emulated[drawn.arch].counts)
            progress.problems += 1
    keep(progress, kept)
    if progress.problems == count and not progress.failures:
        kept.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", type=positive, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop early after so long")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is no compiler under it")
    torch.set_num_threads(1)
    kept = CACHE / f"{options.problems}-problems-of-{options.seed}-{of_what_runs()}.pickle"
    progress = pickle.loads(kept.read_bytes()) if kept.exists() else Progress()
    run(progress, options.seed, options.problems, time.monotonic() + 60 * options.minutes, kept)
    print(text(progress.totals))
    print(progress.summary(options.seed))
    is_whole = progress.problems == options.problems
    if not is_whole:
        print(f"stopped before problem {progress.problems} of {options.problems}: the same command goes on there, and writes at the end")
    elif options.write:
        write(RESULTS, progress.totals, progress.summary(options.seed))
    return 1 if progress.failures or options.write and not is_whole else 0


if __name__ == "__main__":
    sys.exit(main())
