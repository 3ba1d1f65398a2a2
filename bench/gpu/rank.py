"""Rank tiles by what their inner loops cost, without a GPU: `python -m bench.gpu.rank --arch 90 --kernels forward dq --heads 64 [--write]`

For each cell of the table, the present tile and the SHAPES, or WIDEST_SHAPES, are compiled ahead of time under masks of 16 and 32 bits,
in training. Those that fail `make aot` are left out, and the others ranked by the larger of their two costs: a prediction of cycles
(smattn/kernels/tools/counts.py), which no GPU has confirmed. --write puts the cheapest into kernels/tiles.csv where it is cheaper by more
than MARGIN. Each tile's cost is noted in build/rank.jsonl, so that a search goes on where the last one of the same kernels stopped; a tile
takes some three seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bench.gpu.cells import BACKWARD, FORWARD, Cell
from bench.gpu.notes import Notes
from bench.gpu.tune import CSV, NOTES, cells, present, put
from smattn.kernels import tiles as table
from smattn.kernels.tiles import HEAD_SIZES, Tile
from smattn.kernels.tools import aot
from smattn.kernels.tools.sources import sources

MARGIN = 1.02
SHAPES = ((64, 64, 4, 1), (64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 4, 2), (32, 64, 4, 1))
WIDEST_SHAPES = ((32, 64, 4, 1), (16, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (64, 16, 4, 1))  # of the widest heads


def candidates(cell: Cell, now: Tile) -> list[Tile]:
    """The present tile first. A tile whose queries its kernel's name gives keeps them."""
    rows = now.block_m if cell.kernel[-1].isdigit() else None
    shapes = WIDEST_SHAPES if cell.head == HEAD_SIZES[-1] else SHAPES
    others = [now._replace(block_m=rows or m, block_n=n, warps=w, stages=s, maxnreg=None) for m, n, w, s in shapes]
    return list(dict.fromkeys([now, *others]))


def launched(kernel: str) -> str:
    """The kernel that takes the table's tile of this name."""
    few = {"few": "few_queries", "split": "partial"}
    return few[kernel.partition("_")[0]] if kernel[-1].isdigit() else kernel.removeprefix("split_")


def cost(cell: Cell, arch: int, tile: Tile) -> float:
    """Cycles of a multiprocessor for 64 x 64 scores, under the mask for which they are more; infinite where `make aot` would fail."""
    put(cell, arch, tile)
    job, kernel = cell.job(arch), launched(cell.kernel)
    variants = [job.variant._replace(mask_dtype=dtype) for dtype in {job.dtype, torch.float32}]
    rows = [row for variant in variants for row in aot.compile_job(job._replace(variant=variant), only=kernel)]
    found = [row for row in rows if row.tile == tile]
    if not found or any(row.failure() for row in found):
        return math.inf
    return max(row.counts.cycles(row.job.arch).together() for row in found)


def cheapest(costs: Mapping[Tile, float], now: Tile) -> Tile:
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] * MARGIN < costs[now] else now


def rank(cell: Cell, arch: int, path: Path, cost: Callable[[Cell, int, Tile], float] = cost) -> Tile:
    """The cheapest tile. This process uses it from now on. path: of the notes."""
    now, notes = present(cell, arch), Notes(path, f"sm_{arch}, kernels {sources(with_tools=True)}")
    known = {Tile(*found["tile"]): found["cost"] for name, found in notes.found() if name == cell.text()}
    for tile in candidates(cell, now):
        if tile not in known:
            known[tile] = cost(cell, arch, tile)
            notes.add(cell.text(), {"tile": tile, "cost": known[tile]})
        print(f"{cell.text()}: {tile} {known[tile]:.0f} cycles predicted", flush=True)
    best = cheapest({tile: known[tile] for tile in candidates(cell, now)}, now)
    put(cell, arch, best)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(aot.SHARED_MEMORY))
    parser.add_argument("--kernels", nargs="+", default=(), choices=sorted(FORWARD | BACKWARD), help="only these")
    parser.add_argument("--heads", nargs="+", type=int, default=HEAD_SIZES, choices=HEAD_SIZES, help="only these head sizes")
    parser.add_argument("--write", action="store_true", help="put the cheapest tiles into kernels/tiles.csv")
    args = parser.parse_args()
    for cell in cells(args.arch, args.kernels, args.heads):
        if cell.call != "plain":
            continue
        now = present(cell, args.arch)
        best = rank(cell, args.arch, NOTES.with_name("rank.jsonl"))
        if best != now:
            print(f"    -> {best}", flush=True)
            if args.write:
                table.write(CSV, table.read(CSV) | {cell.key(args.arch): best})


if __name__ == "__main__":
    main()
