"""Time and memory of every contestant in every cell, as rows; what was not measured is a row that says why."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

import torch
from harness import GRAPH_CALLS, Cell, Step, bind, cache_flush, extra_bytes, in_graph, time_interleaved, timing, warm_up
from job import SIDE, Job, name_of
from peers import Contestant
from rows import BOTH, COLD, FORWARD, GRAPH, WARM
from tqdm import tqdm  # type: ignore[import-untyped]

SCORE_TENSORS = {FORWARD: 4, BOTH: 7}  # what a contestant that holds them may hold at once, float32
COMPILERS = 8  # processes


def measure(job: Job, cells: list[Cell], contestants: list[Contestant], until: float = math.inf) -> None:
    """Every contestant in every cell, and torch.mm around each cell: its spread says how quiet the machine was.

    until: on time.monotonic's clock; no cell is begun after it. The rows are saved after each cell.
    """
    matmuls = {dtype: matmul_call(dtype, job.device) for dtype in {cell.dtype: None for cell in cells}}
    calibration: dict[torch.dtype, list[float]] = {dtype: [] for dtype in matmuls}
    compiled_for = None
    with tqdm(total=len(cells) * len(contestants), desc="time and memory", file=sys.stdout, mininterval=1) as bar:
        for cell in cells:
            bar.set_postfix_str(f"{cell.workload.name} {name_of(cell.dtype)} {cell.mask} {cell.direction}")
            if time.monotonic() > until:
                for contestant in contestants:
                    job.add(cell, contestant.name, skipped="no time was left")
                continue
            if compiled_for != (key := (cell.shape, cell.dtype, cell.direction)):
                torch.compiler.reset()
                compiled_for = key
            calibration[cell.dtype] += measure_cell(job, cell, contestants, matmuls[cell.dtype], bar.update)
            job.save()
    for dtype, taken in calibration.items():
        if taken:
            job.add_matmul(dtype, taken)
    job.save()


def measure_cell(
    job: Job, cell: Cell, contestants: list[Contestant], matmul: Callable[[], object], done: Callable[[], object]
) -> list[float]:
    """Add the cell's rows; the milliseconds of the calibration around it."""
    calls, refused = bound(job, cell, contestants)
    quiet = time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
    samples = {WARM: time_interleaved(calls, job.device, job.seconds)}
    not_captured: dict[str, str] = {}
    if cell.also_cold:
        samples[COLD] = time_interleaved(calls, job.device, job.seconds / 2, cache_flush(job.device))
    if cell.also_graph:
        samples[GRAPH], not_captured = time_in_graphs(calls, job.device, job.seconds / 2)
    quiet += time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
    job.matmul_ms = timing(quiet).median_ms
    del calls

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
        job.add(cell, name, samples[WARM].get(name), extra, reason)
        for cache in (COLD, GRAPH):
            if name in samples.get(cache, {}):
                job.add(cell, name, samples[cache][name], skipped=reason, cache=cache)
        if name in not_captured:
            job.add(cell, name, skipped=not_captured[name], cache=GRAPH)
        done()
    return quiet


def bound(job: Job, cell: Cell, contestants: list[Contestant]) -> tuple[dict[str, Step], dict[str, str]]:
    """The warmed-up calls of those that can run the cell, and why the others cannot."""
    case, calls, refused = cell.case(), dict[str, Step](), dict[str, str]()
    for contestant in contestants:
        try:
            if reason := job.refusal(contestant.name, cell) or why_not(contestant, cell):
                raise RuntimeError(reason)
            call = bind(contestant.ready(), case, cell.direction, contestant.gradients)
            warm_up(call, job.device)
            calls[contestant.name] = call
        except Exception as error:  # a peer that cannot run the cell is reported, and the others are measured
            refused[contestant.name] = in_a_line(error)
    return calls, refused


def time_in_graphs(calls: dict[str, Step], device: str, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of a call in a CUDA graph of several, and why the others cannot be captured."""
    graphs, refused = dict[str, Callable[[], object]](), dict[str, str]()
    for name, call in calls.items():
        try:
            graphs[name] = in_graph(call)
        except Exception as error:
            refused[name] = in_a_line(error)
    samples = time_interleaved(graphs, device, seconds)
    return {name: [ms / GRAPH_CALLS for ms in taken] for name, taken in samples.items()}, refused


def in_a_line(error: Exception) -> str:
    return f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__


def compile_ahead(cells: list[Cell], contestants: list[Contestant]) -> None:
    """Run what is compiled once for each shape, in processes side by side: the measuring process then finds it on disk."""
    shapes = {(cell.shape, cell.dtype, cell.direction): cell for cell in cells}
    slow = [contestant for contestant in contestants if contestant.compiled or not contestant.holds_scores]
    with ProcessPoolExecutor(min(COMPILERS, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        try:
            for lines in pool.map(partial(_compile, slow), shapes.values()):
                print("".join(f"{line}\n" for line in lines), end="", flush=True)
        except BrokenProcessPool as error:
            print(f"not compiled ahead: {error}")


def _compile(contestants: list[Contestant], cell: Cell) -> list[str]:
    """Why those that failed did; the measurement will say it again."""
    failed = []
    for contestant in contestants:
        try:
            if why_not(contestant, cell) is None:
                bind(contestant.ready(), cell.case(), cell.direction, contestant.gradients)()
        except Exception as error:
            failed.append(f"{contestant.name}, {cell.workload.name}, {cell.direction}: {in_a_line(error)}")
    return failed


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


def matmul_call(dtype: torch.dtype, device: str, side: int = SIDE) -> Callable[[], object]:
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.mm(a, a)
    return lambda: torch.mm(a, a, out=out)


def _score_bytes(cell: Cell) -> int:
    B, H, Nq, Nk, _ = cell.shape
    return SCORE_TENSORS[cell.direction] * 4 * B * H * Nq * Nk


def _free_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
