"""Tables of a result file, which the report and the published pages share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.reporting.rows import CEILINGS, COLD, GRAPH, MATMUL, UNMASKED, Row

DISTURBED = 1.2  # A cell is disturbed when torch.mm around it was so many times slower than at its best.
HOW = {COLD: ", cold cache", GRAPH: ", CUDA graph"}


class Key(NamedTuple):
    """What the contestants of a cell had in common."""

    workload: str
    dtype: str
    mask: str
    cache: str
    direction: str

    @property
    def inputs(self) -> str:
        """Everything but the direction, in words."""
        return f"{self.workload} {self.dtype} {self.mask}" + HOW.get(self.cache, "")


class Duel(NamedTuple):
    """smattn's default backend in one cell, and the peers there that are fastest and smallest."""

    ours: Row
    fastest: Row | None
    smallest: Row | None

    @property
    def speedup(self) -> float | None:
        if self.ours.median_ms is None or self.fastest is None or self.fastest.median_ms is None:
            return None
        return self.fastest.median_ms / self.ours.median_ms


def cells(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The timed rows of each cell in the order measured. The ceilings are not among them."""
    table: dict[Key, list[Row]] = {}
    for row in rows:
        if row.workload not in CEILINGS and row.median_ms is not None:
            table.setdefault(Key(row.workload, row.dtype, row.mask, row.cache, row.direction), []).append(row)
    return table


def duels(rows: Iterable[Row]) -> dict[Key, Duel]:
    """The duel of each cell in which smattn's default backend was timed."""
    table = {}
    for key, group in cells(rows).items():
        ours = next((row for row in group if row.default), None)
        peers = [row for row in group if not row.ours and row.backend != UNMASKED]
        if ours is not None:
            table[key] = Duel(ours, _least(peers, lambda row: row.median_ms), _least(peers, lambda row: row.extra_bytes))
    return table


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table with the first column to the left and the others to the right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(duel: Duel | None) -> list[str]:
    """Three columns: smattn's time in ms, the fastest peer's, and how many times as fast smattn is."""
    if duel is None:
        return ["–"] * 3
    peer, speedup = duel.fastest, duel.speedup
    return [ms(duel.ours.median_ms), f"{ms(peer.median_ms)} {peer.backend}" if peer else "–", f"{speedup:.2f}×" if speedup else "–"]


def between(name: str) -> re.Pattern[str]:
    """Finds what a page has between `<!-- name: begin -->` and `<!-- name: end -->`."""
    return re.compile(rf"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", re.DOTALL)


def ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def mib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f}" if value >= 10 * 2**20 else f"{value / 2**20:.1f}"


def disturbed(rows: list[Row]) -> set[Key]:
    """The cells around which torch.mm was over DISTURBED times slower than at its best, because something else had the machine."""
    best: dict[str, float] = {}
    for row in rows:
        if quickest := row.p10 if row.workload == MATMUL else row.matmul_ms:
            best[row.dtype] = min(quickest, best.get(row.dtype, quickest))
    return {key for key, group in cells(rows).items() for row in group if row.matmul_ms and row.matmul_ms > DISTURBED * best[row.dtype]}


def calibration(rows: list[Row]) -> str:
    """How fast, and how steady, torch.mm was during the run."""
    lines = []
    for row in (row for row in rows if row.workload == MATMUL and row.median_ms):
        low, rate, high = (row.flops / time / 1e6 for time in (row.p90, row.median_ms, row.p10) if time)
        lines.append(
            f"torch.mm, {row.dtype}, 2048³, in the same run: {rate:.0f} GFLOP/s (10th to 90th percentile {low:.0f} to {high:.0f})."
        )
    if disturbed(rows):
        lines.append(f"† torch.mm was over {DISTURBED} times slower around this cell than at its best: something else had the machine.")
    return "\n".join(lines)


def contestants(rows: Iterable[Row]) -> list[str]:
    """The names of all that were timed."""
    return list(dict.fromkeys(row.backend for group in cells(rows).values() for row in group))


def _least(rows: list[Row], of: Callable[[Row], float | None]) -> Row | None:
    return min((row for row in rows if of(row) is not None), key=lambda row: of(row) or 0.0, default=None)
