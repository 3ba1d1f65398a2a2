"""Measure contestants side by side: interleaved medians, and the peak of extra memory each in a fresh process.

Time. Every contestant is called in turn, round after round, after a warm-up of its own, so that a disturbance of the machine meets them
all. A contestant stays in the rounds until it has used its time budget, and for MIN_REPS calls at least, or SLOW_REPS when those already
take three budgets. No sample is dropped. With warm caches each timed call follows untimed ones of the same contestant, one at least and as
many as fit in WARM_MS: the steady state of a loop, worker threads awake. With cold caches it follows the reading of a buffer that is
many times as large as the device's largest cache. That too is part of the budget.

On a GPU a warm call finds the device idle, and what Python and the launches take counts. A cold call's launches queue up behind the reading
of the buffer, and those of a CUDA graph are one: there only the device's own time is left.

Memory. What the process grows by at its highest point during one call, less the outputs and gradients the call returns: whatever a call
needs besides its inputs and results, scratch that it keeps for the next call included. On a GPU that is torch.cuda.max_memory_allocated.
On a CPU it is the kernel's own high-water mark of resident memory (VmHWM, reset through /proc/self/clear_refs), read in a process that
has run nothing but a small call of the same contestant, so that code pages and thread stacks are not counted. A compiled contestant
warms up on the very shape, or the compiler's memory would be counted.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from bench.measuring.peers import Attend, Contestant
from bench.reporting.rows import FORWARD
from smattn.call import acc_dtype
from smattn.testing import Case, Workload, make_case

FLUSH = 8  # times the largest cache
READINGS = {"cpu": 1, "cuda": 16}  # of it: on a GPU two milliseconds, longer than any call takes to be launched
GRAPH_CALLS = 10  # in one CUDA graph
SLOW_REPS, MIN_REPS, MAX_REPS = 3, 5, 200
WARM_MS = 5.0
WARM_UP_SECONDS = 1.0  # a warm-up is two calls, or one that took this long
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cell:
    """What all contestants are given: a shape, a kind of mask (in the inputs' dtype), a dtype, a device and a direction."""

    workload: Workload
    mask: str
    dtype: torch.dtype
    device: str
    direction: str
    also_cold: bool = False  # timed with warm caches, then with cold ones
    also_graph: bool = False  # and then in a CUDA graph

    def case(self) -> Case:
        return _case(self.workload, self.mask, self.dtype, self.device)

    def blank(self) -> Case:
        """In all but its numbers, which nothing that is compiled depends on and which take seconds to draw."""
        w = self.workload

        def ones(*sizes: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.ones(sizes, dtype=dtype, device=self.device)

        queries, keys, alpha = (w.B, w.H, w.Nq, w.D), (w.B, w.H, w.Nk, w.D), ones(w.H, dtype=acc_dtype(self.dtype))
        return Case(ones(*queries), ones(*keys), ones(*keys), ones(w.B, w.Nq, w.Nk), alpha, dout=ones(*queries))

    def smaller(self) -> Cell:
        w = self.workload
        return replace(self, workload=replace(w, B=1, Nq=min(w.Nq, 16), Nk=min(w.Nk, 64)))

    @property
    def shape(self) -> tuple[int, ...]:
        w = self.workload
        return (w.B, w.H, w.Nq, w.Nk, w.D)

    @property
    def flops(self) -> int:
        """Two matmuls forward; with backward 3.5 times that, whatever a contestant recomputes."""
        w = self.workload
        forward = 4 * w.B * w.H * w.Nq * w.Nk * w.D
        return forward if self.direction == FORWARD else forward * 7 // 2

    @property
    def io_bytes(self) -> int:
        """Inputs and output; with backward the incoming gradient and the five outgoing ones as well."""
        w = self.workload
        inputs = (w.B * w.H * (w.Nq + 2 * w.Nk) * w.D + w.B * w.Nq * w.Nk) * self.dtype.itemsize + 4 * w.H
        output = w.B * w.H * w.Nq * w.D * self.dtype.itemsize
        return inputs + output if self.direction == FORWARD else 2 * (inputs + output)


@lru_cache(2)  # both masks of a shape: the largest take seconds to make
def _case(w: Workload, mask: str, dtype: torch.dtype, device: str) -> Case:
    return make_case(w.B, w.H, w.Nq, w.Nk, w.D, dtype=dtype, mask=mask, mask_dtype=dtype, device=device)


def bind(attend: Attend, case: Case, direction: str, gradients: int = 5) -> Step:
    """One call: the output, and with BOTH the gradients of query, key, value, mask and alpha, or of the first so many."""
    assert case.mask is not None and isinstance(case.alpha, Tensor)
    inputs = (case.query, case.key, case.value, case.mask[:, None], case.alpha)
    if direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(*inputs),)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves[:gradients], case.dout))

    return forward_and_backward


