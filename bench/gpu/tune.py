"""Search the tiles of kernels/tiles.csv by timing them on this GPU, and write the fastest there: `make tune`

For each (kernel, bytes of an element, head size) that has a plain line, or one for pointers, the tiles near the present one are compiled
ahead of time, side by side, and those that spill, want more shared memory than the chip has or otherwise fail `make aot` are left out. The
others are timed in turn within the pass that they serve, with the caches emptied before each call. The fastest that is right takes the
place of the present one when it is faster by more than MARGIN: it becomes this chip's line. The outcome of each cell is noted in
build/tune.jsonl: the next search of this chip, these kernels and this Triton takes the noted tiles over and goes on behind them. `--anew`
forgets them. Once `make gpu` has installed the tree into build/gpu, this searches a part of the table:

    cd bench && PYTHONPATH=../build/gpu:.. python -m bench.gpu.tune --kernels forward dq --heads 64 128
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

import smattn
from bench.gpu.cells import BACKWARD, FORWARD, VARIANTS, Cell
from bench.gpu.notes import Notes
from bench.measuring.clock import cache_flush, time_interleaved, timing, warm_up
from bench.measuring.machine import ROOT
from bench.measuring.worker import Lost, Worker, at, in_a_line, still_usable
from smattn import prepared
from smattn.kernels import tiles as table
from smattn.kernels.chip import arch_of, generation
from smattn.kernels.tiles import HEAD_SIZES, Table, Tile
from smattn.kernels.tools import aot
from smattn.kernels.tools.sources import sources
from smattn.testing import Case, errors, run

CSV, NOTES = ROOT / "kernels" / "tiles.csv", ROOT / "build" / "tune.jsonl"
Call = Callable[..., Any]  # takes a function and its arguments, and calls it in whatever process
MARGIN = 1.03
COMPILING = 60.0  # seconds that the compiler has for all tiles of a cell
SIZES, WARPS, STAGES = (16, 32, 64, 128, 256), (4, 8), (1, 2, 3, 4)
FEWER = 4  # A check against float64 divides the keys, and many queries, by this.


def cells(arch: int, kernels: Sequence[str] = (), heads: Sequence[int] = HEAD_SIZES) -> Iterator[Cell]:
    """A cell for each line that this chip reads or whose place it could take, 16-bit elements first."""
    read = [key for key in table.TABLE if key.chip in table.CHIPS[generation(arch)] and key.call in VARIANTS]
    found = dict.fromkeys(Cell(key.kernel, key.bytes, key.head, key.call) for key in read)
    for cell in sorted(found, key=lambda cell: (cell.itemsize, cell.head)):
        if (not kernels or cell.kernel in kernels) and cell.head in heads:
            yield cell


def present(cell: Cell, arch: int) -> Tile:
    """What serves there now: this chip's own tile, or the one that it falls back to."""
    found = table.find(cell.kernel, "plain", arch, cell.itemsize, cell.head, pointers=cell.call == "pointers")
    assert found is not None, cell
    return found


def put(cell: Cell, arch: int, tile: Tile) -> None:
    """From now on this process uses the tile there."""
    table.TABLE[cell.key(arch)] = tile
    table.find.cache_clear()
    prepared.forget()


def candidates(cell: Cell, now: Tile) -> list[Tile]:
    """The present tile first, then it without TMA, then its neighbours in every direction.

    A tile of few_* holds all queries, so it grows in keys alone. A larger tile in float32 would keep the compiler busy for minutes.
    """

    def near(size: int) -> list[int]:
        return [n for n in SIZES if size / 2 <= n <= 2 * size]

    rows = [now.block_m] if cell.kernel.startswith("few") else near(now.block_m)
    warps = sorted({*WARPS, now.warps})
    shapes = product(rows, near(now.block_n), warps, STAGES)
    largest = now.block_m * now.block_n * (2 if cell.itemsize == 2 else 1)
    others = [now._replace(block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in shapes if 64 * w <= m * n <= largest]
    return list(dict.fromkeys([now, now._replace(tma=False), *others]))


def as_launched(arch: int, kernel: Any, arguments: dict[str, Any], tile: Tile) -> Any:
    """The compiled kernel, left where the launch will find it."""
    return kernel.warmup(**arguments, grid=(1,), **tile.options())


def failure(cell: Cell, arch: int, tile: Tile) -> str:
    """Why the compiler's figures rule this tile out; "" when they do not. Forward is compiled as it is timed and as it is in training."""
    put(cell, arch, tile)
    try:
        rows = [row for training in {True, not cell.forward} for row in aot.compile_job(cell.job(arch, training), as_launched)]
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    found = [row.failure() for row in rows if row.tile == tile]
    return next(filter(None, found), "") if found else "no kernel was launched with it"


def compiled(cell: Cell, arch: int, tiles: list[Tile], pool: ProcessPoolExecutor) -> dict[Tile, str]:
    """The failure of each tile. One that the compiler does not finish in time fails too."""
    futures, ending = {tile: pool.submit(failure, cell, arch, tile) for tile in tiles}, time.monotonic() + COMPILING

    def result(future: Future[str]) -> str:
        try:
            return future.result(max(0.0, ending - time.monotonic()))
        except TimeoutError:
            future.cancel()
            return f"not compiled in {COMPILING:.0f} s"

    return {tile: result(future) for tile, future in futures.items()}


def the_pass(cell: Cell, case: Case) -> Callable[[], object]:
    """The call that the kernel serves: forward, or backward alone."""
    assert case.mask is not None and isinstance(case.alpha, torch.Tensor)
    leaves = [tensor.detach().requires_grad_(not cell.forward) for tensor in case.inputs().values()]

    def forward() -> torch.Tensor:
        return smattn.soft_masked_attention(*leaves, key_padding_mask=case.key_padding_mask, backend="triton")

    if cell.forward:
        return forward
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, case.dout, retain_graph=True)


