"""The micro-kernel of csrc/cpu/simd/product.h beside torch's exported brgemm, tile by tile, on one thread: `python -m bench.studies.brgemm`

The yardstick is used here alone: the package calls none of torch's kernels. brgemm.cpp is compiled and called through ctypes, and both
contestants are checked against float64 before they are timed. It needs Linux and an x86-64 CPU with AVX-512. It writes
bench/results/<date>-<device>-brgemm.jsonl, with a row for each tile and contestant, and a table beside it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measuring.clock import time_interleaved, timing
from bench.measuring.job import Job
from bench.measuring.machine import name_of
from bench.measuring.measure import matmul_call
from bench.measuring.peers import cpu_kernels
from bench.reporting.rows import OURS, read, write
from bench.reporting.tables import calibration, disturbed, duels, markdown

HERE = Path(__file__).resolve().parent

FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c")
PRODUCT, BRGEMM = OURS + "product.h", "brgemm"
CALL_FLOPS = 10**8  # of the products that are timed together, a few milliseconds
Call = Callable[[int], object]  # makes so many products, one after the other


@dataclass(frozen=True)
class Tile:
    """c[rows][columns] = a[rows][steps] * b[steps][columns], as the kernels have it. transposed: they find a as [steps][rows]."""

    name: str
    rows: int
    columns: int
    steps: int
    transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.steps


TILES = (
    Tile("S^T = K Q^T, 13 queries (16 lanes), D 32", 144, 16, 32),
    Tile("O = P V, 13 queries, D 32", 13, 32, 144, transposed=True),
    Tile("dK = dS^T Q, 13 queries, D 32", 144, 32, 13),
    Tile("S^T = K Q^T, 64 queries, D 64", 144, 64, 64),
    Tile("O = P V, 64 queries, D 64", 64, 64, 144, transposed=True),
    Tile("dK = dS^T Q, 64 queries, D 64", 144, 64, 64),
)


def dtypes() -> list[torch.dtype]:
    """The dtypes in which this processor multiplies."""
    return [torch.float32, torch.bfloat16] if "avx512bf16" in cpu_kernels() else [torch.float32]


def build(folder: str) -> ctypes.CDLL:
    """Compile brgemm.cpp in that folder, and load it."""
    torch_root, library = Path(torch.__file__).parent, f"{folder}/brgemm.so"
    paths = ("-I", f"{HERE.parents[1]}/csrc", "-isystem", f"{torch_root}/include", "-L", f"{torch_root}/lib", "-ltorch_cpu", "-lc10")
    flags = [*FLAGS, *["-mavx512bf16"] * (torch.bfloat16 in dtypes())]
    subprocess.run(["c++", *flags, str(HERE / "brgemm.cpp"), *paths, "-o", library], check=True)
    return ctypes.CDLL(library)


def calls(library: Any, tile: Tile, dtype: torch.dtype) -> dict[str, Call]:
    """The calls of both contestants on the same numbers, checked. The peer gets `a` as it wants it, [rows][steps]."""
    pack = 4 // dtype.itemsize  # the steps in an element
    steps = -(-tile.steps // pack) * pack
    a, b = torch.randn(tile.rows, steps), torch.randn(steps, tile.columns)
    a[:, tile.steps :] = b[tile.steps :] = 0
    a, b = a.to(dtype), b.to(dtype)
    c, exact = torch.empty(tile.rows, tile.columns), a.double() @ b.double()
    ours_a, b = by_step(a.t(), pack) if tile.transposed else a, by_step(b, pack)
    size = [ctypes.c_int64(n) for n in (tile.rows, tile.columns, steps)]
    ours, peer = (getattr(library, f"{name}_{name_of(dtype)}") for name in ("ours", "brgemm"))
    table: dict[str, Call] = {
        PRODUCT: partial(_call, ours, [ours_a, b, c], [*size, ctypes.c_bool(tile.transposed)]),
        BRGEMM: partial(_call, peer, [a, b, c], size),
    }
    for name, call in table.items():
        c.fill_(torch.nan)
        call(1)
        torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-5 * steps**0.5, msg=partial("{}: {}".format, name))
    return table


def _call(function: Callable[..., object], tensors: list[Tensor], sizes: list[Any], times: int) -> object:
    return function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *sizes, ctypes.c_int64(times))


def by_step(x: Tensor, pack: int) -> Tensor:
    """Lay out (steps, n) as (steps / pack, n, pack)."""
    return x.reshape(-1, pack, x.shape[1]).transpose(1, 2).contiguous()


def measure(job: Job, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Add every tile's rows. torch.mm before each tells how quiet the machine was."""
    matmul, quiet = matmul_call(dtype, job.device), list[float]()
    for tile in TILES:
        around = time_interleaved({"mm": matmul}, job.device, job.seconds)["mm"]
        job.matmul_ms, times, quiet = timing(around).median_ms, CALL_FLOPS // tile.flops, quiet + around
        bound = {name: partial(call, times) for name, call in calls(library, tile, dtype).items()}
        for name, taken in time_interleaved(bound, job.device, job.seconds).items():
            add(job, tile, dtype, name, [ms / times for ms in taken])
    job.add_matmul(dtype, quiet)


def add(job: Job, tile: Tile, dtype: torch.dtype, name: str, taken: list[float]) -> None:
    """Add the row of one contestant; taken: milliseconds of one product."""
    shape, default = (tile.rows, tile.columns, tile.steps), name == PRODUCT
    io_bytes = (tile.rows + tile.columns) * tile.steps * dtype.itemsize + 4 * tile.rows * tile.columns
    sizes = {"io_bytes": io_bytes, "flops": tile.flops}
    job.add_row(name, taken, workload=tile.name, shape=shape, dtype=dtype, default=default, matmul_ms=job.matmul_ms, **sizes)


def write_report(path: Path) -> Path:
    """Write FILE.md for FILE.jsonl."""
    rows = read(path)
    busy = disturbed(rows)
    body = []
    for key, duel in duels(rows).items():
        assert duel.fastest is not None
        size = "x".join(map(str, duel.ours.shape))
        rates = [f"{row.flops / row.median_ms / 1e6:.0f}" for row in (duel.ours, duel.fastest) if row.median_ms]
        body.append([key.workload + " †" * (key in busy), key.dtype, size, *rates, f"{duel.speedup:.2f}"])
    path.with_suffix(".md").write_text(f"""# {rows[0].device}: tiles

Commit {rows[0].commit}, by `{rows[0].command}`. GFLOP/s of one thread; every row is in [{path.name}]({path.name}).

{markdown(["product", "dtype", "rows x columns x steps", "csrc/cpu/simd/product.h", "brgemm", "ratio"], body)}

{calibration(rows)}
""")
    return path.with_suffix(".md")


def main() -> None:
    torch.set_num_threads(1)
    job = Job("cpu", 0.3, " ".join(["python -m bench.studies.brgemm", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
        for dtype in dtypes():
            measure(job, library, dtype)
    path = job.path("brgemm")
    write(job.rows, path)
    print(f"wrote {path} and {write_report(path)}")


if __name__ == "__main__":
    main()
