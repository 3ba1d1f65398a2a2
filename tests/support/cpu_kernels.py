"""The sets of CPU kernels, one for each instruction set, and how a test chooses among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smattn import cpu

KERNELS: list[str] = [] if cpu.reasons() else torch.ops.smattn_cpu.cpu_kernels().split()  # the fastest, which runs by default, first


@contextmanager
def forced(name: str) -> Iterator[None]:
    torch.ops.smattn_cpu.select_cpu_kernels(name)
    try:
        yield
    finally:
        torch.ops.smattn_cpu.select_cpu_kernels(KERNELS[0])


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
