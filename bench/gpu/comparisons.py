"""Two ways to make one call, timed in turn on this GPU: what is not a tile among the questions of questions.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from unittest.mock import patch

import torch

from bench.gpu.cells import Cell
from bench.gpu.tune import the_pass
from bench.measuring.clock import cache_flush, time_interleaved, timing, warm_up
from smattn import prepared
from smattn.kernels import backward_dmask

Pass = Callable[[], object]
REPEATS, CALLS = 10, 20  # the least of so many means of so many calls


def line(text: str, milliseconds: Mapping[str, float]) -> str:
    """Both, and how many times as long as the first the second takes."""
    first, second = milliseconds.values()
    return f"{text} " + "; ".join(f"{name} {ms:.4f} ms" for name, ms in milliseconds.items()) + f". {second / first:.2f} times"


def on_device(passes: Mapping[str, Pass], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds that each takes on the device, with the caches emptied before each call."""
    for call in passes.values():
        warm_up(call, device)
    return {name: timing(taken).median_ms for name, taken in time_interleaved(passes, device, seconds, cache_flush(device)).items()}


def pinned_or_not(device: str) -> dict[str, Pass]:
    """dM's pass with M in the layout of the product that it meets, and in the one that the compiler gives it."""
    call = the_pass(Cell("dmask", 2, 64), Cell("dmask", 2, 64).case(device))

    def unpinned() -> object:
        prepared.forget()
        with patch.object(backward_dmask, "pins_mask", lambda call: False):
            return call()

    def pinned() -> object:
        prepared.forget()
        return call()

    return {"pinned": pinned, "not pinned": unpinned}


def even_or_odd(kernel: str, device: str) -> dict[str, Pass]:
    """A pass over all its keys, and over one key fewer, where no row of M begins on a wide word."""
    cell = Cell(kernel, 2, 64)
    even = cell.case(device)
    assert even.mask is not None
    odd = replace(even, key=even.key[:, :, 1:], value=even.value[:, :, 1:], mask=even.mask[..., 1:].contiguous())
    return {"an even number of keys": the_pass(cell, even), "an odd one": the_pass(cell, odd)}


def of_the_host(call: Pass, synchronize: Callable[[], None] = torch.cuda.synchronize) -> dict[str, float]:
    """Milliseconds until Python has launched the pass, by an earlier call's record and made anew."""
    taken = {}
    for name, repeats in (("repeated", True), ("made anew", False)):
        prepared.switch(repeats)
        for _ in range(3):
            call()
        means = []
        for _ in range(REPEATS):
            synchronize()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            means.append((time.perf_counter() - began) / CALLS)
        taken[name] = 1e3 * min(means)
    prepared.switch(True)
    return taken
