"""Running a function in several gloo processes, and what each of them returned."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(function: Callable[[int, int], Any], world: int, folder: Path) -> list[Any]:
    """function(rank, world) in each of `world` gloo processes -> what they returned, in the order of ranks."""
    # forked, not spawned: each would import torch again
    mp.start_processes(_worker, (function, world, str(folder)), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _worker(rank: int, function: Callable[[int, int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(rank, world), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()
