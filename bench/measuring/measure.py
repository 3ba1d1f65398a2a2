"""Time and memory of every contestant in every cell, as rows; what was not measured is a row that says why."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from bench.measuring.harness import (
    GRAPH_CALLS,
    Cell,
    Step,
    bind,
    cache_flush,
    extra_bytes,
    in_graph,
    on_a_gpu,
    time_interleaved,
    timing,
    warm_up,
)
from bench.measuring.job import SIDE, Job, name_of
from bench.measuring.peers import Contestant
from bench.measuring.worker import Lost, Worker, at, in_a_line, still_usable
from bench.reporting.rows import BOTH, COLD, FORWARD, GRAPH, OURS, WARM, Row

SCORE_TENSORS = {FORWARD: 4, BOTH: 7}  # what a contestant that holds them may hold at once, float32
COMPILERS = 16  # processes


def measure(job: Job, cells: list[Cell], contestants: list[Contestant], until: float = math.inf) -> None:
    """Every contestant in every cell, and torch.mm around each cell: its spread says how quiet the machine was.

    until: on time.monotonic's clock; no cell is begun after it. The rows are saved after each cell. On a GPU one process measures them all,
    and is replaced when a contestant takes it down: the others are then measured without that one.
    """
    calibration: dict[torch.dtype, list[float]] = {cell.dtype: [] for cell in cells}
    with Worker() as worker, tqdm(total=len(cells), desc="time and memory", file=sys.stdout, mininterval=1) as bar:
        call = worker if on_a_gpu(job.device) else directly
        try:
            for cell in cells:
                bar.set_postfix_str(f"{cell.workload.name} {name_of(cell.dtype)} {cell.mask} {cell.direction}")
                calibration[cell.dtype] += cell_of(job, cell, contestants, call, until)
                job.save()
                bar.update()
        finally:  # also when told to stop
            for dtype, taken in calibration.items():
                if taken:
                    job.add_matmul(dtype, taken)
            job.save()


def directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def cell_of(job: Job, cell: Cell, contestants: list[Contestant], call: Callable[..., Any], until: float) -> list[float]:
    """Add the cell's rows, made by measure_cell in whatever process `call` has; the milliseconds of the calibration around it."""
    why, names = "", {contestant.name for contestant in contestants}
    while time.monotonic() < until:
        try:
            rows, quiet = call(measure_cell, job.without_rows(), cell, contestants)
        except Lost as lost:
            print(f"\n{cell.workload.name} {cell.mask} {cell.direction}, {lost.at}: {lost}", flush=True)
            if lost.at not in names or job.refusal(lost.at, cell):
                why = f"{lost}"
                break
            job.refuse(lost.at, cell, f"it took its process down: {lost}")
        except RuntimeError as error:
            why = in_a_line(error)
            break
        else:
            job.rows += rows
            return list(quiet)
    for contestant in contestants:
        job.add(cell, contestant.name, skipped=job.refusal(contestant.name, cell) or why or "no time was left")
    return []


@lru_cache(1)  # that is, when another follows
def forget_compiled(shape: tuple[int, ...], dtype: torch.dtype, direction: str) -> None:
    """Both masks of a shape share what is compiled; a third shape would make torch.compile generalise, and then give up."""
    torch.compiler.reset()


def measure_cell(job: Job, cell: Cell, contestants: list[Contestant]) -> tuple[list[Row], list[float]]:
    """The cell's rows, added to the job's, and the milliseconds of the calibration around it."""
    forget_compiled(cell.shape, cell.dtype, cell.direction)
    matmul = matmul_call(cell.dtype, job.device)
    calls, refused = bound(job, cell, contestants)
    at("timing")
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
    for contestant, (extra, reason) in zip(contestants, memories(job, cell, contestants, refused), strict=True):
        name = contestant.name
        job.add(cell, name, samples[WARM].get(name), extra, reason)
        for cache in (COLD, GRAPH):
            if name in samples.get(cache, {}):
                job.add(cell, name, samples[cache][name], skipped=reason, cache=cache)
        if name in not_captured:
            job.add(cell, name, skipped=not_captured[name], cache=GRAPH)
    return job.rows, quiet


def memories(job: Job, cell: Cell, contestants: list[Contestant], refused: dict[str, str]) -> list[tuple[int | None, str | None]]:
    """Extra bytes of each, or why there is no such number."""

    def memory(contestant: Contestant) -> tuple[int | None, str | None]:
        if reason := refused.get(contestant.name):
            return None, reason
        at(contestant.name)
        try:
            return extra_bytes(contestant, cell), None
        except (RuntimeError, OSError) as error:
            still_usable(error)
            return None, f"memory not measured: {error}"

    both_fit = torch.device(job.device).type == "cpu" and 2 * _score_bytes(cell) < _free_memory()
    with ThreadPoolExecutor(2 if both_fit else 1) as pool:  # on a CPU each has a process of its own
        return list(pool.map(memory, contestants))


