"""Every kernel through the real compiler, ahead of time and without a GPU: `python -m smattn.kernels.aot [--sample | --full]`.

The launches that backend.py makes are recorded on tensors that have no storage, then compiled for each chip: same arguments, same
specialisation, same tiles as there. Prints a line for each: its tile, registers, spills, the tensor-core instruction with the shortest and
the longest run of it between two waits, bits * number of the loads, shared memory, and how many programs a multiprocessor holds. Fails
where Row.failure says so, on a spilled register for one. What was compiled and read once is taken from Triton's cache. Must run without
TRITON_INTERPRET, under which there is no compiler.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..call import Call, Needs, Problem
from . import backend, launch
from .machine_code import Reading, read
from .tiles import Tile, block_of

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a program can have, per chip
RESERVED = 1024  # bytes of shared memory that a multiprocessor has more of, and that each program takes besides its own
REGISTERS, THREADS, TENSOR_COLUMNS = 65_536, {86: 1536, 89: 1536, 120: 1536}, 512  # of a multiprocessor; elsewhere 2048 threads
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POINTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.uint8: "u8"}
WIDEST = 256
HEAD_SIZES = (32, 48, 64, 128, WIDEST)
FEW, MANY = (13, 30, 60, 100), 1045  # numbers of queries: one in each tile size of tiles.py, none a multiple of a block
# Bytes of a thread that spill at most where no tile was found that spills none: kernel, bytes of an element, head size, queries.
SPILLS = {("few_queries", 2, 64, 100): 40, ("few_queries", 4, 32, 30): 24, ("few_queries", 4, 32, 100): 32}
SPILLS |= {("dq", 4, WIDEST, queries): 248 for queries in FEW} | {("dmask", 4, 128, queries): 16 for queries in (*FEW, MANY)}
SAMPLE, PRODUCT, FULL = "sample", "product", "full"
TABLE_HEAD = (
    "kernel", "arch", "dtype", "D", "variant", "block_m", "block_n", "warps", "stages", "maxnreg",
    "registers", "spill_bytes", "instruction", "loads", "shared", "per_sm", "failure",
)  # fmt: skip


class Variant(NamedTuple):
    """What of the call is on, beside sizes and dtype."""

    name: str
    mask: tuple[int, int, int] | None = (2, 1, 2)  # M's batch, head and query axes: 1 broadcasts
    mask_dtype: torch.dtype = torch.float32
    padding: bool = False
    dropout: bool = False
    group: int = 1
    dlse: bool = False
    tf32: bool = False
    keep_out: bool = True  # unrounded, for delta
    logits: bool = False  # in place of M
    misaligned: bool = False  # rows of query, key and value an odd number of elements apart: no descriptors
    as_map: bool = False  # attention_map's call, whose gradients are those of query, key, mask, alpha and head weights
    training: bool = True  # else forward alone, nothing of it kept
    needs: Needs = Needs(True, True, True, True, True, True)


PLAIN = Variant("mask")
FEATURES = Variant("padding dropout gqa lse", padding=True, dropout=True, group=2, dlse=True)
TF32 = Variant("tf32", tf32=True)
MAP, MAP_TF32 = Variant("map", as_map=True), Variant("map tf32", tf32=True, as_map=True)
PADDING, MISALIGNED = Variant("padding", padding=True), Variant("misaligned", misaligned=True)
HALF_MASKS = tuple(PLAIN._replace(name=f"{dtype} mask"[6:], mask_dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
MISALIGNED_FEATURES = FEATURES._replace(name=f"misaligned {FEATURES.name}", misaligned=True)
OTHERS = (
    MAP._replace(name="map padding gqa", padding=True, group=2),
    MAP._replace(name="map, mask per head", mask=(2, 2, 2)),
    MAP._replace(name="map, no mask", mask=None),
    Variant("no mask", mask=None),
    Variant("logits", logits=True),
    Variant("key-only logits", mask=(2, 1, 1), logits=True, padding=True),
    Variant("mask shared by the batch", mask=(1, 1, 2), padding=True),
    Variant("mask per head", mask=(2, 2, 2), dropout=True),
    Variant("mask per head, shared by the batch", mask=(1, 2, 2), group=2),
    Variant("key-only mask", mask=(2, 1, 1), padding=True, dlse=True),
    Variant("key-only mask a head for the batch", mask=(1, 2, 1), group=2),
    Variant("no unrounded output", keep_out=False, dropout=True, padding=True, dlse=True),
    Variant("mask and alpha only", needs=Needs(False, False, False, mask=True, alpha=True)),
    Variant("alpha only", needs=Needs(False, False, False, False, alpha=True)),
    Variant("query only", needs=Needs(True, False, False, False, False)),
)


class Job(NamedTuple):
    arch: int
    dtype: torch.dtype
    D: int
    Nq: int
    variant: Variant
    B: int = 2
    H: int = 4
    Nk: int = 4096


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
        if r.instruction == "HGMMA" and r.groups > self.groups:
            return f"serialised wgmma: {r.groups} groups, not {self.groups}"
        allowed = SPILLS.get((self.kernel, j.dtype.itemsize, block_of(j.D), j.Nq), 0)
        return f"spills {r.spill_bytes} bytes" if r.spill_bytes > allowed else ""

    def per_multiprocessor(self) -> int:
        """How many programs run on one at a time."""
        arch, threads = self.job.arch, 32 * self.tile.warps
        registers = -(-(self.reading.registers if self.reading else 1) // 8) * 8
        most = [THREADS.get(arch, 2048) // threads, REGISTERS // (registers * threads)]
        most += [(SHARED_MEMORY[arch] + RESERVED) // (self.shared + RESERVED), TENSOR_COLUMNS // max(16, self.tensor_columns)]
        return min(most)

    def text(self) -> str:
        j, t = self.job, self.tile
        tile = f"{t.block_m}x{t.block_n} w{t.warps} s{t.stages}"
        where = f"{self.kernel:14}sm_{j.arch:<4}{str(j.dtype)[6:]:9}D={j.D:<4}Nq={j.Nq:<5}{j.variant.name:35}{tile:17}"
        if self.reading is None:
            return where + self.error
        return f"{where}{self.reading.text()}{self.shared:7} shared {self.per_multiprocessor():2} per SM {self.failure()}"


def jobs(archs: list[int], extent: str = PRODUCT) -> Iterator[Job]:
    """Attention and its map on every chip, in every dtype, head size and number of queries. FULL: times every variant."""
    if extent == SAMPLE:
        yield from _sample(archs)
        return
    variants = (PLAIN, *HALF_MASKS, TF32, MAP, MAP_TF32)
    if extent == FULL:
        variants = (*variants, FEATURES, PADDING, MISALIGNED, MISALIGNED_FEATURES, *OTHERS)
    for arch, dtype, D, Nq, variant in product(archs, DTYPES, HEAD_SIZES, (*FEW, MANY), variants):
        if (dtype == torch.float32 or not variant.tf32) and variant.mask_dtype in (torch.float32, dtype):
            yield Job(arch, dtype, D, Nq, variant)


def _sample(archs: list[int]) -> Iterator[Job]:
    """Every kernel, chip and regime in every dtype, then each variant once, on one chip."""
    few, most = FEW[0], FEW[-1]
    for arch in archs:
        for D, Nq in (*product((32, 64, 128, WIDEST), (few, MANY)), *product((32, 64, 128), (most,)), (48, MANY), (64, 30), (64, 60)):
            yield Job(arch, torch.float16, D, Nq, PLAIN)
        for D, Nq in (*product((64,), (few, most, MANY)), (32, few), (32, most), (128, few), (128, MANY), (WIDEST, MANY)):
            yield Job(arch, torch.float32, D, Nq, PLAIN)
        for Nq in (few, most, MANY):
            yield Job(arch, torch.float32, 64, Nq, TF32)
        for Nq in (few, MANY):
            yield Job(arch, torch.bfloat16, 64, Nq, PLAIN)  # it has float16's tiles
            yield Job(arch, torch.float16, 64, Nq, MAP)
        for D in (32, 64, 128):
            yield Job(arch, torch.bfloat16, D, MANY, HALF_MASKS[1])
        yield Job(arch, torch.float32, 64, MANY, MAP)
        for D in (32, 64, 128, WIDEST) if arch >= 90 else ():  # where the calls above have descriptors
            yield Job(arch, torch.float16, D, MANY, PADDING)
            yield Job(arch, torch.float16, D, MANY, MISALIGNED)
    chip = 90 if 90 in archs else archs[-1]
    for Nq in (few, MANY):
        yield Job(chip, torch.float16, 64, Nq, FEATURES)
        for variant in OTHERS:
            yield Job(chip, torch.bfloat16, 32, Nq, variant)


def record(job: Job) -> list[tuple[Any, dict[str, Any], Tile]]:
    """The launches of one forward and backward, of attention or of its map."""
    v, B, H, Nk = job.variant, job.B, job.H, job.Nk

    def tensor(*sizes: int, dtype: torch.dtype = job.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    mask = None
    if v.mask is not None:
        axes = [n if axis > 1 else 1 for axis, n in zip(v.mask, (B, H, job.Nq), strict=True)]
        mask = tensor(*axes, Nk, dtype=v.mask_dtype)
    problem = Problem(
        B=B, H=H, Hkv=H // v.group, Nq=job.Nq, Nk=Nk, D=job.D, Dv=0 if v.as_map else job.D, dtype=job.dtype,
        mask_dtype=None if mask is None else mask.dtype, mask_shape=None if mask is None else tuple(mask.shape),  # type: ignore[arg-type]
        device_type="cuda", has_padding=v.padding, scale=0.125, dropout_p=0.1 if v.dropout else 0.0, allow_tf32=v.tf32,
        mask_is_logits=v.logits,
    )  # fmt: skip
    query, key = (tensor(B, heads, n, job.D + v.misaligned)[..., : job.D] for heads, n in ((H, job.Nq), (H // v.group, Nk)))
    call = Call(
        problem, query, key,
        value=None if v.as_map else key,
        mask=mask,
        alpha=None if mask is None else tensor(H, dtype=torch.float32),
        key_padding_mask=tensor(B, Nk, dtype=torch.bool) if v.padding else None,
        seed=tensor(1, dtype=torch.int64) if v.dropout else None,
        head_weights=tensor(H, dtype=torch.float32) if v.as_map else None,
    )  # fmt: skip
    recorder = launch.Recorder(job.arch)
    launch.record(recorder)
    try:
        if v.as_map:
            amap, lse = backend.attention_map(call)
            backend.attention_map_backward(call, lse, amap, v.needs)
        else:
            _, saved = backend.forward(call, save_out=v.keep_out and v.training, save_mbar=v.training)
            if not v.training:
                return recorder.launches
            dlse = torch.empty_like(saved.lse) if v.dlse else None
            backend.backward(call, saved, query, dlse, v.needs)
    finally:
        launch.record(None)
    return recorder.launches


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


def compile_job(job: Job, compiler: Callable[[int, Any, dict[str, Any], Tile], Any] = without_a_gpu) -> list[Row]:
    rows = []
    for kernel, arguments, tile in record(job):
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        try:
            compiled = compiler(job.arch, kernel, arguments, tile)
        except Exception as error:  # whatever the compiler throws belongs in the table
            rows.append(Row(name, job, tile, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"))
            continue
        rows.append(Row(
            name, job, tile, read(compiled.asm["cubin"]), compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0,
            "tt.dot" in compiled.asm["ttir"], compiled.asm["ptx"].count("wgmma.commit_group"),
            any(isinstance(value, TensorDescriptor) for value in arguments.values()),
        ))  # fmt: skip
    return rows


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """As comma-separated values, numbers of queries that differ in nothing else on one line; above it what was compiled by what."""
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))).hexdigest()
    lines: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        (arch, dtype, D, Nq, variant, *_), t, r = row.job, row.tile, row.reading
        figures = (r.registers, r.spill_bytes, f"{r.instruction} {r.shortest}-{r.longest}" if r.instruction else "") if r else ("",) * 3
        loads = " ".join(f"{bits}*{n}" for bits, n in sorted(r.loads.items())) if r else ""
        line = (
            row.kernel, arch, str(dtype)[6:], D, variant.name, t.block_m, t.block_n, t.warps, t.stages, t.maxnreg,
            *figures, loads, row.shared, row.per_multiprocessor(), row.failure(),
        )  # fmt: skip
        lines.setdefault(line, []).append(Nq)
    with path.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}, kernels/*.py sha256 {sources[:16]}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow((*TABLE_HEAD, "queries"))
        table.writerows((*line, " ".join(map(str, queries))) for line, queries in lines.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    extents = parser.add_mutually_exclusive_group()
    extents.add_argument("--sample", action="store_const", dest="extent", const=SAMPLE, default=PRODUCT, help="some of it: minutes")
    extents.add_argument("--full", action="store_const", dest="extent", const=FULL, help="the product in every variant: hours")
    parser.add_argument("--table", type=Path, help="write the table here as well, as comma-separated values")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is no compiler under it")
    compiled: list[Row] = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(compile_job, jobs(options.arch, options.extent)):
            for row in rows:
                print(row.text(), flush=True)
            compiled += rows
    failed = sum(bool(row.failure()) for row in compiled)
    print(f"{len(compiled)} kernels compiled for {', '.join(f'sm_{arch}' for arch in options.arch)}, {failed} failed")
    if options.table:
        write_table(options.table, compiled)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
