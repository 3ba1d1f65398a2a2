"""`make tune` compiles candidates ahead: what is compiled is what is timed, and the compiler's figures rule tiles out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu import cells, tune
from smattn.kernels.tiles import Tile
from smattn.kernels.tools import jobs
from tests.support.meters import launches_recorded

pytestmark = pytest.mark.promise("benchmarks")
ROOT = Path(__file__).resolve().parents[2]
T = Tile
ARCH = 90
CELLS = list(tune.cells(ARCH, heads=[64]))
MANY = 1088  # queries, of 8 heads in all no small call


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.itemsize == 2], ids=tune.Cell.text)
def test_what_is_compiled_ahead_is_what_is_timed(cell, monkeypatch):
    """Every argument is compared, because dtypes, strides and sizes decide what Triton compiles."""
    monkeypatch.setattr(cells, "SHAPES", {Nq: (2, 4, 2048) for Nq in cells.SHAPES})
    monkeypatch.setitem(cells.SHAPES, MANY, (2, 4, 2048))
    for kernels in (tune.FORWARD, tune.BACKWARD):
        monkeypatch.setitem(kernels, cell.kernel, min(cell.Nq, MANY)) if cell.kernel in kernels else None

    def told(value):
        if isinstance(value, TensorDescriptor):
            return value.base.dtype, value.shape, value.strides, value.block_shape
        return value.dtype if isinstance(value, torch.Tensor) else value

    def seen(kernel, arguments, tile):
        return kernel.__name__, tile, {name: told(value) for name, value in arguments.items()}

    ahead = [seen(*launched) for launched in jobs.record(cell.job(ARCH, not cell.forward))]

    class Launches(list):
        def append(self, launched):
            super().append(seen(*launched))

    with launches_recorded(ARCH) as recorder:
        recorder.launches = Launches()
        call = tune.the_pass(cell, cell.case("cpu"))
        call() if cell.forward else None
        made = recorder.launches[:] if cell.forward else (recorder.launches.clear(), call(), recorder.launches[:])[2]
    own = {name for name, tile, _ in made if tile == tune.present(cell, ARCH)}
    assert own and [launch for launch in made if launch not in ahead] == []


class Compiled(NamedTuple):
    tile: Tile
    why: str

    def failure(self) -> str:
        return self.why


def test_the_figures_of_the_compiler_rule_a_tile_out(table, monkeypatch):
    cell, tile, other = tune.Cell("dq", 2, 32), T(64, 64, 4, 2), T(32, 32, 4, 1)

    def failure_with(*rows):
        monkeypatch.setattr(tune.aot, "compile_job", lambda job, compiler: [Compiled(*row) for row in rows])
        return tune.failure(cell, 90, tile)

    assert failure_with((other, "spills"), (tile, "")) == ""
    assert failure_with((tile, ""), (tile, "spills 8 bytes")) == "spills 8 bytes"
    assert failure_with((other, "")) == "no kernel was launched with it"
    monkeypatch.setattr(tune.aot, "compile_job", lambda job, compiler: 1 // 0)
    assert "ZeroDivisionError" in tune.failure(cell, 90, tile)


COMPILE = """
import os
import triton
from bench.gpu import tune
from smattn.kernels.tools import jobs
from triton.backends.compiler import GPUTarget
from smattn.kernels.tiles import Tile as T
class Driver:  # of a GPU that is not there
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
triton.runtime.driver.set_active(Driver())
cell = tune.Cell("split_16", 2, 32)
present = tune.present(cell, 90)
for tile in (present, T(16, 256, 4, 20)):
    print(repr(tune.failure(cell, 90, tile)))
folders = lambda: sum(name.endswith(".cubin") for _, _, names in os.walk(os.environ["TRITON_CACHE_DIR"]) for name in names)
tune.put(cell, 90, present)
with_descriptors = tune.Cell("forward", 2, 64)
assert tune.present(with_descriptors, 90).tma
tune.failure(with_descriptors, 90, tune.present(with_descriptors, 90))
before, meta = folders(), jobs.torch.empty
jobs.torch.empty = lambda *sizes, **more: meta(*sizes, **(more | {"device": "cpu"}))  # real pointers, as in a launch
for cell in (cell, with_descriptors):
    for kernel, arguments, tile in jobs.record(cell.job(90, training=False)):
        kernel.device_caches.clear()
        kernel.warmup(**arguments, grid=(7,), **tile.options())
print(folders() - before)
"""


@pytest.mark.slow
def test_a_tile_that_the_compiler_finds_too_large_is_left_out(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{COMPILE}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    present, large, compiled_again = done.stdout.splitlines()
    assert present == "''" and "bytes of shared memory, the chip has" in large
    assert compiled_again == "0", "a launch finds what was compiled ahead"