def bound(job: Job, cell: Cell, contestants: list[Contestant]) -> tuple[dict[str, Step], dict[str, str]]:
    """The warmed-up calls of those that can run the cell, and why the others cannot."""
    case, calls, refused = cell.case(), dict[str, Step](), dict[str, str]()
    for contestant in contestants:
        at(contestant.name)
        try:
            if reason := job.refusal(contestant.name, cell) or why_not(contestant, cell):
                raise RuntimeError(reason)
            call = bind(contestant.ready(), case, cell.direction, contestant.gradients)
            warm_up(call, job.device)
            calls[contestant.name] = call
        except Exception as error:  # a peer that cannot run the cell is reported, and the others are measured
            still_usable(error)
            refused[contestant.name] = in_a_line(error)
    return calls, refused


def time_in_graphs(calls: dict[str, Step], device: str, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of a call in a CUDA graph of several, and why the others cannot be captured."""
    graphs, refused = dict[str, Callable[[], object]](), dict[str, str]()
    for name, call in calls.items():
        at(name)
        try:
            graphs[name] = in_graph(call)
        except Exception as error:
            still_usable(error)
            refused[name] = in_a_line(error)
    samples = time_interleaved(graphs, device, seconds)
    return {name: [ms / GRAPH_CALLS for ms in taken] for name, taken in samples.items()}, refused


def compile_ahead(cells: list[Cell], contestants: list[Contestant], until: float = math.inf) -> dict[str, str]:
    """Run what is compiled once for each shape, in processes side by side: the measuring process then finds it on disk.

    until: on time.monotonic's clock; what is not begun by then is compiled when it is measured. Returns the peers that cannot be compiled,
    by Job.at, and why: the measuring process would take as long to find that out, once for each mask.
    """
    failed: dict[str, str] = {}
    shapes = {(cell.shape, cell.dtype, cell.direction): cell for cell in cells}.values()
    slow = [contestant for contestant in contestants if contestant.compiled or contestant.name.startswith(OURS)]
    left = sorted(product(slow, shapes), key=lambda pair: (pair[0].compiled, pair[1].direction == BOTH))  # the longest are taken first

    def compiled() -> None:
        with Worker() as worker:
            while left and time.monotonic() < until:
                contestant, cell = left.pop()
                try:
                    worker(_compile, contestant, cell)
                except RuntimeError as error:
                    print(f"{(where := Job.at(contestant.name, cell))}: {error}", flush=True)
                    if not contestant.name.startswith(OURS) and "out of memory" not in f"{error}":  # there are many at once
                        failed[where] = f"{error}"

    processes = min(COMPILERS, os.cpu_count() or 1, len(left))
    with ThreadPoolExecutor(max(1, processes)) as pool:
        try:
            for done in [pool.submit(compiled) for _ in range(processes)]:
                done.result()
        finally:  # also when told to stop
            left.clear()
    return failed


def _compile(contestant: Contestant, cell: Cell) -> None:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]  # else each of the processes starts one for every core
    if why_not(contestant, cell) is None:
        bind(contestant.ready(), cell.blank(), cell.direction, contestant.gradients)()
        torch.cuda.synchronize()


def why_not(contestant: Contestant, cell: Cell) -> str | None:
    """Why a contestant is left out of a cell, None when it is not."""
    kind = torch.device(cell.device).type
    if cell.direction == BOTH and kind in contestant.forward_only_on:
        return f"has no backward on a {kind.upper()}"
    needed = _score_bytes(cell)
    free = _free_on_cuda() if kind == "cuda" else _free_memory()
    if contestant.holds_scores and needed > free:
        return f"may need {needed / 1e9:.0f} GB for its score tensors, {free / 1e9:.0f} GB are free"
    return None


@lru_cache(2)
def matmul_call(dtype: torch.dtype, device: str, side: int = SIDE) -> Callable[[], object]:
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.mm(a, a)
    return lambda: torch.mm(a, a, out=out)


def _score_bytes(cell: Cell) -> int:
    B, H, Nq, Nk, _ = cell.shape
    return SCORE_TENSORS[cell.direction] * 4 * B * H * Nq * Nk


def _free_on_cuda() -> int:
    """What torch holds and does not use counts as free."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _free_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
