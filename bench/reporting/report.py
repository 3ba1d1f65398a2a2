"""The report of a result file, Markdown tables and two plots beside it: `python -m bench.reporting.report bench/results/FILE.jsonl`"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.reporting.rows import COLD, COPY, GRAPH, OURS, UNMASKED, WARM, Row, read, result_file
from bench.reporting.tables import Key, calibration, cells, contestants, disturbed, duels, markdown, mib, ms
from smattn.testing import WORKLOADS


def summary(rows: list[Row]) -> str:
    """A line for each cell, for the terminal."""
    lines = [f"{'':60}{'smattn ms':>10}{'best peer ms':>22}{'ratio':>8}{'extra MiB':>11}{'least peer MiB':>22}"]
    busy = disturbed(rows)
    for key, duel in duels(rows).items():
        peer, small = duel.fastest, duel.smallest
        lines.append(
            f"{label(key):60}{ms(duel.ours.median_ms):>10}{f'{ms(peer.median_ms)} {peer.backend}' if peer else '–':>22}"
            f"{f'{duel.speedup:.2f}x' if duel.speedup else '–':>8}{mib(duel.ours.extra_bytes):>11}"
            f"{f'{mib(small.extra_bytes)} {small.backend}' if small else '–':>22}{'   disturbed' if key in busy else ''}"
        )
    return "\n".join(lines)


def write_report(path: Path) -> Path:
    """Write FILE.md, FILE-time.png and FILE-memory.png for FILE.jsonl."""
    rows = read(path)
    timed = [row for row in rows if row.median_ms is not None]
    plot(timed, "time", path.with_name(f"{path.stem}-time.png"))
    plot([row for row in timed if row.cache == WARM], "memory", path.with_name(f"{path.stem}-memory.png"))
    about, names = rows[0], contestants(rows)
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    kernels = f"\nCPU kernels of smattn: {about.kernels}.\n" if about.kernels else ""
    text = f"""# {about.device}

{versions}, commit {about.commit}, {about.threads} threads, by `{about.command}`. Every row is in [{path.name}]({path.name}).
{kernels}
## Time

Medians in ms, every contestant called in turn in one run; forward+backward has every gradient, that of alpha too
unless it is a constant. In brackets GFLOP/s, forward counted as two matmuls, forward+backward as 3.5 times that, whatever a contestant
recomputes. Bold: the backend smattn takes when none is named. Cold cache: before each call the caches are emptied, as by whatever else a
network does between two calls.

![Time]({path.stem}-time.png)

{markdown(["workload", *names, "best peer / smattn"], time_body(rows, names))}

{calibration(rows)}
{on_a_gpu(rows)}
## Extra peak memory

MiB beyond inputs, outputs and gradients (given in the second column) at the highest point of a call, scratch included.

![Memory]({path.stem}-memory.png)

{markdown(["workload", "inputs, outputs, gradients", *names], memory_body(rows, names))}

## Errors against float64

Largest error of each tensor, plain PyTorch's, and the share of the error budget used (smattn/testing/budget.py; the worse norm).

{markdown(["backend, workload, dtype, mask, B H Nq Nk D", *TENSORS], error_body(rows))}

## Not measured

{skipped(rows)}

Workloads not in this run: {", ".join(name for name in WORKLOADS if name not in {row.workload for row in timed}) or "none"}.
"""
    report = path.with_suffix(".md")
    report.write_text(text)
    return report


def on_a_gpu(rows: list[Row]) -> str:
    """The ceilings and the targets; nothing for a run without the ceilings."""
    if all(row.workload != COPY for row in rows):
        return ""
    from bench.gpu import targets
    from bench.measuring import ceilings

    return f"""
On a GPU a warm call finds the device idle, so what Python and the launches take counts. Cold calls are queued behind the emptying of the
cache, and in a CUDA graph ten calls are one launch, of which the time of one call is given: there nothing but the device's own time is
left. `{UNMASKED}` is no peer: what the others take beyond it is the price of the mask.

## Ceilings

{ceilings.table(rows)}

## Targets

{" ".join(targets.__doc__.splitlines()[2:])}

