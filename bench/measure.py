"""Time and memory of every contestant in every cell, as rows; what was not measured is a row that says why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from harness import Cell, Step, bind, cache_flush, extra_bytes, time_interleaved, timing, warm_up
from job import SIDE, Job, name_of
from peers import Contestant
from rows import BOTH, COLD, FORWARD
from tqdm import tqdm  # type: ignore[import-untyped]

SCORE_TENSORS = {FORWARD: 4, BOTH: 7}  # what a contestant that holds them may hold at once, float32


def measure(job: Job, cells: list[Cell], contestants: list[Contestant]) -> None:
    """Every contestant in every cell, and torch.mm around each cell: its spread says how quiet the machine was."""
    matmuls = {dtype: matmul_call(dtype, job.device) for dtype in {cell.dtype: None for cell in cells}}
    calibration: dict[torch.dtype, list[float]] = {dtype: [] for dtype in matmuls}
    with tqdm(total=len(cells) * len(contestants), desc="time and memory", file=sys.stdout, mininterval=1) as bar:
        for cell in cells:
            bar.set_postfix_str(f"{cell.workload.name} {name_of(cell.dtype)} {cell.mask} {cell.direction}")
            calibration[cell.dtype] += measure_cell(job, cell, contestants, matmuls[cell.dtype], bar.update)
    for dtype, taken in calibration.items():
        job.add_matmul(dtype, taken)


def measure_cell(
    job: Job, cell: Cell, contestants: list[Contestant], matmul: Callable[[], object], done: Callable[[], object]
) -> list[float]:
    """Add the cell's rows; the milliseconds of the calibration around it."""
    torch.compiler.reset()
    case, calls, refused = cell.case(), dict[str, Step](), dict[str, str]()
    for contestant in contestants:
        try:
            if reason := why_not(contestant, cell):
                raise RuntimeError(reason)
            call = bind(contestant.ready(), case, cell.direction)
            warm_up(call, job.device)
            calls[contestant.name] = call
        except Exception as error:  # a peer that cannot run the cell is reported, and the others are measured
            refused[contestant.name] = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
    quiet = time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
    samples = time_interleaved(calls, job.device, job.seconds)
    cold = time_interleaved(calls, job.device, job.seconds / 2, cache_flush(job.device)) if cell.also_cold else {}
    quiet += time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
    job.matmul_ms = timing(quiet).median_ms

    def memory(contestant: Contestant) -> tuple[int | None, str | None]:
        if reason := refused.get(contestant.name):
            return None, reason
        try:
            return extra_bytes(contestant, cell), None
        except (RuntimeError, OSError) as error:
            return None, f"memory not measured: {error}"

    both_fit = torch.device(job.device).type == "cpu" and 2 * _score_bytes(cell) < _free_memory()
    with ThreadPoolExecutor(2 if both_fit else 1) as pool:  # on a CPU each has a process of its own
        memories = list(pool.map(memory, contestants))
    for contestant, (extra, reason) in zip(contestants, memories, strict=True):
        name = contestant.name
        job.add(cell, name, samples.get(name), extra, reason)
        if name in cold:
            job.add(cell, name, cold[name], skipped=reason, cache=COLD)
        done()
    return quiet


def why_not(contestant: Contestant, cell: Cell) -> str | None:
    """Why a contestant is left out of a cell, None when it is not."""
    kind = torch.device(cell.device).type
    if cell.direction == BOTH and kind in contestant.forward_only_on:
        return f"has no backward on a {kind.upper()}"
    needed = _score_bytes(cell)
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else _free_memory()
    if contestant.holds_scores and needed > free:
        return f"may need {needed / 1e9:.0f} GB for its score tensors, {free / 1e9:.0f} GB are free"
    return None


def matmul_call(dtype: torch.dtype, device: str) -> Callable[[], object]:
    a = torch.randn(SIDE, SIDE, device=device).to(dtype)
    out = torch.mm(a, a)
    return lambda: torch.mm(a, a, out=out)


def _score_bytes(cell: Cell) -> int:
    B, H, Nq, Nk, _ = cell.shape
    return SCORE_TENSORS[cell.direction] * 4 * B * H * Nq * Nk


def _free_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
