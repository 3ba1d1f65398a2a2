"""Whether a contestant can run a cell, and has the memory for it."""

from __future__ import annotations

import torch

from bench.measuring.cell import Cell
from bench.measuring.peers import Contestant
from bench.reporting.rows import BOTH


def why_not(contestant: Contestant, cell: Cell) -> str | None:
    """Why a contestant is left out of a cell; None when it is not."""
    kind = torch.device(cell.device).type
    if cell.direction == BOTH and kind in contestant.forward_only_on:
        return f"has no backward on a {kind.upper()}"
    free = free_on_cuda() if kind == "cuda" else free_memory()
    if contestant.holds_scores and cell.score_bytes > free:
        return f"may need {cell.score_bytes / 1e9:.0f} GB for its score tensors, {free / 1e9:.0f} GB are free"
    return None


def free_on_cuda() -> int:
    """Free bytes of the GPU. Those that torch holds and does not use count as free."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def free_memory() -> int:
    """Free bytes of the machine."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