def timed(cell: Cell, arch: int, tiles: list[Tile], device: str, seconds: float) -> dict[Tile, float]:
    """Median milliseconds of the pass with each tile. Tiles that do not run are left out."""
    call, calls = the_pass(cell, cell.case(device)), dict[str, Callable[[], object]]()

    def with_tile(tile: Tile) -> object:
        put(cell, arch, tile)
        return call()

    named = {str(tile): tile for tile in tiles}
    for name, tile in named.items():
        at(name)
        try:
            warm_up(partial(with_tile, tile), device)
            calls[name] = partial(with_tile, tile)
        except Exception as error:
            still_usable(error)
            print(f"    {name}: {in_a_line(error)}", flush=True)
    at("timing")
    return {named[name]: timing(taken).median_ms for name, taken in time_interleaved(calls, device, seconds, cache_flush(device)).items()}


def chosen(times: Mapping[Tile, float], now: Tile, right: Callable[[Tile], bool]) -> Tile:
    """The fastest tile that is right, if it is faster than the present one by more than MARGIN; else the present one."""
    limit = times.get(now, math.inf) / MARGIN
    return next((tile for tile in sorted(times, key=times.__getitem__) if times[tile] < limit and right(tile)), now)


def is_right(cell: Cell, arch: int, device: str, tile: Tile) -> bool:
    put(cell, arch, tile)
    case = cell.case(device, FEWER)
    return all(row.within for row in errors(run(case, "triton"), case))


def with_table(other: Table, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) with the table of the process that asks."""
    table.TABLE.update(other)
    table.find.cache_clear()
    prepared.forget()
    return function(*args)


def survivors(cell: Cell, arch: int, tiles: list[Tile], device: str, seconds: float, call: Call) -> dict[Tile, float]:
    """What `timed` finds in a process that a tile may take down. The others are then timed in a new one."""
    while tiles:
        try:
            times: dict[Tile, float] = call(with_table, dict(table.TABLE), timed, cell, arch, tiles, device, seconds)
            return times
        except Lost as lost:
            print(f"    {lost.at}: took its process down: {lost}", flush=True)
            fewer = [tile for tile in tiles if str(tile) != lost.at]
            tiles = fewer if len(fewer) < len(tiles) else []
    return {}


def tune(cell: Cell, arch: int, device: str, pool: ProcessPoolExecutor, seconds: float, call: Call) -> Tile:
    """Find the tile that is to be there. This process uses it from now on."""

    def right(tile: Tile) -> bool:
        try:
            return bool(call(with_table, dict(table.TABLE), is_right, cell, arch, device, tile))
        except RuntimeError as error:
            print(f"    {tile}: {error}", flush=True)
            return False

    now = present(cell, arch)
    failures = compiled(cell, arch, candidates(cell, now), pool)
    times = survivors(cell, arch, [tile for tile, why in failures.items() if not why or tile == now], device, seconds, call)
    best = chosen(times, now, right)
    put(cell, arch, best)
    print(f"{cell.text()}: {len(times)} of {len(failures)} timed, {now} {times.get(now, math.nan):.4f} ms", flush=True)
    if best != now:
        print(f"    -> {best} {times[best]:.4f} ms", flush=True)
    return best


def search(todo: Sequence[Cell], arch: int, notes: Notes, tuned: Callable[[Cell], Tile], until: float) -> int:
    """Search every cell, those noted first, and write each tile that changes; returns how many no time was left for."""
    found, left = {cell: Tile(**tile) for cell, tile in notes.found()}, 0
    for cell in sorted(todo, key=lambda cell: cell.text() not in found):
        now = present(cell, arch)
        if cell.text() in found:
            best = found[cell.text()]
            print(f"{cell.text()}: {best}, found before", flush=True)
            put(cell, arch, best)
        elif time.monotonic() > until:
            print(f"{cell.text()}: no time was left", flush=True)
            left += 1
            continue
        else:
            best = tuned(cell)
            notes.add(cell.text(), best._asdict())
        if best != now:
            table.write(CSV, table.read(CSV) | {cell.key(arch): best})
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernels", nargs="+", default=(), choices=sorted(FORWARD | BACKWARD), help="only these")
    parser.add_argument("--heads", nargs="+", type=int, default=HEAD_SIZES, choices=HEAD_SIZES, help="only these head sizes")
    parser.add_argument("--seconds", type=float, default=0.02, help="time budget of one tile (default 0.02)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--anew", action="store_true", help="forget what was found before")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    if args.anew:
        NOTES.unlink(missing_ok=True)
    until, arch = time.monotonic() + 60 * args.minutes, arch_of(torch.device("cuda"))
    todo = list(cells(arch, args.kernels, args.heads))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool, Worker() as worker:
        notes = Notes(NOTES, f"{torch.cuda.get_device_name()}, kernels {sources()}")
        left = search(todo, arch, notes, lambda cell: tune(cell, arch, "cuda", pool, args.seconds, worker), until)
    print(f"{len(todo) - left} of {len(todo)} cells are done" + "; the next search goes on from here" * (left > 0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
