"""Compile ahead: what is compiled runs once for each shape, in processes side by side, and those that measure then find it on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch

from bench.measuring.cell import Cell, bind
from bench.measuring.fits import free_memory, why_not
from bench.measuring.job import Job
from bench.measuring.machine import on_a_gpu
from bench.measuring.peers import Contestant
from bench.measuring.worker import SILENCE, Lost, Worker
from bench.reporting.rows import BOTH, OURS

COMPILERS = 16  # processes
PATIENCE = {"cpu": 900.0, "cuda": SILENCE}  # seconds; a busy CPU compiles for long, and no kernel of its hangs


def compile_ahead(
    cells: list[Cell], contestants: list[Contestant], cannot: Callable[[str, str], object], until: float = math.inf
) -> None:
    """Compile every contestant that compiles, for every shape. cannot: told at once of a peer that cannot be, by Job.at, and why.

    until: on time.monotonic's clock; what is not begun by then is compiled when it is measured. The measuring process would take as long
    to find out that a peer cannot be compiled, once for each mask.
    """
    shapes = {(cell.shape, cell.dtype, cell.direction): cell for cell in cells}.values()
    on_gpu = on_a_gpu(cells[0].device)
    slow = [contestant for contestant in contestants if contestant.compiled or on_gpu and contestant.name.startswith(OURS)]
    left = sorted(product(slow, shapes), key=lambda pair: (pair[0].compiled, pair[1].direction == BOTH))  # The last, the longest, go first.

    def compile_some() -> None:
        with Worker(PATIENCE[torch.device(cells[0].device).type]) as worker:
            while left and time.monotonic() < until:
                contestant, cell = left.pop()
                try:
                    worker(_compile, contestant, cell, torch.get_num_threads())
                except RuntimeError as error:
                    print(f"{(where := Job.at(contestant.name, cell))}: {error}", flush=True)
                    is_crowded = isinstance(error, Lost) or "out of memory" in f"{error}"  # Many run at once here: alone it may do.
                    if not contestant.name.startswith(OURS) and not is_crowded:
                        cannot(where, f"{error}")

    processes = min(COMPILERS, os.cpu_count() or 1, len(left))
    with ThreadPoolExecutor(max(1, processes)) as pool:
        try:
            for done in [pool.submit(compile_some) for _ in range(processes)]:
                done.result()
        finally:  # This also serves a run that is told to stop.
            left.clear()


def _compile(contestant: Contestant, cell: Cell, threads: int) -> None:
    """Run the call once, so that what it compiles is on disk. threads: the number for which a CPU's code is compiled."""
    gpu = on_a_gpu(cell.device)
    torch.compiler.reset()  # Else it has too many shapes of a peer, and gives up.
    torch.set_num_threads(1 if gpu else threads)
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]  # Else each process starts one for every core.
    if why_not(contestant, cell) or (not gpu and (os.cpu_count() or 1) * cell.score_bytes > free_memory()):
        return
    bind(contestant.ready(), cell.blank(), cell.direction, contestant.gradients)()
    if gpu:
        torch.cuda.synchronize()
