"""What a kernel's inner loop costs a score, from what loops.py counts of a warp: cycles of a multiprocessor's units for 64 x 64 scores.

These are predictions of what is executed, never measurements. A unit's cycles are what it alone would take, at the rates below.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .loops import Loop

SCORES = 64 * 64
ISSUED = 4  # instructions of a warp that a multiprocessor begins in a cycle
EXP2 = 16  # in a cycle
# Tensor-core operations of 16 bits in a cycle. Before wgmma's chip one number holds, after it HMMA, which it has besides, is as before.
RATES = {"HMMA": {80: 2048, 86: 1024, 89: 1024, 90: 2048, 100: 2048, 120: 1024}, "HGMMA": {90: 4096}}
SLACK = 1.1  # times what is needed may be executed
DOT = re.compile(r"^( *)\S+ = tt\.dot .*?: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>", re.MULTILINE)


class Cycles(NamedTuple):
    """Of each unit, for 64 x 64 scores."""

    issue: float
    exp2: float
    tensor: float
    shared: float

    def together(self) -> float:
        """What a tile is ranked by. Products wait for what is issued between them, the other units work beside both."""
        return max(self.issue + self.tensor, self.exp2, self.shared)


class Counts(NamedTuple):
    """One kernel's inner loop beside what it has to do. scores and needed: of a program once round the loop."""

    loop: Loop
    warps: int
    scores: int = 0
    needed: int = 0  # tensor operations that the source asks for

    def cycles(self, arch: int) -> Cycles:
        lot = self.warps * SCORES / self.scores
        units = {"HMMA": self.loop.hmma, "HGMMA": self.loop.hgmma}
        tensor = 0.0 if self.loop.has_others else sum(flops / RATES[unit][arch] for unit, flops in units.items() if flops)
        issue, exp2 = self.loop.instructions / ISSUED, 32 * self.loop.exponentials / EXP2
        return Cycles(issue * lot, exp2 * lot, tensor * lot, self.loop.passes * lot)

    def exp2_a_score(self) -> float:
        return 32 * self.warps * self.loop.exponentials / self.scores if self.scores else 0.0

    def figures(self, arch: int) -> tuple[str, ...]:
        """Cycles of each unit, exponentials a score, tensor operations over needed; "" where there is nothing to count."""
        if not self.scores or not self.loop.instructions:
            return ("",) * (len(Cycles._fields) + 2)
        issue, exp2, tensor, shared = (f"{cycles:.0f}" for cycles in self.cycles(arch))
        over = self.flops_over_needed()
        return issue, exp2, "" if self.loop.has_others else tensor, shared, f"{self.exp2_a_score():.2f}", f"{over:.2f}" if over else ""

    def text(self, arch: int) -> str:
        names = (*Cycles._fields, "exp2/score", "flops/needed")
        return "  ".join(f"{name} {figure}" for name, figure in zip(names, self.figures(arch), strict=True) if figure)

    def flops_over_needed(self) -> float:
        """0 where there are no products, or some whose sizes do not stand in the machine code."""
        return self.warps * self.loop.flops / self.needed if self.needed and not self.loop.has_others else 0.0


def count(loop: Loop, warps: int, arguments: dict[str, Any], ttir: str) -> Counts:
    """arguments: of the launch. A kernel that goes over rows alone has no scores."""
    if "BLOCK_N" not in arguments or "BLOCK_M" not in arguments:
        return Counts(loop, warps)
    by_loop = [DOT.findall(part) for part in ttir.split("scf.for ")]
    deepest = max((indent for dots in by_loop for indent, *_ in dots), default="")  # in the inner loop, of which a last block has a copy
    needed = max(sum(2 * int(m) * int(k) * int(n) for indent, m, k, n in dots if indent == deepest) for dots in by_loop)
    return Counts(loop, warps, arguments["BLOCK_M"] * arguments["BLOCK_N"], needed)


def excess(counts: Counts, block_n: int, logits: bool) -> str:
    """What the loop executes more of than it has to, or nothing.

    A row needs one exponential more, by which its sums are rescaled. Each of the four lanes that hold a row computes it, for which SLACK
    suffices from tiles of 32 keys on.
    """
    exponentials, flops = counts.exp2_a_score(), counts.flops_over_needed()
    if exponentials > SLACK * (1 + logits + 1 / block_n):
        return f"{exponentials:.2f} exp2 a score"
    return f"{flops:.2f} times the products needed" if flops > SLACK else ""
