"""The micro-kernel of csrc/cpu/product.h beside torch's exported brgemm, tile by tile, on one thread: `python bench/brgemm.py`

The yardstick is used here only: the package calls none of torch's kernels. Compiles brgemm.cpp and calls it through
ctypes; both contestants are checked against float64 before they are timed. An x86-64 CPU with AVX-512 and Linux are needed.
Writes bench/results/<date>-<device>-brgemm.jsonl, one row a tile and contestant, and a table beside it.
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

import torch
from harness import time_interleaved, timing
from job import Job, name_of
from measure import matmul_call
from rows import FORWARD, OURS, WARM, Row, read, write
from tables import calibration, disturbed, duels, markdown
from torch import Tensor

HERE = Path(__file__).resolve().parent

FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c")
PRODUCT, BRGEMM = OURS + "product.h", "brgemm"
CALL_FLOPS = 10**8  # of the products timed together: a few milliseconds
Call = Callable[[int], object]  # so many products, one after the other


@dataclass(frozen=True)
class Tile:
    """c[rows][columns] = a[rows][steps] * b[steps][columns], as the kernels have it; transposed: they find a as [steps][rows]."""

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


def build(folder: str) -> ctypes.CDLL:
    """brgemm.cpp, compiled and loaded."""
    torch_root, library = Path(torch.__file__).parent, f"{folder}/brgemm.so"
    paths = ("-I", f"{HERE.parent}/csrc", "-isystem", f"{torch_root}/include", "-L", f"{torch_root}/lib", "-ltorch_cpu", "-lc10")
    subprocess.run(["c++", *FLAGS, str(HERE / "brgemm.cpp"), *paths, "-o", library], check=True)
    return ctypes.CDLL(library)


def calls(library: ctypes.CDLL, tile: Tile, dtype: torch.dtype) -> dict[str, Call]:
    """Both contestants on the same numbers, checked. The peer gets `a` as it wants it: [rows][steps]."""
    a, b = torch.randn(tile.rows, tile.steps).to(dtype), torch.randn(tile.steps, tile.columns).to(dtype)
    c = torch.empty(tile.rows, tile.columns)
    size = [ctypes.c_int64(n) for n in (tile.rows, tile.columns, tile.steps)]
    ours_a = a.t().contiguous() if tile.transposed else a
    table: dict[str, Call] = {
        PRODUCT: lambda times: library.ours_float32(*pointers(ours_a, b, c), *size, ctypes.c_bool(tile.transposed), ctypes.c_int64(times)),
        BRGEMM: lambda times: library.brgemm_float32(*pointers(a, b, c), *size, ctypes.c_int64(times)),
    }
    exact = a.double() @ b.double()
    for name, call in table.items():
        c.fill_(torch.nan)
        call(1)
        torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-5 * tile.steps**0.5, msg=lambda text, name=name: f"{name}: {text}")
    return table


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def measure(job: Job, library: ctypes.CDLL) -> None:
    """Every tile's rows, and torch.mm before each: how quiet the machine was."""
    dtype = torch.float32
    matmul, quiet = matmul_call(dtype, job.device), list[float]()
    for tile in TILES:
        around = time_interleaved({"mm": matmul}, job.device, job.seconds)["mm"]
        job.matmul_ms, times, quiet = timing(around).median_ms, CALL_FLOPS // tile.flops, quiet + around
        bound = {name: partial(call, times) for name, call in calls(library, tile, dtype).items()}
        for name, taken in time_interleaved(bound, job.device, job.seconds).items():
            job.rows.append(row(job, tile, dtype, name, [ms / times for ms in taken]))
    job.add_matmul(dtype, quiet)


def row(job: Job, tile: Tile, dtype: torch.dtype, name: str, taken: list[float]) -> Row:
    times = timing(taken)
    io_bytes = (tile.rows + tile.columns) * tile.steps * dtype.itemsize + 4 * tile.rows * tile.columns
    return Row(
        **job.about, workload=tile.name, shape=(tile.rows, tile.columns, tile.steps), mask="none", dtype=name_of(dtype), direction=FORWARD,
        cache=WARM, backend=name, default=name == PRODUCT, median_ms=times.median_ms, p10=times.p10, p90=times.p90, reps=times.reps,
        extra_bytes=None, io_bytes=io_bytes, flops=tile.flops, matmul_ms=job.matmul_ms, errors=None, skipped=None,
    )  # fmt: skip


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

{markdown(["product", "dtype", "rows x columns x steps", "csrc/cpu/product.h", "brgemm", "ratio"], body)}

{calibration(rows)}
""")
    return path.with_suffix(".md")


def main() -> None:
    torch.set_num_threads(1)
    job = Job("cpu", 0.3, " ".join(["python bench/brgemm.py", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        measure(job, build(folder))
    path = job.path("brgemm")
    write(job.rows, path)
    print(f"wrote {path} and {write_report(path)}")


if __name__ == "__main__":
    main()