@dataclass(frozen=True)
class Timing:
    median_ms: float
    p10: float
    p90: float
    reps: int


def timing(samples: list[float]) -> Timing:
    """Samples in ms."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def once(call: Callable[[], object], device: str, before: Callable[[], object] | None = None) -> float:
    """Milliseconds of one call after `before`, on the device's own clock; a GPU goes from one to the other without the host."""
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
    """Milliseconds of every warmed-up call, called in turn, round after round, until each has used `seconds`.

    Before each timed call comes `before`, or the same call, untimed, for WARM_MS.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    used = dict.fromkeys(calls, 0.0)  # ms
    gc.collect()
    while running := [name for name, taken in samples.items() if _goes_on(len(taken), used[name] / 1e3, seconds)]:
        for name in running:
            began = time.perf_counter()
            if before is None:
                in_a_loop(calls[name], device)
            samples[name].append(once(calls[name], device, before))
            used[name] += (time.perf_counter() - began) * 1e3
    return samples


def in_a_loop(call: Callable[[], object], device: str) -> None:
    """Call it for WARM_MS, once at least."""
    taken = once(call, device)
    while taken < WARM_MS:
        taken += once(call, device)


def in_graph(call: Callable[[], object]) -> Callable[[], object]:
    """GRAPH_CALLS of them, captured in one CUDA graph: its replay."""
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


def on_a_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def largest_cache(device: str) -> int:
    """Bytes; of a CPU those that one core reaches."""
    if on_a_gpu(device):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]] for size in sizes), default=2**26)  # where it is not told


def _goes_on(reps: int, used: float, seconds: float) -> bool:
    return reps < SLOW_REPS or reps < MIN_REPS and used < 3 * seconds or reps < MAX_REPS and used < seconds


def extra_bytes(contestant: Contestant, cell: Cell) -> int:
    """Peak memory of one call beyond inputs, outputs and gradients. RuntimeError when it could not be measured."""
    if on_a_gpu(cell.device):
        return _peak_on_cuda(bind(contestant.ready(), cell.case(), cell.direction, contestant.gradients))
    return peak_beyond_results(partial(_call_and_warm_up, contestant, cell), cell.device)


def _call_and_warm_up(contestant: Contestant, cell: Cell) -> tuple[Step, Step]:
    attend = contestant.ready()
    call = bind(attend, cell.case(), cell.direction, contestant.gradients)
    return call, call if contestant.compiled else bind(attend, cell.smaller().case(), cell.direction, contestant.gradients)


def peak_beyond_results(make: Callable[[], tuple[Step, Step]], device: str) -> int:
    """Peak memory of a call beyond what was there before and what it returns: `make`, picklable, gives the call and its warm-up."""
    if on_a_gpu(device):
        return _peak_on_cuda(make()[0])
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported torch and run nothing
    context.set_forkserver_preload(["torch", "smattn.testing"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_on_cpu, args=(sender, make, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    assert isinstance(answer, int)
    return answer


def _peak_on_cpu(sender: Connection, make: Callable[[], tuple[Step, Step]], threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        call, warm = make()
        warm()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        before = _status("VmRSS")
        results = call()
        sender.send(_status("VmHWM") - before - sum(tensor.nbytes for tensor in results))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _peak_on_cuda(call: Step) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in results)