{targets.table(rows)}
"""


TENSORS = ("out", "dquery", "dkey", "dvalue", "dmask", "dalpha")


def label(key: Key) -> str:
    return f"{key.inputs}, {key.direction}"


def time_body(rows: list[Row], names: list[str]) -> list[list[str]]:
    body, speedups, busy = [], {key: duel.speedup for key, duel in duels(rows).items()}, disturbed(rows)
    for key, group in cells(rows).items():
        by_name = {row.backend: row for row in group}
        speedup = speedups.get(key)
        mark = " †" if key in busy else ""
        body.append([label(key) + mark, *(_time(by_name.get(name)) for name in names), f"{speedup:.2f}" if speedup else "–"])
    return body


def _time(row: Row | None) -> str:
    if row is None or row.median_ms is None:
        return "–"
    mark = "**" if row.default else ""
    return f"{mark}{ms(row.median_ms)}{mark} ({row.flops / row.median_ms / 1e6:.0f})"


def memory_body(rows: list[Row], names: list[str]) -> list[list[str]]:
    body = []
    for key, group in cells(row for row in rows if row.cache == WARM).items():
        by_name = {row.backend: row.extra_bytes for row in group}
        body.append([label(key), mib(group[0].io_bytes), *(mib(by_name.get(name)) for name in names)])
    return body


def error_body(rows: list[Row]) -> list[list[str]]:
    checked = {(e["backend"], e["workload"], e["dtype"], e["mask"]): e for row in rows if (e := row.errors)}
    body = []
    for key, e in checked.items():
        line = []
        for name in TENSORS:
            t = e["tensors"].get(name)
            if t is None:  # a bias has an alpha without a gradient
                line.append("–")
                continue
            share = max(error / allowed if error else 0.0 for error, allowed in zip(t["error"], t["allowed"], strict=True))
            line.append(f"{t['error'][0]:.0e} / {t['plain'][0]:.0e}, {share:.0%}")
        body.append([f"{' '.join(key)}, {' '.join(map(str, e['shape']))}", *line])
    return body


def skipped(rows: list[Row]) -> str:
    lines = [f"- {row.backend}, {row.workload} {row.dtype} {row.mask}, {row.direction}: {row.skipped}" for row in rows if row.skipped]
    return "\n".join(lines) or "Nothing."


def plot(rows: list[Row], what: str, path: Path) -> None:
    """Plot bars on a logarithmic axis: a group for each cell, a colour for each contestant, forward above forward+backward."""
    table, names = cells(rows), contestants(rows)
    directions = list(dict.fromkeys(key.direction for key in table))
    size = (max(9, 0.4 * len(table)), 3 * len(directions))
    figure, axes = plt.subplots(len(directions), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        keys = [key for key in table if key.direction == direction]
        width = 0.8 / len(names)
        for n, name in enumerate(names):
            values = [next((_value(row, what) for row in table[key] if row.backend == name), np.nan) for key in keys]
            axis.bar(np.arange(len(keys)) + (n - (len(names) - 1) / 2) * width, values, width, label=name, color=colour(name, names))
        axis.set(yscale="log", title=direction, ylabel="median ms" if what == "time" else "extra peak MiB")
        axis.set_xticks(range(len(keys)), ticks(keys), fontsize=9 if len(keys) < 8 else 7)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(names), fontsize=8, frameon=False, loc="outside upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ticks(keys: list[Key]) -> list[str]:
    """The workload of each cell, with whatever else the cells differ in."""
    several = {field: len({getattr(key, field) for key in keys}) > 1 for field in ("dtype", "mask")}
    cold = {key: {COLD: ["cold cache"], GRAPH: ["CUDA graph"]}.get(key.cache, []) for key in keys}
    return ["\n".join([key.workload, *(getattr(key, field) for field in several if several[field]), *cold[key]]) for key in keys]


def _value(row: Row, what: str) -> float:
    if what == "time":
        return row.median_ms or np.nan
    return np.nan if row.extra_bytes is None else max(row.extra_bytes / 2**20, 0.1)  # A logarithmic axis has no zero.


def colour(name: str, names: list[str]) -> str:
    """The colour of a contestant: greens for smattn, greys and blues for peers."""
    same = [other for other in names if other.startswith(OURS) == name.startswith(OURS)]
    palette = ("#1b7837", "#7fbf7b", "#c7e9c0") if name.startswith(OURS) else ("#555555", "#999999", "#4393c3", "#92c5de", "#d6a1c8")
    return palette[same.index(name) % len(palette)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the report of a result file beside it, and its plots.")
    parser.add_argument("file", type=result_file)
    print(write_report(parser.parse_args().file))
