"""What bounds each workload, before a GPU is seen: `python -m bench.gpu.roofline`.

For every pass that backend.py makes: the microseconds that its matrix products, exponentials, memory and L2 traffic would each take
alone, at the chip's published rates and with the tiles of tiles.csv, in bfloat16 with a bfloat16 mask. The longest is the limiter. It is
an estimate from below, of what is asked for: padding to whole tiles, launches, split buffers and what does not overlap come on top.

Beside it stands a prediction for the passes of many queries, by what the compiled inner loops execute (bench/results/triton-kernels.csv,
smattn/kernels/tools/counts.py): the sum of issue and tensor-core cycles, or shared memory's or exp2's where that is longer. No GPU has
confirmed either.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from smattn.call import Problem
from smattn.kernels.plan import holds_dq, one_tile
from smattn.kernels.tiles import FEW_QUERIES, HEAD_SIZES, SMALL, WORD, tile
from smattn.kernels.tools.counts import SCORES, Cycles
from smattn.memory import queries_with_remainder
from smattn.testing import WORKLOADS, Workload


class Chip(NamedTuple):
    """Rates a second: cycles, dense bfloat16 FLOP, 2^x, bytes of memory, bytes of L2.

    The second and fourth by the vendor's datasheets, 2^x as 16 a clock and multiprocessor, L2 as 5120 bytes a clock, which is published of
    sm_80 and taken over for sm_90; of sm_100 nothing is published, and its L2 does not count.
    """

    name: str
    arch: int
    cycles: float  # a second, of all multiprocessors together
    matmul: float
    exp2: float
    memory: float
    l2: float


CHIPS = (
    Chip("A100", 80, 108 * 1.41e9, 312e12, 16 * 108 * 1.41e9, 2.04e12, 5120 * 1.41e9),
    Chip("H200", 90, 132 * 1.83e9, 989e12, 16 * 132 * 1.83e9, 4.8e12, 5120 * 1.83e9),
    Chip("B200", 100, 148 * 1.86e9, 2250e12, 16 * 148 * 1.86e9, 8e12, float("inf")),
)
BYTES = 2  # of an element
TABLE = Path(__file__).resolve().parents[1] / "results" / "triton-kernels.csv"
UNITS = ("issue", "exp2", "tensor", "passes")  # the table's columns of Cycles
Counted = dict[tuple[str, ...], Cycles]  # kernel, arch, head size, keys, variant -> cycles for SCORES scores


class Pass(NamedTuple):
    """One kernel over all scores, B*H*Nq*Nk of them: products of 2*D operations a score, exponentials a score, bytes."""

    name: str
    products: int
    exponentials: int
    memory: int
    l2: int


class Estimate(NamedTuple):
    """Microseconds."""

    matmul: float
    exp2: float
    memory: float
    l2: float

    def limiter(self) -> str:
        return max(zip(self, self._fields, strict=True))[1]


def passes(w: Workload, arch: int) -> Iterator[Pass]:
    """Forward alone, forward as it is where gradients are wanted, and backward with all five of them.

    Forward then stores what rounding took from the output too, unless that would take too much memory. Backward has 5 products where
    one program holds all queries and dQ, 7 without dQ, else 9.
    """
    mask_dtype, mask_heads, sharers = (torch.bfloat16, 1, w.H) if w.rows is None else (torch.float32, w.H, w.rows)
    problem = Problem(
        B=math.prod(w.batch), H=w.H, Hkv=w.H, Nq=w.Nq, Nk=w.Nk, D=w.D, Dv=w.D, dtype=torch.bfloat16, mask_dtype=mask_dtype,
        mask_shape=(w.B, 1, mask_heads, w.Nq, w.Nk), device_type="cuda",
    )  # fmt: skip
    heads, row = problem.B * w.H, 2 * w.D * BYTES  # of a query and its dO, of a key and its value
    queries, keys, mask = heads * w.Nq * row, heads * w.Nk * row, w.B * mask_heads * w.Nq * w.Nk * mask_dtype.itemsize
    remainder = heads * queries_with_remainder(problem) * w.D * BYTES

    def forwards(l2: int) -> Iterator[Pass]:
        memory = queries + keys + mask
        yield Pass("forward", 2, 1, memory, l2)
        yield Pass("forward+out", 2, 1, memory + remainder, l2 + remainder)

    if one_tile(problem):
        yield from forwards(queries + keys + sharers * mask)
        if not holds_dq(problem):
            yield Pass("dq", 3, 1, queries + keys + mask, queries + keys + sharers * mask)
        owned = 2 * (queries + keys + mask)
        yield Pass("few_queries", 5 if holds_dq(problem) else 4, 1, owned, owned)
        return

    def blocks(kernel: str) -> tuple[int, int]:
        shape = tile(kernel, problem, arch)
        return -(-w.Nq // shape.block_m), -(-w.Nk // shape.block_n)

    yield from forwards(blocks("forward")[0] * keys + sharers * mask)
    yield Pass("dkdv", 4, 1, queries + 2 * keys + mask, blocks("dkdv")[1] * queries + sharers * mask)
    yield Pass("dq", 3, 1, 2 * queries + keys + mask, blocks("dq")[0] * keys + sharers * mask)
    of_queries, of_keys = blocks("dmask")
    yield Pass("dmask", 2, 1, queries + keys + 2 * mask, of_keys * queries + of_queries * keys + 2 * mask)


def estimate(w: Workload, chip: Chip, p: Pass) -> Estimate:
    scores = math.prod(w.batch) * w.H * w.Nq * w.Nk
    amounts = (p.products * 2 * w.D * scores, p.exponentials * scores, p.memory, p.l2)
    rates = (chip.matmul, chip.exp2, chip.memory, chip.l2)
    return Estimate(*(1e6 * amount / rate for amount, rate in zip(amounts, rates, strict=True)))


def counted(table: Path = TABLE) -> Counted:
    """The inner loops of bfloat16 that the table has counted, of each kind of call the last."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {
        (row["kernel"], row["arch"], row["D"], row["Nk"], row["variant"]): Cycles(*(float(row[unit] or 0) for unit in UNITS))
        for row in rows
        if row["dtype"] == "bfloat16" and row["issue"]
    }


