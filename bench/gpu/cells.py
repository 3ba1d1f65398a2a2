"""What the search of tiles is about: one tile of the table, and the call that it is timed in."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from smattn.kernels.chip import generation
from smattn.kernels.tiles import FEW_QUERIES, Key
from smattn.kernels.tools import aot, jobs
from smattn.testing import Case, make_case

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# Queries -> B, H, Nk of the calls that tiles are timed in.
SHAPES = {4096: (2, 8, 4096), 100: (4, 8, 16384), 60: (4, 8, 16384), 30: (2, 8, 9504), 13: (2, 8, 9504)}
# Kernel -> queries of the call that launches it.
FORWARD = {"forward": 4096, "split_64": 60, "split_32": 30, "split_16": 13}
BACKWARD = {"dq": 4096, "dkdv": 4096, "dmask": 4096, "split_dq": 100, "few_128": 100, "few_64": 60, "few_32": 30, "few_16": 13}
# The calls whose lines are searched: "pointers" serve those that can have no descriptors.
VARIANTS = {"plain": jobs.PLAIN, "pointers": jobs.MISALIGNED}


class Cell(NamedTuple):
    """One tile of the table, and with it the call that it is timed in."""

    kernel: str
    itemsize: int
    head: int
    call: str = "plain"

    @property
    def forward(self) -> bool:
        """Whether the tile is timed in forward, else in backward."""
        return self.kernel in FORWARD

    @property
    def Nq(self) -> int:
        return (FORWARD | BACKWARD)[self.kernel]

    def case(self, device: str, fewer: int = 1) -> Case:
        B, H, Nk = SHAPES[self.Nq]
        Nq, dtype = self.Nq if self.Nq <= FEW_QUERIES else self.Nq // fewer, DTYPES[self.itemsize]
        return self.laid_out(make_case(B, H, Nq, Nk // fewer, self.head, dtype=dtype, mask_dtype=dtype, device=device))

    def laid_out(self, case: Case) -> Case:
        """The case as the variant has it: its rows lie an odd number of elements apart where that is misaligned."""
        if not VARIANTS[self.call].misaligned:
            return case
        operands = {name: getattr(case, name) for name in ("query", "key", "value", "dout")}
        return replace(case, **{name: torch.cat([x, x[..., :1]], -1)[..., :-1] for name, x in operands.items()})

    def job(self, arch: int, training: bool = True) -> jobs.Job:
        """What `case` launches: forward and backward, or forward alone, as it is timed."""
        known, dtype, (B, H, Nk) = max(chip for chip in aot.SHARED_MEMORY if chip <= arch), DTYPES[self.itemsize], SHAPES[self.Nq]
        variant = VARIANTS[self.call]._replace(training=training, mask_dtype=dtype)
        return jobs.Job(known, dtype, self.head, self.Nq, variant, B, H, Nk)

    def key(self, arch: int) -> Key:
        """This chip's line, whether or not the table has it."""
        return Key(self.kernel, self.call, generation(arch), self.itemsize, self.head)

    def text(self) -> str:
        kind = "" if self.call == "plain" else f" {self.call}"
        return f"{self.kernel}{kind} {str(DTYPES[self.itemsize])[6:]} D={self.head}"
