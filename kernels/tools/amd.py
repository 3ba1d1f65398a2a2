"""A sample of the kernels through the real compiler for AMD's chips, without a GPU: `python -m smattn.kernels.tools.amd [--arch gfx942]`.

As aot.py, whose calls these are. The command fails where a thread keeps registers in scratch memory, where a program needs more shared
memory (LDS) than the chip has, and where a product takes no matrix instruction. A scalar register that is kept in a lane of a vector
register is no memory, and does not count. TF32 is never asked for on ROCm. No such chip has run any of it yet.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from ..chip import amd_number
from ..tiles import Tile
from . import positive
from .aot import compile_all, last_line, source
from .jobs import SAMPLE, Job, jobs, name_of, one_of, record

SHARED_MEMORY = {"gfx90a": 65_536, "gfx942": 65_536, "gfx950": 163_840}  # bytes that a program can have, per chip
WAVE = 64  # threads, in the place of a warp's 32


class Row(NamedTuple):
    """One compiled kernel."""

    kernel: str
    chip: str
    job: Job
    tile: Tile
    registers: int = 0  # vector registers of a thread
    scratch: int = 0  # bytes of a thread in memory
    shared: int = 0
    products: bool = False  # whether the kernel has matrix products
    instructions: int = 0  # of the matrix units
    error: str = ""

    def failure(self) -> str:
        """What is wrong with it, or nothing."""
        if self.error:
            return self.error
        if self.scratch:
            return f"spills {self.scratch} bytes"
        if self.shared > SHARED_MEMORY[self.chip]:
            return f"{self.shared} bytes of shared memory, the chip has {SHARED_MEMORY[self.chip]}"
        return "no matrix instruction" if self.products and not self.instructions else ""

    def text(self) -> str:
        j, t = self.job, self.tile
        tile = f"{t.block_m}x{t.block_n} w{t.warps} s{t.stages}"
        where = f"{self.kernel:14}{self.chip:8}{str(j.dtype)[6:]:9}D={j.D:<4}Nq={j.Nq:<5}{j.variant.name:35}{tile:17}"
        return f"{where}{self.registers:3} regs {self.scratch:5} scratch {self.instructions:4} mfma {self.shared:7} shared {self.failure()}"


def compile_job(chip: str, job: Job) -> list[Row]:
    rows = []
    for kernel, arguments, tile in record(job):
        name = name_of(kernel)
        options = {option: value for option, value in tile.options().items() if option != "maxnreg"}  # which is NVIDIA's
        try:
            compiled = triton.compile(source(kernel, arguments), target=GPUTarget("hip", chip, WAVE), options=options)
        except Exception as error:  # whatever the compiler throws belongs in the table
            rows.append(Row(name, chip, job, tile, error=last_line(error)))
            continue
        code = compiled.asm["amdgcn"]
        rows.append(Row(
            name, chip, job, tile, _of(code, "vgpr_count"), _of(code, "private_segment_fixed_size"), compiled.metadata.shared,
            "tt.dot" in compiled.asm["ttir"], len(re.findall(r"^\s*v_mfma", code, re.MULTILINE)),
        ))  # fmt: skip
    return rows


def _of(code: str, field: str) -> int:
    """A field of the metadata at the end of the code."""
    found = re.search(rf"^\s*\.{field}:\s+(\d+)$", code, re.MULTILINE)
    assert found, field
    return int(found[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", default=["gfx942"], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--every", type=positive, default=1, help="one of so many of the sample's calls")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is no compiler under it")
    samples = {chip: (job for job in jobs([amd_number(chip)], SAMPLE) if not job.variant.tf32) for chip in options.arch}
    calls = [(chip, job) for chip, sample in samples.items() for job in one_of(options.every, sample)]
    _, failed = compile_all(compile_job, calls, ", ".join(options.arch), options.processes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
