"""Time and memory of every contestant in every cell, as rows. What was not measured is a row that says why."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from bench.measuring.cell import Cell, Step, bind
from bench.measuring.clock import GRAPH_CALLS, cache_flush, in_graph, time_interleaved, timing, warm_up
from bench.measuring.fits import free_memory, why_not
from bench.measuring.job import SIDE, Job
from bench.measuring.machine import name_of, on_a_gpu
from bench.measuring.memory import extra_bytes
from bench.measuring.peers import Contestant
from bench.measuring.worker import Lost, Worker, at, in_a_line, still_usable
from bench.reporting.rows import COLD, GRAPH, UNMASKED, WARM, Row

ALIKE = 0.2  # of the results' norm; in bfloat16 plain PyTorch rounds alpha * M, which moves them by a twentieth


def measure(job: Job, cells: list[Cell], contestants: list[Contestant], until: float = math.inf) -> None:
    """Measure every contestant in every cell, and torch.mm around each cell: its spread tells how quiet the machine was.

    until: on time.monotonic's clock; no cell is begun after it. The rows are saved after each cell. On a GPU one process measures them all.
    It is replaced when a contestant takes it down, and the others are then measured without that one.
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
        finally:  # This also serves a run that is told to stop.
            for dtype, taken in calibration.items():
                if taken:
                    job.add_matmul(dtype, taken)
            job.save()


def directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def cell_of(job: Job, cell: Cell, contestants: list[Contestant], call: Callable[..., Any], until: float) -> list[float]:
    """Add the cell's rows, which measure_cell makes in whatever process `call` has; returns milliseconds of the calibration around it."""
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


@lru_cache(1)  # So it forgets when another shape follows.
def forget_compiled(shape: tuple[int, ...], dtype: torch.dtype, direction: str) -> None:
    """Both masks of a shape share what is compiled. A third shape would make torch.compile generalise, and then give up."""
    torch.compiler.reset()


def measure_cell(job: Job, cell: Cell, contestants: list[Contestant]) -> tuple[list[Row], list[float]]:
    """Add the cell's rows to the job's; returns all of them, and milliseconds of the calibration around the cell."""
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
    """The extra bytes of each contestant, or why there is no such number."""

    def memory(contestant: Contestant) -> tuple[int | None, str | None]:
        if reason := refused.get(contestant.name):
            return None, reason
        at(contestant.name)
        try:
            return extra_bytes(contestant, cell), None
        except (RuntimeError, OSError) as error:
            still_usable(error)
            return None, f"memory not measured: {error}"

    both_fit = torch.device(job.device).type == "cpu" and 2 * cell.score_bytes < free_memory()
    with ThreadPoolExecutor(2 if both_fit else 1) as pool:  # On a CPU each has a process of its own.
        return list(pool.map(memory, contestants))


def bound(job: Job, cell: Cell, contestants: list[Contestant]) -> tuple[dict[str, Step], dict[str, str]]:
    """The warmed-up calls of those that can run the cell, and why the others cannot."""
    case, calls, refused, expected = cell.case(), dict[str, Step](), dict[str, str](), tuple[Tensor, ...]()
    for contestant in contestants:
        at(contestant.name)
        try:
            if reason := job.refusal(contestant.name, cell) or why_not(contestant, cell):
                raise RuntimeError(reason)
            call = bind(contestant.ready(), case, cell.direction, contestant.gradients)
            warm_up(call, job.device)
            if contestant.name != UNMASKED:
                results = call()
                expected = expected or results
                need_alike(results, expected, next(iter(calls), contestant.name))
            calls[contestant.name] = call
        except Exception as error:  # A peer that cannot run the cell is reported, and the others are measured.
            still_usable(error)
            refused[contestant.name] = in_a_line(error)
    return calls, refused


def need_alike(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], first: str) -> None:
    """Raise RuntimeError where a contestant computes something else than the first of them: that would be no comparison."""
    for one, other in zip(results, expected, strict=True):
        if not (one.float() - other.float()).norm() <= ALIKE * other.float().norm():
            raise RuntimeError(f"its results are not those of {first}")


def time_in_graphs(calls: dict[str, Step], device: str, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of a call in a CUDA graph of several, and why the other contestants cannot be captured."""
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


@lru_cache(2)
def matmul_call(dtype: torch.dtype, device: str, side: int = SIDE) -> Callable[[], object]:
    """torch.mm of two random matrices of this side. On zeros a product would run faster."""
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.mm(a, a)
    return lambda: torch.mm(a, a, out=out)
