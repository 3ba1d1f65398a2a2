"""The six rows of figures that README.md shows between its markers, from the runs on one machine; measured.py writes them there."""

from __future__ import annotations

import re
from pathlib import Path

from bench.measuring.machine import ROOT
from bench.reporting.rows import BOTH, FORWARD, WARM, Row, read
from bench.reporting.tables import DISTURBED, Duel, between, disturbed, duels, markdown, times

ROWS = 6
BLOCK = between("figures")


def files_shown(readme: str) -> list[str]:
    """The result files that the rows come from, relative to the repository's root."""
    block = BLOCK.search(readme)
    return re.findall(r"\]\((bench/results/\S+\.jsonl)\)", block[0]) if block else []


def with_readme_figures(readme: str, files: list[str]) -> str:
    """The README with the first ROWS workloads of these runs, which one machine has made with the kernels that it takes by itself."""
    shown: list[tuple[str, str, dict[str, Duel]]] = []  # file, label, and the duels by direction
    for file in files:
        if kernels_are_forced(file):
            continue
        rows = read(ROOT / file)
        busy, cells = {key.inputs for key in disturbed(rows)}, dict[str, dict[str, Duel]]()
        for key, duel in duels(rows).items():
            if key.cache == WARM and key.mask != "blob":
                cells.setdefault(f"{key.workload}, {key.dtype}{' †' * (key.inputs in busy)}", {})[key.direction] = duel
        shown += [(file, label, of) for label, of in cells.items()]
    return BLOCK.sub(lambda _: block(shown[:ROWS]), readme)


def kernels_are_forced(file: str) -> bool:
    return any(row.default and "(" in row.backend for row in read(ROOT / file))


def block(shown: list[tuple[str, str, dict[str, Duel]]]) -> str:
    if not shown:
        return ""
    header = ["", "forward, ms", "best peer", "speedup", "both, ms", "best peer", "speedup"]
    body = [[label, *times(of.get(FORWARD)), *times(of.get(BOTH))] for _, label, of in shown]
    (first, *_), about = shown[0][2].values(), about_of(shown[0][0])
    links = ",\n".join(f"[{Path(file).name}]({file})" for file in dict.fromkeys(file for file, _, _ in shown))
    busy = any("†" in label for _, label, _ in shown)
    note = f"† The machine was busy: torch.mm was over {DISTURBED} times slower around this cell than at its best.\n" if busy else ""
    return f"""{markdown(header, body)}

{about.device}: medians of {first.ours.backend}, torch {about.versions["torch"]}.
"Both" is forward and backward with every gradient: of query, key, value, mask, and alpha where it is learned.
{note}[All figures](docs/measured.md), with other machines, memory, cold caches and more keys; rows:
{links}.
"""


def about_of(file: str) -> Row:
    return read(ROOT / file)[0]
