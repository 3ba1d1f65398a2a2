"""Runs a function in several processes of one process group and collects what they return."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(function: Callable[[int, int], Any], world: int, folder: Path, transport: str = "gloo") -> list[Any]:
    """Calls function(rank, world) in `world` processes; returns their results in the order of ranks. Over "nccl" each has its own GPU."""
    # A fork saves each process the import of torch. But the autograd of a torch that is built for CUDA does not outlive one.
    method = "fork" if torch.version.cuda is None else "spawn"
    mp.start_processes(_worker, (function, world, str(folder), transport), nprocs=world, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _worker(rank: int, function: Callable[[int, int], Any], world: int, folder: str, transport: str) -> None:
    torch.set_num_threads(1)
    if transport == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(transport, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(rank, world), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()
