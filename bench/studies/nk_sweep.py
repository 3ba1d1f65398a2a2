"""Time and memory of forward+backward against the number of keys, in the shape of a HODOR decoder: `python -m bench.studies.nk_sweep`

It writes bench/results/<date>-<device>-nk-sweep.jsonl, with .md and .png beside it. A peer whose score tensors do not fit is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.measuring.ceilings import measure_ceilings
from bench.measuring.cell import Cell
from bench.measuring.job import Job, default_backend
from bench.measuring.measure import measure
from bench.measuring.peers import PEERS, ours
from bench.reporting.rows import BOTH, Row, read
from bench.reporting.tables import calibration, contestants, markdown
from smattn.testing import Workload

B, H, D = 1, 8, 32
QUERIES = (13, 100)
KEYS = tuple(4**n for n in range(5, 10))  # 1k to 256k


def sweep(device: str, dtype: torch.dtype) -> list[Cell]:
    """The cells: every number of queries with every number of keys."""
    shapes = [Workload(f"nq{Nq}_nk{Nk}", B, H, Nq, Nk, D, "a hodor shape") for Nq in QUERIES for Nk in KEYS]
    return [Cell(workload, "uniform", dtype, device, BOTH) for workload in shapes]


def write_report(path: Path) -> Path:
    """Write FILE.md and FILE.png for FILE.jsonl."""
    from bench.reporting.report import memory_body, skipped, time_body

    rows = read(path)
    about, names = rows[0], contestants(rows)
    plot([row for row in rows if row.median_ms is not None and row.backend in names], names, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(f"""# {about.device}: time and memory against the number of keys

Commit {about.commit}, by `{about.command}`.
B = {B}, H = {H}, D = {D}; nq and nk in a name are the numbers of queries and keys. Every row is in [{path.name}]({path.name}).

![Time and memory]({path.stem}.png)

Medians in ms of forward and backward with all five gradients, GFLOP/s in brackets (3.5 times the forward's two matmuls):

{markdown(["", *names, "best peer / smattn"], time_body(rows, names))}

{calibration(rows)}

Extra peak memory, MiB beyond inputs, outputs and gradients:

{markdown(["", "inputs, outputs, gradients", *names], memory_body(rows, names))}

Not measured:

{skipped(rows)}
""")
    return path.with_suffix(".md")


def plot(rows: list[Row], names: list[str], path: Path) -> None:
    """Plot a line for each contestant on logarithmic axes, with a row of panels for each number of queries.

    The dotted line is proportional to the keys and meets smattn's time at the most keys.
    """
    import matplotlib.pyplot as plt

    from bench.reporting.report import colour

    figure, axes = plt.subplots(len(QUERIES), 2, figsize=(9, 3 * len(QUERIES)), squeeze=False, sharex=True, layout="constrained")
    for (time, memory), Nq in zip(axes, QUERIES, strict=True):
        for name in names:
            line = [row for row in rows if row.backend == name and row.shape[2] == Nq]
            style = {"color": colour(name, names), "marker": "o", "markersize": 3, "label": name}
            time.plot([row.shape[3] for row in line], [row.median_ms for row in line], **style)
            memory.plot([row.shape[3] for row in line], [row.extra_bytes / 2**20 for row in line if row.extra_bytes is not None], **style)
            if line[-1].default and line[-1].median_ms:
                per_key = line[-1].median_ms / line[-1].shape[3]
                time.plot(KEYS, [Nk * per_key for Nk in KEYS], ":", color="#1b7837", linewidth=1, label="proportional to the keys")
        time.set(title=f"{Nq} queries: time", ylabel="median ms")
        memory.set(title=f"{Nq} queries: extra memory", ylabel="peak MiB")
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log", xlabel="keys" if axis in axes[-1] else "")
        axis.set_xticks(KEYS, [f"{Nk // 1024}k" for Nk in KEYS])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(names) + 1, fontsize=8, frameon=False, loc="outside upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cells = sweep(device, torch.float32 if device == "cpu" else torch.bfloat16)
    job = Job(device, 0.5, " ".join(["python -m bench.studies.nk_sweep", *sys.argv[1:]]))
    job.file = job.path("nk-sweep")
    backend = default_backend(cells[0])
    if device == "cuda":
        measure_ceilings(job, cells[0].dtype)
    job.check([backend], cells)
    measure(job, cells, [ours(backend), *(peer for peer in PEERS if device not in peer.forward_only_on)])
    print(f"wrote {job.file} and {write_report(job.file)}")
    sys.exit(job.verdict())


if __name__ == "__main__":
    main()
