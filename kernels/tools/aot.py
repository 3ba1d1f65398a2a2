"""Every kernel through the real compiler, ahead of time and without a GPU: `python -m smattn.kernels.tools.aot [--sample | --full]`.

The launches that backend.py makes are recorded on tensors without storage (jobs.py), then compiled for each chip with the same arguments,
specialisation and tiles. A line is printed for each kernel: its tile, registers, spills, the tensor-core instruction with the shortest and
the longest run of it between two waits, bits * number of the loads, shared memory, how many programs a multiprocessor holds, and what its
inner loop costs (counts.py). The command fails where Row.failure says so, for example on a spilled register or a softmax computed twice.
What was compiled and read before comes from Triton's cache.
TRITON_INTERPRET must not be set: under it there is no compiler.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tiles import Tile, block_of
from . import positive
from .counts import Counts, count, excess
from .jobs import FEW, FULL, MANY, PRODUCT, SAMPLE, WIDEST, Job, jobs, name_of, one_of, record
from .loops import Loop
from .machine_code import Reading, read
from .sources import sources

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes that a program can have, per chip
RESERVED = 1024  # bytes of shared memory that a multiprocessor has more of, and that each program takes besides its own
REGISTERS = 65_536  # of a multiprocessor
THREADS = {86: 1536, 89: 1536, 120: 1536}  # of a multiprocessor; elsewhere 2048
PROGRAMS = {86: 16, 89: 24, 120: 24}  # that a multiprocessor holds at most; elsewhere 32
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory
POINTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
POINTERS |= {torch.int16: "i16", torch.int64: "i64", torch.uint8: "u8"}
# The bytes of a thread that may spill where no tile was found that spills none and costs no more, by kernel, bytes of an element, head size
# and queries.
SPILLS = {("few_queries", 2, 64, 100): 48, ("forward", 4, 128, MANY): 8, ("dkdv", 4, 64, MANY): 8}
SPILLS |= {("dq", 4, WIDEST, queries): 264 for queries in FEW} | {("map", 4, D, queries): 8 for D in (64, WIDEST) for queries in FEW}
SPILLS |= {("dmask", 4, D, queries): 16 for D in (64, 128, WIDEST) for queries in (*FEW, MANY)}
SPILLS |= {("dq", 2, 64, queries): 16 for queries in (*FEW, MANY)} | {("dkdv", 2, 32, MANY): 24}
# Nothing is computed twice in the passes of many queries, in 16 bits and up to this head size. Elsewhere the table says how often.
PASSES, CHECKED_HEADS = ("forward", "dkdv", "dq", "dmask"), 128
TABLE_HEAD = (
    "kernel", "arch", "dtype", "D", "Nk", "variant", "block_m", "block_n", "warps", "stages", "maxnreg",
    "registers", "spill_bytes", "instruction", "loads", "shared", "per_sm", "serialised",
    "issue", "exp2", "tensor", "passes", "exp2_a_score", "flops_over_needed", "failure",
)  # fmt: skip


class Row(NamedTuple):
    """One compiled kernel."""

    kernel: str
    job: Job
    tile: Tile
    reading: Reading | None = None  # None: it did not compile, see error
    shared: int = 0
    tensor_columns: int = 0  # of tensor memory, sm_100
    products: bool = False  # whether the kernel has matrix products
    groups: int = 0  # of wgmma that the compiler means to run without a wait between, sm_90
    descriptors: bool = False  # whether it gets any
    counts: Counts = Counts(Loop(), 1)
    error: str = ""

    def failure(self) -> str:
        """What is wrong with it, or nothing."""
        if self.reading is None:
            return self.error
        j, limit, r = self.job, SHARED_MEMORY[self.job.arch], self.reading
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, the chip has {limit}"
        if self.products and not r.instruction and (j.dtype.itemsize == 2 or j.variant.tf32):
            return "no tensor-core instruction"
        if self.descriptors and "TMA" not in r.loads:
            return "descriptors, and no load by TMA"
        if self.products and self.counts.scores and not self.counts.loop.instructions and self.kernel != "dmask":
            return "no inner loop was found"  # dM's pass has none where nobody shares the mask
        if r.spill_bytes > self.may_spill():
            return f"spills {r.spill_bytes} bytes"
        checked = self.kernel in PASSES and j.dtype.itemsize == 2 and j.D <= CHECKED_HEADS and not j.variant.as_map
        return excess(self.counts, self.tile.block_n, j.variant.logits) if checked else ""

    def may_spill(self) -> int:
        j = self.job
        return SPILLS.get((self.kernel, j.dtype.itemsize, block_of(j.D), j.Nq), 0)

    def serialised(self) -> bool:
        """Whether a wgmma waits for the one before it where the compiler meant them to run in one group."""
        return self.reading is not None and self.reading.instruction == "HGMMA" and self.reading.groups > self.groups

    def per_multiprocessor(self) -> int:
        """How many programs run on one at a time."""
        arch, threads = self.job.arch, 32 * self.tile.warps
        registers = -(-(self.reading.registers if self.reading else 1) // 8) * 8
        most = [PROGRAMS.get(arch, 32), THREADS.get(arch, 2048) // threads, REGISTERS // (registers * threads)]
        most += [(SHARED_MEMORY[arch] + RESERVED) // (self.shared + RESERVED), TENSOR_COLUMNS // max(1, self.tensor_columns)]
        return min(most)

    def text(self) -> str:
        j, t = self.job, self.tile
        tile = f"{t.block_m}x{t.block_n} w{t.warps} s{t.stages}"
        where = f"{self.kernel:14}sm_{j.arch:<4}{str(j.dtype)[6:]:9}D={j.D:<4}Nq={j.Nq:<5}Nk={j.Nk:<5}{j.variant.name:35}{tile:17}"
        if self.reading is None:
            return where + self.error
        serial = " serialised" if self.serialised() else ""
        loop = f" {self.counts.text(j.arch)}{serial}" if self.counts.scores else ""
        return f"{where}{self.reading.text()}{self.shared:7} shared {self.per_multiprocessor():2} per SM{loop} {self.failure()}"


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The specialisation that Triton would make for these arguments: 1 and None are constants, multiples of 16 are known to be so."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype]}{value.block_shape}>"
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not free):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def without_a_gpu(arch: int, kernel: Any, arguments: dict[str, Any], tile: Tile) -> Any:
    """The compiled kernel. A launch finds it in Triton's cache only by chance: what its key is made of differs between versions."""
    return triton.compile(source(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=tile.options())


def last_line(error: Exception) -> str:
    """What the compiler says in the end, behind pages of code."""
    *_, last = "", *str(error).strip().splitlines()
    return f"{type(error).__name__}: {last}"


def compile_job(job: Job, compiler: Callable[[int, Any, dict[str, Any], Tile], Any] = without_a_gpu, only: str = "") -> list[Row]:
    """A row for each of the call's kernels, or for the one of this name alone."""
    rows = []
    for kernel, arguments, tile in record(job):
        name = name_of(kernel)
        if only not in ("", name):
            continue
        try:
            compiled = compiler(job.arch, kernel, arguments, tile)
        except Exception as error:  # whatever the compiler throws belongs in the table
            rows.append(Row(name, job, tile, error=last_line(error)))
            continue
        reading = read(compiled.asm["cubin"])
        rows.append(Row(
            name, job, tile, reading, compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0,
            "tt.dot" in compiled.asm["ttir"], compiled.asm["ptx"].count("wgmma.commit_group"),
            any(isinstance(value, TensorDescriptor) for value in arguments.values()),
            count(reading.loop, tile.warps, arguments, compiled.asm["ttir"]),
        ))  # fmt: skip
    return rows


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """As comma-separated values, numbers of queries that differ in nothing else on one line; above it what was compiled by what."""
    lines: dict[tuple[Any, ...], dict[int, None]] = {}
    for row in rows:
        (arch, dtype, D, Nq, variant, *_), t, r = row.job, row.tile, row.reading
        figures = (r.registers, r.spill_bytes, f"{r.instruction} {r.shortest}-{r.longest}" if r.instruction else "") if r else ("",) * 3
        loads = " ".join(f"{bits}*{n}" for bits, n in sorted(r.loads.items())) if r else ""
        line = (
            row.kernel, arch, str(dtype)[6:], D, row.job.Nk, variant.name, t.block_m, t.block_n, t.warps, t.stages, t.maxnreg,
            *figures, loads, row.shared, row.per_multiprocessor(), int(row.serialised()), *row.counts.figures(arch), row.failure(),
        )  # fmt: skip
        lines.setdefault(line, {})[Nq] = None
    with path.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}, kernels/*.py sha256 {sources()}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow((*TABLE_HEAD, "queries"))
        table.writerows((*line, " ".join(map(str, queries))) for line, queries in lines.items())


def compile_all(
    compile_one: Callable[..., list[Any]], calls: Sequence[tuple[Any, ...]], chips: str, processes: int
) -> tuple[list[Any], int]:
    """compile_one(*call) for each, side by side. Returns the rows, which are printed as they come, and how many of them failed."""
    compiled: list[Any] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(compile_one, *zip(*calls, strict=True)):
            for row in rows:
                print(row.text(), flush=True)
            compiled += rows
    failed = sum(bool(row.failure()) for row in compiled)
    print(f"{len(compiled)} kernels compiled for {chips}, {failed} failed")
    return compiled, failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    extents = parser.add_mutually_exclusive_group()
    extents.add_argument("--sample", action="store_const", dest="extent", const=SAMPLE, default=PRODUCT, help="some of it: minutes")
    extents.add_argument("--full", action="store_const", dest="extent", const=FULL, help="the product in every variant: hours")
    parser.add_argument("--table", type=Path, help="write the table here as well, as comma-separated values")
    parser.add_argument("--every", type=positive, default=1, help="one of so many of each chip's calls, others on each chip")
    parser.add_argument("--processes", type=positive, default=2)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is no compiler under it")
    if options.table and not options.table.parent.is_dir():
        parser.error(f"--table: {options.table.parent} is no folder")
    calls = [(job,) for job in one_of(options.every, jobs(options.arch, options.extent))]
    chips = ", ".join(f"sm_{arch}" for arch in options.arch)
    compiled, failed = compile_all(compile_job, calls, chips, options.processes)
    if options.table:
        write_table(options.table, compiled)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
