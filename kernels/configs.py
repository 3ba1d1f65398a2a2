"""Tile sizes, one static table: a kernel's tile follows from chip, dtype and shape alone, so results repeat bit for bit.

`python -m smattn.kernels.aot` compiles every row and reports its registers, spills and shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton

from ..call import Problem

FEW_QUERIES = 128  # up to here the queries fit one tile
# A split over keys aims at this many programs, two for each of an H200's 132 multiprocessors; a constant: no result depends on the chip.
SPLIT_PROGRAMS = 264
INTERPRETER = 0  # the arch of TRITON_INTERPRET=1
SMALL_SHARED = (86, 89, 120, 121)  # chips with 99 KB of shared memory for a program, where sm_80 has 163


@dataclass(frozen=True)
class TileConfig:
    """One kernel's tile of queries by keys, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None  # per thread; ptxas settles for 32 in some kernels that need more than there are, unless told how many
    tma: bool = False  # what the pass goes over is loaded by descriptors, where descriptors.py finds that possible

    def options(self) -> dict[str, int | bool | None]:
        """For the compiler. Contraction to fused multiply-adds is Triton's default, which 3.9 wants to hear said."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True, "maxnreg": self.registers}


T = TileConfig
NONE = T(0, 0, 0, 0)  # see one_tile
# (kernel, arch, bytes of an element) -> tiles for head sizes up to (32, 64, 128, 256). In few_* the number is block_m, all of the queries.
# *_pointers: in place of a tile with tma where no descriptors are possible. Without such a row it is the same tile.
TABLE: dict[tuple[str, int, int], tuple[TileConfig, TileConfig, TileConfig, TileConfig]] = {
    ("forward", 80, 2): (T(128, 64, 8, 3), T(128, 64, 8, 3), T(64, 32, 8, 2), T(64, 16, 8, 2)),
    ("forward", 80, 4): (T(64, 64, 8, 2), T(64, 32, 8, 2, 255), T(64, 32, 8, 2), T(32, 32, 8, 1)),
    ("forward", 86, 2): (T(128, 64, 8, 3), T(128, 64, 8, 2), T(64, 32, 8, 2), T(64, 16, 8, 2)),
    ("forward", 90, 4): (T(64, 64, 8, 2), T(64, 32, 8, 2), T(64, 32, 8, 2), T(32, 32, 8, 1)),
    ("forward", 100, 4): (T(64, 64, 8, 2), T(64, 32, 8, 2), T(64, 32, 8, 2, 255), T(32, 32, 8, 1)),
    ("forward", 90, 2): (T(64, 64, 4, 1, tma=True), T(64, 64, 4, 1, tma=True), T(128, 64, 8, 2, tma=True), T(64, 32, 8, 2, tma=True)),
    ("forward", 100, 2): (T(128, 32, 8, 3, tma=True), T(128, 32, 4, 2, tma=True), T(128, 64, 8, 2, tma=True), T(64, 32, 8, 2, tma=True)),
    ("forward_pointers", 90, 2): (T(128, 64, 8, 3), T(128, 64, 8, 3), T(128, 32, 8, 3), T(32, 16, 4, 2)),
    ("split_16", 80, 2): (T(16, 128, 4, 3), T(16, 128, 4, 3), T(16, 64, 4, 2, 168), T(16, 64, 8, 2)),
    ("split_16", 80, 4): (T(16, 64, 4, 2), T(16, 64, 4, 2), T(16, 64, 8, 1), T(16, 32, 8, 1)),
    ("split_32", 80, 2): (T(32, 64, 4, 3, 255), T(32, 64, 4, 2, 255), T(32, 64, 8, 2), T(32, 64, 8, 2)),
    ("split_32", 80, 4): (T(32, 64, 4, 2), T(32, 32, 4, 1), T(32, 32, 8, 1), T(32, 32, 8, 1)),
    ("split_64", 80, 2): (T(64, 64, 4, 3), T(64, 32, 4, 3), T(64, 32, 8, 2), T(32, 32, 8, 2)),
    ("split_64", 90, 2): (T(64, 32, 4, 1), T(64, 32, 4, 1), T(64, 32, 4, 2), T(32, 32, 8, 2)),
    ("split_64", 100, 2): (T(64, 64, 4, 3), T(64, 32, 4, 3), T(64, 32, 4, 2), T(32, 32, 8, 2)),
    ("split_64", 80, 4): (T(64, 64, 8, 2), T(64, 32, 8, 2), T(32, 32, 8, 1), T(32, 32, 8, 1)),
    ("few_16", 80, 2): (T(16, 128, 8, 1, 255), T(16, 128, 8, 1), T(16, 64, 8, 1), T(16, 32, 8, 1)),
    ("few_16", 80, 4): (T(16, 32, 4, 1, 255), T(16, 32, 8, 1, 255), T(16, 16, 8, 1, 255), NONE),
    ("few_32", 80, 2): (T(32, 32, 8, 1), T(32, 64, 8, 1), T(32, 32, 8, 1), NONE),
    ("few_32", 90, 2): (T(32, 64, 8, 1), T(32, 64, 8, 1), T(32, 32, 8, 1), NONE),
    ("few_32", 100, 2): (T(32, 32, 8, 1), T(32, 64, 8, 1), T(32, 32, 8, 1), NONE),
    ("few_32", 80, 4): (T(32, 16, 8, 1, 255), T(32, 32, 8, 1), NONE, NONE),
    ("few_32", 90, 4): (T(32, 32, 8, 1), T(32, 32, 8, 1), NONE, NONE),
    ("few_64", 80, 2): (T(64, 32, 8, 1), T(64, 32, 8, 1), NONE, NONE),
    ("few_64", 90, 2): (T(64, 64, 8, 1), T(64, 32, 8, 1), NONE, NONE),
    ("few_64", 100, 2): (T(64, 64, 8, 1, 255), T(64, 32, 8, 1), NONE, NONE),
    ("few_64", 80, 4): (T(64, 16, 8, 1, 255), NONE, NONE, NONE),
    ("few_64", 90, 4): (T(64, 16, 4, 1), NONE, NONE, NONE),
    ("few_128", 80, 2): (T(128, 32, 8, 1), T(128, 16, 8, 1), NONE, NONE),
    ("few_128", 90, 2): (T(128, 32, 8, 1), T(128, 32, 8, 1), NONE, NONE),
    ("few_128", 100, 2): (T(128, 16, 8, 1), T(128, 16, 8, 2), NONE, NONE),
    ("few_128", 80, 4): (T(128, 16, 8, 1), NONE, NONE, NONE),
    ("dkdv", 80, 2): (T(32, 64, 4, 2), T(64, 32, 4, 2), T(32, 64, 8, 2), T(32, 32, 8, 1)),
    ("dkdv", 90, 2): (T(64, 64, 4, 1, tma=True), T(64, 64, 4, 1, tma=True), T(32, 64, 8, 2, tma=True), T(32, 32, 8, 1, tma=True)),
    ("dkdv", 100, 2): (T(32, 64, 4, 2, 96, True), T(32, 64, 4, 2, tma=True), T(32, 64, 8, 2, tma=True), T(32, 32, 8, 1, tma=True)),
    ("dkdv", 80, 4): (T(32, 64, 4, 1), T(32, 64, 8, 1), T(32, 32, 8, 1), T(16, 32, 8, 1)),
    ("dkdv", 86, 4): (T(32, 64, 4, 1), T(32, 64, 8, 1), T(32, 32, 8, 1), T(16, 16, 8, 1)),
    ("dq", 80, 2): (T(128, 64, 8, 2), T(128, 64, 8, 2), T(64, 32, 8, 2), T(32, 32, 8, 1)),
    ("dq", 90, 2): (T(64, 64, 4, 1, tma=True), T(64, 64, 4, 1, tma=True), T(64, 64, 4, 2, tma=True), T(32, 32, 8, 1, tma=True)),
    ("dq_pointers", 90, 2): (T(128, 64, 8, 2), T(128, 64, 8, 2), T(64, 32, 8, 2), T(32, 32, 8, 1)),
    ("dq", 100, 2): (T(128, 64, 8, 2, tma=True), T(128, 64, 8, 2, 255, True), T(64, 32, 8, 2, tma=True), T(32, 32, 8, 1, tma=True)),
    ("dq", 80, 4): (T(64, 32, 4, 1), T(64, 32, 8, 1), T(32, 32, 8, 1), T(16, 16, 8, 1, 255)),
    ("dq", 90, 4): (T(64, 32, 4, 1), T(64, 32, 8, 1), T(32, 32, 8, 1), T(32, 16, 8, 1)),
    ("split_dq", 80, 2): (T(64, 64, 4, 2), T(64, 64, 4, 2), T(64, 32, 4, 2), T(32, 32, 8, 1)),
    ("split_dq", 90, 2): (T(64, 32, 4, 1), T(64, 32, 4, 1), T(64, 32, 4, 2), T(32, 32, 8, 1)),
    ("split_dq", 100, 2): (T(64, 64, 4, 2), T(64, 64, 4, 2), T(64, 32, 4, 2), T(32, 32, 8, 1)),
    ("split_dq", 80, 4): (T(64, 32, 4, 1), T(32, 32, 8, 1, 255), T(16, 16, 8, 1), T(16, 16, 8, 1)),
    ("dmask", 80, 2): (T(128, 64, 8, 1), T(32, 64, 8, 2), T(32, 64, 8, 2), T(32, 16, 8, 1)),
    ("dmask", 90, 2): (T(64, 64, 8, 1), T(128, 64, 8, 2, tma=True), T(128, 64, 8, 2, tma=True), T(64, 32, 8, 1, tma=True)),
    ("dmask", 100, 2): (T(64, 64, 8, 1, tma=True), T(128, 64, 8, 2, tma=True), T(64, 64, 8, 2, 255, True), T(64, 32, 8, 1, tma=True)),
    ("dmask_pointers", 90, 2): (NONE, T(64, 64, 8, 1), T(64, 16, 8, 1), T(32, 16, 8, 1)),
    ("dmask", 80, 4): (T(64, 64, 8, 1), T(32, 32, 8, 1), T(16, 32, 8, 1), T(16, 32, 8, 1)),
}
HEAD_SIZES = (32, 64, 128, 256)
# In place of a tile of the table that would spill: (kernel, kind of call, chip itself, bytes) -> head size -> tile. Padding and dropout
# take registers of their own ("extras"), and a map's passes load a tile of its gradient ("map"). On sm_90 ptxas lets wgmma run across
# stages of a pipeline under float32 masks with elements of 16 bits ("wide mask"), and not under masks of 16 bits.
SPECIAL: dict[tuple[str, str, int, int], dict[int, TileConfig]] = {
    ("few_16", "extras", 80, 2): {32: T(16, 64, 8, 1), 64: T(16, 64, 8, 1), 128: T(16, 32, 8, 1)},
    ("few_32", "extras", 80, 2): {64: T(32, 32, 8, 1)},
    ("few_32", "extras", 90, 2): {32: T(32, 32, 8, 1)},
    ("few_32", "extras", 100, 2): {64: T(32, 32, 8, 1)},
    ("forward", "extras", 80, 2): {32: T(128, 32, 8, 3), 64: T(128, 32, 8, 3)},
    ("dq", "extras", 80, 2): {64: T(64, 32, 4, 2)},
    ("dkdv", "extras", 80, 2): {64: T(16, 64, 4, 2), 128: T(32, 32, 8, 2), 256: T(32, 16, 8, 1)},
    ("dmask", "extras", 80, 2): {32: T(32, 64, 8, 1), 64: T(32, 64, 8, 1), 256: T(16, 32, 8, 1)},
    ("dmask", "extras", 90, 2): {64: T(64, 64, 8, 2, tma=True), 128: T(64, 32, 8, 2, tma=True)},
    ("dmask", "extras", 100, 2): {64: T(64, 64, 8, 2, tma=True)},
    ("forward", "extras", 90, 2): {
        32: T(64, 64, 4, 1, tma=True), 64: T(64, 32, 4, 1, tma=True), 128: T(128, 32, 8, 2, tma=True), 256: T(32, 16, 4, 2, tma=True)
    },  # fmt: skip
    ("forward", "extras", 100, 2): {64: T(128, 32, 8, 3, tma=True), 128: T(128, 32, 8, 3, tma=True), 256: T(64, 16, 8, 2, tma=True)},
    ("dq", "extras", 90, 2): {32: T(64, 64, 4, 1, tma=True), 64: T(64, 64, 4, 1, tma=True), 128: T(64, 32, 4, 2, tma=True)},
    ("dq", "extras", 100, 2): {64: T(128, 64, 8, 2, 255, tma=True)},
    ("dkdv", "extras", 90, 2): {
        32: T(32, 64, 4, 1, tma=True), 64: T(32, 64, 4, 1, tma=True), 128: T(16, 64, 8, 1, tma=True), 256: T(32, 16, 8, 1, tma=True)
    },  # fmt: skip
    ("dkdv", "extras", 100, 2): {256: T(32, 16, 8, 1, tma=True)},
    ("forward", "wide mask", 90, 2): {32: T(64, 64, 4, 2, tma=True), 64: T(64, 64, 4, 2, tma=True)},
    ("dq", "wide mask", 90, 2): {32: T(128, 32, 8, 2, tma=True), 64: T(128, 32, 8, 2, tma=True)},
    ("dkdv", "wide mask", 90, 2): {32: T(32, 64, 4, 2, tma=True), 64: T(32, 64, 4, 2, tma=True)},
    ("split_16", "map", 80, 2): {32: T(16, 128, 4, 3, 168), 256: T(16, 64, 8, 2, 128)},
    ("split_16", "map", 90, 2): {32: T(16, 128, 4, 3, 168), 256: T(16, 64, 8, 2, 128)},
    ("split_16", "map", 100, 2): {32: T(16, 128, 4, 3, 168), 256: T(16, 64, 8, 2, 128)},
    ("split_16", "map", 80, 4): {32: T(16, 64, 4, 2, 255)},
    ("split_32", "map", 80, 4): {32: T(32, 32, 4, 1), 128: T(32, 32, 8, 1, 128)},
    ("split_64", "map", 80, 4): {32: T(64, 32, 8, 1, 168), 64: T(64, 32, 8, 1, 128), 128: T(32, 32, 8, 1, 128)},
    ("split_dq", "map", 80, 4): {256: T(16, 16, 8, 1, 128)},
    ("few_128", "map", 80, 4): {32: T(128, 16, 8, 1, 255)},
    ("split_16", "map", 90, 4): {32: T(16, 64, 4, 2, 255)},
    ("split_32", "map", 90, 4): {32: T(32, 32, 4, 1), 128: T(32, 32, 8, 1, 128)},
    ("split_64", "map", 90, 4): {32: T(64, 32, 8, 1, 168), 64: T(64, 32, 8, 1, 255), 128: T(32, 32, 8, 1, 128)},
    ("split_dq", "map", 90, 4): {256: T(16, 16, 8, 1, 128)},
    ("split_16", "map", 100, 4): {32: T(16, 64, 4, 2, 255)},
    ("split_32", "map", 100, 4): {32: T(32, 32, 4, 1), 128: T(32, 32, 8, 1, 128)},
    ("split_64", "map", 100, 4): {32: T(64, 32, 8, 1, 168), 64: T(64, 32, 8, 1, 255), 128: T(32, 32, 8, 1, 128)},
    ("split_dq", "map", 100, 4): {256: T(16, 16, 8, 1, 128)},
    ("split_dq", "map", 100, 2): {64: T(64, 64, 4, 2, 255)},
    ("dkdv", "map", 100, 2): {32: T(32, 64, 4, 2)},
    ("dmask", "map", 80, 2): {32: T(64, 64, 8, 1)},
    ("dkdv", "map", 90, 4): {128: T(16, 32, 8, 1)},
    ("dkdv", "map", 100, 4): {128: T(16, 32, 8, 1)},
}


def tile(kernel: str, problem: Problem, arch: int) -> TileConfig:
    """The tile of `kernel` for this problem. arch is 80, 90, ... or INTERPRETER. A chip takes the row of the newest one that is not newer
    than itself, those of SMALL_SHARED sm_86's or sm_80's.
    """
    head = max(problem.D, problem.Dv)
    size = problem.dtype.itemsize
    wide_mask = problem.mask_dtype is not None and problem.mask_dtype.itemsize > size
    extras = problem.has_padding or problem.dropout_p > 0
    kind = "map" if problem.Dv == 0 else "extras" if extras else "wide mask" if wide_mask else ""
    return _tile(kernel, bucket(problem.Nq), arch, size, head, kind)


@cache
def _tile(kernel: str, queries: int, arch: int, size: int, head: int, kind: str = "") -> TileConfig:
    if kernel in ("split", "few"):
        queries = min(queries, 64) if kernel == "split" else queries
        kernel = f"{kernel}_{queries}"
    pointers = kernel.endswith("_pointers")
    if arch == INTERPRETER:  # small, so that small shapes have several tiles
        return TileConfig(queries if kernel.startswith("few") else 16, 32, 4, 1, tma=not pointers)
    column = next(i for i, limit in enumerate(HEAD_SIZES) if head <= limit)
    special = SPECIAL.get((kernel.removesuffix("_pointers"), kind, 80 if arch in SMALL_SHARED else generation(arch), size), {})
    found = special.get(HEAD_SIZES[column], row_of(kernel, arch, size)[column])
    if pointers and found == NONE:
        found = _tile(kernel.removesuffix("_pointers"), queries, arch, size, head, kind)
    return replace(found, tma=False) if pointers else found


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels too, takes 5 microseconds a call."""
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@cache
def bucket(queries: int) -> int:
    """The block that holds all of a few queries: 16, 32, 64 or 128."""
    return max(16, min(FEW_QUERIES, _power_of_2(queries)))


