"""Rewrite the figures of README.md, between its markers, from result files.

`python -m bench.reporting.readme_figures bench/results/FILE.jsonl`

Without a file, from those the README shows now. A GPU's files go between markers of their own, with the targets, and a CPU's between
theirs: a call with one kind leaves the other as it is. Every figure of the README is made here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench.gpu import targets
from bench.reporting.rows import BOTH, COPY, FORWARD, MATMUL, Row, read
from bench.reporting.tables import DISTURBED, Duel, disturbed, duels, markdown, mib, ms

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "-nk-sweep"  # in the name of what nk_sweep.py writes; any other file is run.py's
BLOCK = re.compile(r"(?<=<!-- figures: begin -->\n).*?(?=<!-- figures: end -->)", re.DOTALL)
GPU_BLOCK = re.compile(r"(?<=<!-- gpu figures: begin -->\n).*?(?=<!-- gpu figures: end -->)", re.DOTALL)
NO_GPU = "No run on a GPU has been made yet; `make gpu` makes one.\n"

INTRODUCTION = """Medians in ms of the backend that smattn takes, beside the fastest of its peers in the same run: plain PyTorch eager and
compiled, SDPA with the materialised bias, compiled FlexAttention (on a CPU forward only). "Both" is forward and backward with all five
gradients, and the memory its peak beyond inputs, outputs and gradients. Cold cache: the caches are emptied before each call.
"""


def files_shown(readme: str, marked: re.Pattern[str] = BLOCK) -> list[str]:
    """The result files, relative to the repository's root, that the README's block was made from."""
    block = marked.search(readme)
    return re.findall(r"rows: \[.*?\]\((bench/results/\S+\.jsonl)\)", block[0]) if block else []


def with_figures(readme: str, files: list[str]) -> str:
    runs, sweeps = ([file for file in files if (SWEEP in file) is swept] for swept in (False, True))
    parts = [INTRODUCTION] * bool(runs) + [section(file, with_plot=file == runs[0]) for file in runs] + [*map(sweep_section, sweeps)]
    return BLOCK.sub(lambda _: "\n".join(parts), readme)


def with_gpu_figures(readme: str, files: list[str]) -> str:
    return GPU_BLOCK.sub(lambda _: "\n".join([INTRODUCTION, *map(gpu_section, files)]) if files else NO_GPU, readme)


def gpu_section(file: str) -> str:
    """One run on a GPU: its section, and what became of the targets."""
    what = " ".join((targets.__doc__ or "").splitlines()[2:])
    return f"{section(file, with_plot=True)}\n**Targets on an H200, and this run.** {what}\n\n{targets.table(read(ROOT / file))}\n"


def is_on_a_gpu(file: str) -> bool:
    return any(row.workload == COPY for row in read(ROOT / file))


def section(file: str, with_plot: bool = False) -> str:
    """One run: its table, its plot, and where they come from."""
    rows, stem = read(ROOT / file), file.removesuffix(".jsonl")
    about, duel_of, busy = rows[0], duels(rows), {key.inputs for key in disturbed(rows)}
    by_inputs: dict[str, dict[str, Duel]] = {}
    for key, duel in duel_of.items():
        by_inputs.setdefault(key.inputs, {})[key.direction] = duel
    header = ["", "forward, ms", "best peer", "speedup", "both, ms", "best peer", "speedup", "extra MiB", "least peer"]
    body = [line(name + " †" * (name in busy), of.get(FORWARD), of.get(BOTH)) for name, of in by_inputs.items()]
    note = f"† The machine was busy: torch.mm was over {DISTURBED} times slower around this cell than at its best.\n\n" if busy else ""
    ours = ", ".join(dict.fromkeys(duel.ours.backend for duel in duel_of.values()))
    rates = ", ".join(f"{row.flops / row.median_ms / 1e6:.0f} {row.dtype}" for row in rows if row.workload == MATMUL and row.median_ms)
    plot = f"![Time of every contestant]({stem}-time.png)\n\n" if with_plot else ""
    return f"""**{about.device}: {ours}**, torch {about.versions["torch"]}; torch.mm in the same run: {rates} GFLOP/s.

{markdown(header, body)}

{note}{plot}{source(about, file)}
"""


def sweep_section(file: str) -> str:
    """Time and memory against the number of keys: the plot, and where its lines end."""
    rows = [row for row in read(ROOT / file) if row.workload != MATMUL]
    ends = []
    for Nq in dict.fromkeys(row.shape[2] for row in rows):
        duel = [duel for duel in duels(rows).values() if duel.ours.shape[2] == Nq][-1]
        fastest, smallest = duel.fastest, duel.smallest
        if fastest and smallest:
            ends.append(
                f"{Nq} queries and {duel.ours.shape[3]} keys: {ms(duel.ours.median_ms)} ms and {mib(duel.ours.extra_bytes)} MiB, "
                f"the best peers {ms(fastest.median_ms)} ms ({fastest.backend}) and {mib(smallest.extra_bytes)} MiB ({smallest.backend})."
            )
    return f"""**More keys**: forward and backward of {rows[0].shape[1]} heads of size {rows[0].shape[4]}. {" ".join(ends)}

![Time and memory against the number of keys]({file.removesuffix(".jsonl")}.png)

{source(rows[0], file)}
"""


def source(about: Row, file: str) -> str:
    return f"By `{about.command}` at commit {about.commit}; [report]({Path(file).with_suffix('.md')}); rows: [{Path(file).name}]({file})."


def line(label: str, forward: Duel | None, both: Duel | None) -> list[str]:
    smallest = both.smallest if both else None
    memory = [mib(both.ours.extra_bytes) if both else "–", f"{mib(smallest.extra_bytes)} {smallest.backend}" if smallest else "–"]
    return [label, *times(forward), *times(both), *memory]


def times(duel: Duel | None) -> list[str]:
    """Ours in ms, the fastest peer's, and how many times ours is as fast."""
    if duel is None:
        return ["–"] * 3
    peer, speedup = duel.fastest, duel.speedup
    return [ms(duel.ours.median_ms), f"{ms(peer.median_ms)} {peer.backend}" if peer else "–", f"{speedup:.2f}×" if speedup else "–"]


def main(files: list[str]) -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    if BLOCK.search(readme) is None or GPU_BLOCK.search(readme) is None:
        sys.exit("README.md has not the four markers <!-- figures: begin -->, ... <!-- gpu figures: end -->")
    on_cpus, on_gpus = ([file for file in files if is_on_a_gpu(file) is gpu] for gpu in (False, True))
    readme = with_figures(readme, on_cpus or files_shown(readme))
    path.write_text(with_gpu_figures(readme, on_gpus or files_shown(readme, GPU_BLOCK)))


if __name__ == "__main__":
    main([str(Path(file).resolve().relative_to(ROOT)) for file in sys.argv[1:]])