def predicted(w: Workload, chip: Chip, p: Pass, loops: Counted) -> float | None:
    """Microseconds of a pass in training by what its loop executes, in blocks of 64 queries and keys. None where that says too little:
    for few queries, for calls that leave multiprocessors idle, and on sm_100, whose tensor cores' work is not counted."""
    if w.Nq <= FEW_QUERIES or math.prod(w.batch) * w.H * w.Nq <= SMALL or chip.arch >= 100 or p.name == "forward":
        return None
    head, keys = str(next(head for head in HEAD_SIZES if head >= w.D)), "4096" if w.Nk % WORD == 0 else "1045"
    cycles = loops.get((p.name.split("+")[0], str(chip.arch), head, keys, "bfloat16 mask" if w.rows is None else "mask"))
    if cycles is None:
        return None
    scores = math.prod(w.batch) * w.H * (-(-w.Nq // 64)) * (-(-w.Nk // 64)) * 64 * 64
    return 1e6 * cycles.together() * scores / SCORES / chip.cycles


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    loops = counted()
    print(f"{'':22}{'pass':12}{'matmul':>9}{'exp2':>9}{'memory':>9}{'L2':>9}   microseconds, limiter; predicted by the loop")
    for chip in CHIPS:
        for w in WORKLOADS.values():
            for p in passes(w, chip.arch):
                e = estimate(w, chip, p)
                times = "".join(f"{time:9.1f}" for time in e)
                by_loop = predicted(w, chip, p, loops)
                print(f"{chip.name:6}{w.name:16}{p.name:12}{times}   {e.limiter():8}{'' if by_loop is None else f'{by_loop:9.1f}'}")


if __name__ == "__main__":
    main()