@lru_cache
def one_tile(problem: Problem) -> bool:
    """Whether backward may hold all queries of a head in one tile: they are few, and narrow enough to spill no registers."""
    queries, row = bucket(problem.Nq), _row_bytes(problem)
    return problem.Nq <= FEW_QUERIES and (row <= 128 or queries * row <= 8 << 10)


@lru_cache
def holds_dq(problem: Problem) -> bool:
    """Whether that tile leaves registers for dQ as well."""
    queries, row = bucket(problem.Nq), _row_bytes(problem)
    return queries <= 32 and queries * row < 8 << 10


def _row_bytes(problem: Problem) -> int:
    return block_of(max(problem.D, problem.Dv)) * problem.dtype.itemsize


@cache
def block_of(head: int) -> int:
    """The padded size of a head in a tile; a matrix product wants at least 16."""
    return max(16, _power_of_2(head))


def arch_of(device: torch.device) -> int:
    """Compute capability of the device as 80, 90, ...; INTERPRETER under TRITON_INTERPRET=1."""
    return INTERPRETER if triton.knobs.runtime.interpret else _capability(device)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def row_of(kernel: str, arch: int, size: int) -> tuple[TileConfig, TileConfig, TileConfig, TileConfig]:
    """The row that a chip takes: its own, or that of the newest one before it."""
    own = generation(arch)
    before = (own, 80) if own == 86 else (own, 90, 80)
    return next((TABLE[kernel, older, size] for older in before if older <= own and (kernel, older, size) in TABLE), (NONE,) * 4)


def generation(arch: int) -> int:
    """The arch of the row that is the chip's own, where there is one."""
    return 86 if arch in SMALL_SHARED else 100 if arch >= 100 else 90 if arch >= 90 else 80
