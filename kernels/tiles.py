"""The tile that a kernel takes, looked up in tiles.csv.

A tile follows from the chip, the dtype and the shape alone, so results repeat bit for bit. `make aot` compiles the table's
tiles and reports registers, spills, shared memory and what an inner loop costs; `make tune` times tiles and writes the fastest.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..call import Problem
from .chip import INTERPRETER, generation

FEW_QUERIES = 128  # the most queries that one tile can hold
HEAD_SIZES = (32, 64, 128, 256)
WORD = 16  # Of strides that are multiples of it, Triton makes kernels that load in wide words.
SMALL = 64 * 132  # queries in all: a program of 64 for each of an H200's multiprocessors; a constant, as in plan.py
# The chips whose lines a chip reads: its own first, then those of older chips, newest first. Those with little shared memory skip sm_90's,
# and so does AMD, 942, which has no descriptors either.
CHIPS = {80: (80,), 86: (86, 80), 90: (90, 80), 100: (100, 90, 80), 942: (942, 80)}


class Tile(NamedTuple):
    """A kernel's tile of queries by keys, and how the kernel is compiled: the second half of a line of the table."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    maxnreg: int | None = None  # Without it ptxas caps some register-hungry kernels at 32 registers and spills.
    tma: bool = False  # TMA descriptors load the operands that the pass goes over, where descriptors.py finds that possible.

    def options(self) -> dict[str, int | bool | None]:
        """The compiler's options. Contraction to fused multiply-adds is Triton's default, which 3.9 wants to be told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, "maxnreg": self.maxnreg}


class Key(NamedTuple):
    """What a tile is for: the first half of a line of the table."""

    kernel: str  # In split_* and few_* the number is block_m; few_* hold all of the queries.
    call: str  # "plain", or one of the kinds of call in `find`
    chip: int  # one of CHIPS
    bytes: int  # of an element of query, key and value
    head: int  # the largest head size that the tile serves, one of HEAD_SIZES


Table = dict[Key, Tile]


def read(path: Path) -> Table:
    with path.open(newline="") as file:
        return dict(_line(*columns) for columns in csv.reader(file) if columns[0] != "kernel")


def _line(kernel: str, call: str, *columns: str) -> tuple[Key, Tile]:
    chip, size, head, block_m, block_n, warps, stages, maxnreg, tma = columns
    tile = Tile(int(block_m), int(block_n), int(warps), int(stages), int(maxnreg) if maxnreg else None, tma == "1")
    return Key(kernel, call, int(chip), int(size), int(head)), tile


def write(path: Path, table: Mapping[Key, Tile]) -> None:
    """Write one tile a line, sorted."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(Key._fields + Tile._fields)
        lines.writerows((*key, *tile[:-1], int(tile.tma)) for key, tile in sorted(table.items()))


PATH = Path(__file__).with_name("tiles.csv")
TABLE = read(PATH)


def tile(kernel: str, problem: Problem, arch: int, pointers: bool = False) -> Tile:
    """The tile of `kernel` for this problem on this chip. pointers: the call can have no descriptors.

    kernel: as in the table, or "split" or "few", whose block of queries follows from their number.
    Raises LookupError where the table has no tile.
    """
    queries = block_of(min(problem.Nq, 64 if kernel == "split" else FEW_QUERIES))
    name = f"{kernel}_{queries}" if kernel in ("split", "few") else kernel
    found = find(name, call_of(problem), arch, problem.dtype.itemsize, max(problem.D, problem.Dv), pointers)
    if found is None:
        raise LookupError(f"tiles.csv has no tile of {name} for {problem}")
    return found


def call_of(problem: Problem) -> str:
    """The kind of call, where it decides the tile.

    "map": its passes load a tile of the map's gradient. "extras": padding and dropout take registers of their own. "ragged": M's rows begin
    off wide words, and addresses of single elements take registers. "small": so few queries in all that programs of many would leave
    multiprocessors without any.
    """
    if problem.Dv == 0:
        return "map"
    if problem.has_padding or problem.dropout_p > 0:
        return "extras"
    if problem.mask_shape is not None and problem.Nk % WORD:
        return "ragged"
    return "small" if problem.B * problem.H * problem.Nq <= SMALL else "plain"


@cache
def find(kernel: str, call: str, arch: int, size: int, head: int, pointers: bool = False) -> Tile | None:
    """The table's tile; None where it has none. size: bytes of an element.

    Each chip in CHIPS is asked in turn, for a line of this kind of call, then, without descriptors, for one of "pointers", then for a
    "plain" one. The first line found serves.
    """
    if arch == INTERPRETER:  # Small tiles, so that small shapes have several.
        return Tile(int(kernel.removeprefix("few_")) if kernel.startswith("few_") else 16, 32, 4, 1, tma=not pointers)
    special = () if call == "plain" else (call,)
    kinds = (*special, "pointers", "plain") if pointers else (*special, "plain")
    limit = next(limit for limit in HEAD_SIZES if head <= limit)
    keys = (Key(kernel, kind, chip, size, limit) for chip in CHIPS[generation(arch)] for kind in kinds)
    found = next((TABLE[key] for key in keys if key in TABLE), None)
    return found._replace(tma=False) if found and pointers else found


@cache
def block_of(size: int) -> int:
    """The block that holds `size` queries or columns of a head: a power of 2, and at least the 16 that a matrix product wants."""
    return max(16, 1 << max(0, size - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels too, takes 5 microseconds a call."""
    return -(-a // b)
