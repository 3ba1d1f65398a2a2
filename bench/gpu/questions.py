"""What the counts of docs/design/tiles.md leave open, asked of this GPU in a few minutes: `make gpu PART=questions`

Most questions are a kernel's tile and another one. Both are timed in turn, with the caches emptied before each call, the results of both
are checked against float64, and a line says which to keep. The others are two ways to make one call: see comparisons.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.gpu.cells import Cell
from bench.gpu.comparisons import even_or_odd, line, of_the_host, on_device, pinned_or_not
from bench.gpu.tune import chosen, is_right, present, put, the_pass, timed
from smattn.kernels.chip import arch_of
from smattn.kernels.tiles import Tile


class Question(NamedTuple):
    text: str
    cell: Cell
    other: Tile


QUESTIONS = (
    Question("forward with heads of 64: one program a multiprocessor, or several?", Cell("forward", 2, 64), Tile(64, 64, 4, 2, tma=True)),
    Question("forward with heads of 128: the same", Cell("forward", 2, 128), Tile(64, 64, 4, 2, tma=True)),
    Question("dK and dV with heads of 128: four warps, or eight?", Cell("dkdv", 2, 128), Tile(32, 64, 8, 2, tma=True)),
    Question("dK and dV with heads of 64: one stage, or two?", Cell("dkdv", 2, 64), Tile(64, 64, 4, 2, tma=True)),
    Question("dM with heads of 64: more programs, or fewer reads?", Cell("dmask", 2, 64), Tile(128, 64, 8, 2, tma=True)),
    Question("dQ with heads of 64: one stage, or two?", Cell("dq", 2, 64), Tile(64, 64, 4, 2, tma=True)),
)
Times = Callable[[Cell, int, list[Tile], str, float], dict[Tile, float]]
Check = Callable[[Cell, int, str, Tile], bool]


def answer(question: Question, arch: int, times: Times = timed, right: Check = is_right, seconds: float = 1.0) -> str:
    """A line that names the tile to keep. The table of this process is as before."""
    cell, now = question.cell, present(question.cell, arch)
    other = question.other._replace(tma=question.other.tma and now.tma)
    taken = times(cell, arch, [now, other], "cuda", seconds)
    keep = chosen(taken, now, lambda tile: right(cell, arch, "cuda", tile))
    put(cell, arch, now)
    figures = "; ".join(f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages} {taken[tile]:.4f} ms" for tile in taken)
    return f"{question.text} {cell.text()}: {figures or 'neither ran'}. Keep {keep.block_m}x{keep.block_n} w{keep.warps} s{keep.stages}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    arch, device = arch_of(torch.device("cuda")), "cuda"
    for question in QUESTIONS:
        print(answer(question, arch), flush=True)
    print(line("dM with heads of 64: is M's layout to be pinned?", on_device(pinned_or_not(device), device, 1.0)), flush=True)
    for kernel in ("forward", "dq"):
        print(line(f"{kernel}'s pass: what does an odd length cost?", on_device(even_or_odd(kernel, device), device, 1.0)), flush=True)
    for cell in (Cell("split_16", 2, 64), Cell("few_16", 2, 64), Cell("forward", 2, 64), Cell("dq", 2, 64)):
        print(line(f"Python's time for the pass of {cell.text()}", of_the_host(the_pass(cell, cell.case(device)))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
