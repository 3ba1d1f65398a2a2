"""The targets on an H200, and what a run on a GPU makes of them: `python -m bench.gpu.targets [bench/results/FILE.jsonl]`

They are of the backend that smattn takes when none is named, in bfloat16, under the mask that is worse for it. Backward is what forward and
backward take, less what forward takes: a forward whose gradients are wanted keeps more and has a third product, and that counts as
backward. There is no figure where noise makes the whole the shorter of the two. A bandwidth counts what must be moved once: in forward the
inputs and the output, in backward twice that, for inputs and output come back with their gradients. Memory is the share that was taken of
the extra memory that smattn's promise allows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bench.measuring.ceilings import rate
from bench.reporting.rows import BOTH, COLD, COPY, FORWARD, GRAPH, WARM, Row, read, result_file
from bench.reporting.tables import markdown
from smattn.memory import PROMISED_BYTES, PROMISED_SHARE
from smattn.testing import WORKLOADS

DTYPE = "bfloat16"
PEERS = {"flex": "FlexAttention", "sdpa": "SDPA with the bias"}
SPEEDUP = 3.0
BANDWIDTH, BOUND_BY_MEMORY = 0.7, ("video64k", "queries100")
LATENCY, BOUND_BY_LAUNCHES = {FORWARD: 15.0, "backward": 30.0}, ("hodor_train", "hodor_infer")  # microseconds
OPERATIONS, BOUND_BY_PRODUCTS = {FORWARD: 450.0, "backward": 200.0}, "self4k_d128"  # TFLOP/s, where backward counts as 5 products


class Target(NamedTuple):
    """One promise about speed or memory."""

    what: str
    goal: float
    unit: str
    measured: float | None
    at_least: bool = True
    reason: str = "not yet run"  # why there is no figure
    complete: bool = True  # whether every mask has a figure

    def given(self, figures: Iterable[float | None], reasons: Iterable[str | None]) -> Target:
        """The target with the worst of the figures; without any, with the first reason why."""
        figures = list(figures)
        measured = [figure for figure in figures if figure is not None]
        reason = next((reason for reason in reasons if reason), self.reason)
        if not measured:
            return self._replace(reason=reason)
        worst = min(measured) if self.at_least else max(measured)
        return self._replace(measured=worst, reason=reason, complete=len(measured) == len(figures))

    def verdict(self) -> str:
        if self.measured is None:
            return self.reason
        missed = (self.goal - self.measured if self.at_least else self.measured - self.goal) / self.goal
        verdict = "reached" if missed <= 0 else f"missed by {missed:.1%}"
        return verdict if self.complete else f"{verdict} under one mask, the other: {self.reason}"

    def cells(self) -> list[str]:
        sign = "at least" if self.at_least else "at most"
        measured = "–" if self.measured is None else f"{self.measured:.3g} {self.unit}"
        return [self.what, f"{sign} {self.goal:g} {self.unit}", measured, self.verdict()]


class Found(NamedTuple):
    """The rows of one workload, kind of cache and mask by direction, smattn's and its peers'."""

    ours: dict[str, Row]
    peers: dict[tuple[str, str], Row]  # by direction and the peer's name

    def ms(self, direction: str) -> float | None:
        """Milliseconds of FORWARD, of BOTH, or of "backward", which is their difference."""
        if direction == "backward":
            both, forward = self.ms(BOTH), self.ms(FORWARD)
            return both - forward if both and forward and both > forward else None
        return self.ours[direction].median_ms if direction in self.ours else None

    def reason(self, direction: str) -> str | None:
        """Why ms has no figure; None when nothing is known."""
        both, forward = self.ms(BOTH), self.ms(FORWARD)
        if direction == "backward" and both and forward and both <= forward:
            return f"lost in noise: {BOTH} took {1e3 * both:.3g} µs, {FORWARD} alone {1e3 * forward:.3g} µs"
        needed = (BOTH, FORWARD) if direction == "backward" else (direction,)
        return next((row.skipped for name in needed if (row := self.ours.get(name)) and row.skipped), None)


def found(rows: list[Row], workload: str, cache: str = WARM) -> list[Found]:
    """What the rows have of a workload, for each mask."""
    chosen = [row for row in rows if (row.workload, row.dtype, row.cache) == (workload, DTYPE, cache)]
    return [
        Found(
            {row.direction: row for row in chosen if row.mask == mask and row.default},
            {(row.direction, row.backend): row for row in chosen if row.mask == mask and not row.ours},
        )
        for mask in dict.fromkeys(row.mask for row in chosen)
    ]


def targets(rows: list[Row]) -> Iterator[Target]:
    """Every target with its figure."""
    for workload in WORKLOADS:
        for peer, name in PEERS.items():
            yield speedup(rows, workload, peer, name)
    copy = rate(rows, COPY)
    for workload in BOUND_BY_MEMORY:
        for direction, times in ((FORWARD, 1.0), ("backward", 2.0)):
            goal = Target(f"{workload} {direction}, share of copy's bandwidth, cold cache", 100 * BANDWIDTH, "%", None)
            yield of(rows, workload, COLD, direction, goal, lambda row, ms, n=times: 1e5 * n * row.io_bytes / ms / copy if copy else None)
    for workload in BOUND_BY_LAUNCHES:
        for direction, limit in LATENCY.items():
            goal = Target(f"{workload} {direction}, in a CUDA graph", limit, "µs", None, at_least=False)
            yield of(rows, workload, GRAPH, direction, goal, lambda row, ms: 1e3 * ms)
    for direction, least in OPERATIONS.items():
        times = 1.0 if direction == FORWARD else 2.5
        goal = Target(f"{BOUND_BY_PRODUCTS} {direction}", least, "TFLOP/s", None)
        yield of(rows, BOUND_BY_PRODUCTS, WARM, direction, goal, lambda row, ms, n=times: n * row.flops / ms / 1e9)
    for workload in WORKLOADS:
        cells = [cell.ours[BOTH] for cell in found(rows, workload) if BOTH in cell.ours]
        goal = Target(f"{workload} extra memory, of what is allowed", 100, "%", None, at_least=False)
        yield goal.given(map(share, cells), (row.skipped for row in cells))


def speedup(rows: list[Row], workload: str, peer: str, name: str) -> Target:
    """The target of being SPEEDUP times as fast as a peer; name: what the table calls it."""
    cells = [cell for cell in found(rows, workload) if BOTH in cell.ours and (BOTH, peer) in cell.peers]
    pairs = [(cell.ours[BOTH], cell.peers[BOTH, peer]) for cell in cells]
    ratios = (theirs.median_ms / ours.median_ms if ours.median_ms and theirs.median_ms else None for ours, theirs in pairs)
    reasons = (row.skipped and f"{row.backend}: {row.skipped}" for pair in pairs for row in pair)
    return Target(f"{workload} forward+backward, against {name}", SPEEDUP, "times", None).given(ratios, reasons)


def of(
    rows: list[Row], workload: str, cache: str, direction: str, goal: Target, figure: Callable[[Row, float], float | None]
) -> Target:  # fmt: skip
    """The target with figures that `figure` makes of forward's row and the milliseconds of a direction."""
    cells = [cell for cell in found(rows, workload, cache) if FORWARD in cell.ours]
    figures = (figure(cell.ours[FORWARD], ms) if (ms := cell.ms(direction)) else None for cell in cells)
    return goal.given(figures, (cell.reason(direction) for cell in cells))


def share(row: Row) -> float | None:
    """The extra memory as a percentage of what is allowed."""
    return None if row.extra_bytes is None else 100 * max(0, row.extra_bytes) / (row.io_bytes / PROMISED_SHARE + PROMISED_BYTES)


def table(rows: list[Row]) -> str:
    """The Markdown table. Without rows it has what is aimed at, and nothing of it run."""
    return markdown(["target", "goal", "measured", "outcome"], [target.cells() for target in targets(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=result_file, metavar="FILE")
    rows = [row for file in parser.parse_args().files for row in read(file)]
    print(rows[0].device if rows else "no run")
    print(table(rows))


if __name__ == "__main__":
    main()
