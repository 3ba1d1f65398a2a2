"""Rewrite the figures of README.md, between its two markers, from result files: `python bench/readme_figures.py bench/results/FILE.jsonl`

Without a file, from those the README shows now. Every figure of the README is made here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rows import BOTH, FORWARD, MATMUL, read
from tables import DISTURBED, Duel, disturbed, duels, markdown, mib, ms

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?<=<!-- figures: begin -->\n).*?(?=<!-- figures: end -->)", re.DOTALL)


def files_shown(readme: str) -> list[str]:
    """The result files, relative to the repository's root, that the README's block was made from."""
    block = BLOCK.search(readme)
    return re.findall(r"rows: \[.*?\]\((bench/results/\S+\.jsonl)\)", block[0]) if block else []


def with_figures(readme: str, files: list[str]) -> str:
    return BLOCK.sub(lambda _: "\n".join(map(section, files)), readme)


def section(file: str) -> str:
    """One device: its table, its plot, and where they come from."""
    rows, stem = read(ROOT / file), file.removesuffix(".jsonl")
    about = rows[0]
    duel_of = duels(rows)
    pairs = dict.fromkeys(key[:3] for key in duel_of)
    header = ["", "forward, ms", "best peer", "speedup", "both, ms", "best peer", "speedup", "extra MiB", "least peer"]
    busy = {key[:3] for key in disturbed(rows)}
    body = [line([*pair, *["†"] * (pair in busy)], duel_of.get((*pair, FORWARD)), duel_of.get((*pair, BOTH))) for pair in pairs]
    note = f"† The machine was busy: torch.mm was over {DISTURBED} times slower around this cell than at its best.\n\n" if busy else ""
    ours = ", ".join(dict.fromkeys(duel.ours.backend for duel in duel_of.values()))
    rates = ", ".join(f"{row.flops / row.median_ms / 1e6:.0f} {row.dtype}" for row in rows if row.workload == MATMUL and row.median_ms)
    return f"""**{about.device}**, torch {about.versions["torch"]}; torch.mm in the same run: {rates} GFLOP/s.
Medians of {ours}; "both" is forward and backward with all five gradients, and the memory its peak beyond inputs, outputs and gradients.

{markdown(header, body)}

{note}![Time of every contestant]({stem}-time.png)

Peers: plain PyTorch eager and compiled, SDPA with the materialised bias, compiled FlexAttention (on a CPU forward only).
By `{about.command}` at commit {about.commit}; [report]({stem}.md); rows: [{Path(file).name}]({file}).
"""


def line(label: list[str], forward: Duel | None, both: Duel | None) -> list[str]:
    smallest = both.smallest if both else None
    memory = [mib(both.ours.extra_bytes) if both else "–", f"{mib(smallest.extra_bytes)} {smallest.backend}" if smallest else "–"]
    return [" ".join(label), *times(forward), *times(both), *memory]


def times(duel: Duel | None) -> list[str]:
    """Ours in ms, the fastest peer's, and how many times ours is as fast."""
    if duel is None:
        return ["–"] * 3
    peer, speedup = duel.fastest, duel.speedup
    return [ms(duel.ours.median_ms), f"{ms(peer.median_ms)} {peer.backend}" if peer else "–", f"{speedup:.2f}×" if speedup else "–"]


def main(files: list[str]) -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    if BLOCK.search(readme) is None:
        sys.exit("README.md has no <!-- figures: begin --> and <!-- figures: end -->")
    path.write_text(with_figures(readme, files or files_shown(readme)))


if __name__ == "__main__":
    main([str(Path(file).resolve().relative_to(ROOT)) for file in sys.argv[1:]])
