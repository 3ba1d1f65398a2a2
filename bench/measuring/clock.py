"""Time contestants side by side: in turn, round after round, each after a warm-up of its own, so that a disturbance meets them all.

A contestant stays in the rounds until it has used its time budget. It makes MIN_REPS calls at least, or SLOW_REPS when those take three
budgets. No sample is dropped. With warm caches a timed call follows untimed ones of the same contestant, at least one and as many as fit in
WARM_MS: that is the steady state of a loop, with the worker threads awake. With cold caches it follows the reading of a buffer that is
several times as large as the device's largest cache. The untimed work is part of the budget.

On a GPU a warm call finds the device idle, so what Python and the launches take counts. A cold call's launches queue up behind the reading
of the buffer, and a CUDA graph is one launch: there nothing but the device's own time is left.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.measuring.machine import on_a_gpu

FLUSH = 4  # the buffer's size, as a multiple of the largest cache's
READINGS = {"cpu": 1, "cuda": 16}  # of the buffer; on a GPU they take about a millisecond, longer than most calls take to be launched
GRAPH_CALLS = 10  # the calls in one CUDA graph
SLOW_REPS, MIN_REPS, MAX_REPS = 3, 5, 200
WARM_MS = 5.0
WARM_UP_SECONDS = 1.0  # A warm-up is two calls, or one that took this long.


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the tenth and ninetieth percentile."""

    median_ms: float
    p10: float
    p90: float
    reps: int


def timing(samples: list[float]) -> Timing:
    """The statistics of samples in milliseconds."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def once(call: Callable[[], object], device: str, before: Callable[[], object] | None = None) -> float:
    """Milliseconds of one call after `before`, by the device's own clock. A GPU goes from one to the other without the host."""
    if on_a_gpu(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before:
            before()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    if before:
        before()
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def warm_up(call: Callable[[], object], device: str) -> None:
    if once(call, device) < WARM_UP_SECONDS * 1e3:
        call()


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], device: str, seconds: float, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """The milliseconds of every warmed-up call, called in turn, round after round, until each has used `seconds`.

    Before each timed call comes `before`, or, without it, the same call untimed for WARM_MS.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    used = dict.fromkeys(calls, 0.0)  # seconds
    gc.collect()
    while running := [name for name, taken in samples.items() if goes_on(len(taken), used[name], seconds)]:
        for name in running:
            began = time.perf_counter()
            if before is None:
                in_a_loop(calls[name], device)
            samples[name].append(once(calls[name], device, before))
            used[name] += time.perf_counter() - began
    return samples


def goes_on(reps: int, used: float, seconds: float) -> bool:
    """Whether a contestant that made `reps` calls and used so many seconds of its budget makes another."""
    if reps < SLOW_REPS:
        return True
    if reps < MIN_REPS:
        return used < 3 * seconds
    return reps < MAX_REPS and used < seconds


def in_a_loop(call: Callable[[], object], device: str) -> None:
    """Call it for WARM_MS, and at least once."""
    taken = once(call, device)
    while taken < WARM_MS:
        taken += once(call, device)


def in_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph that holds the call GRAPH_CALLS times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def cache_flush(device: str) -> Callable[[], object]:
    """A call after which the device's caches hold nothing from before it."""
    buffer, readings = torch.ones(FLUSH * largest_cache(device) // 4, device=device), READINGS[torch.device(device).type]
    return lambda: [buffer.sum() for _ in range(readings)][-1]


def largest_cache(device: str) -> int:
    """Bytes of the device's largest cache; of a CPU's, among those that one core reaches."""
    if on_a_gpu(device):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=2**26)  # 64 MiB where the system does not tell.
