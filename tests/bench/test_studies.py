"""The sweep over numbers of keys: its rows become a plot, a report and a line of the page."""

from __future__ import annotations

import pytest
import torch

from bench.measuring import measure, peers
from bench.measuring.job import Job, default_backend
from bench.reporting import measured, rows
from bench.studies import nk_sweep
from tests.support.bench_runs import tiny

pytestmark = pytest.mark.promise("benchmarks")

EAGER = peers.PEERS[0]


def test_the_sweep_over_keys_becomes_a_plot_a_report_and_a_line_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(nk_sweep, "KEYS", (16, 64))
    monkeypatch.setattr(nk_sweep, "QUERIES", (2, 3))
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    job = Job("cpu", 0.01, "python -m bench.studies.nk_sweep")
    name = default_backend(tiny())
    measure.measure(job, nk_sweep.sweep("cpu", torch.float32), [peers.ours(name), EAGER])
    rows.write(job.rows, tmp_path / "bench/results/a-nk-sweep.jsonl")
    text = nk_sweep.write_report(tmp_path / "bench/results/a-nk-sweep.jsonl").read_text()
    assert "| nq3_nk64 float32 uniform, forward+backward" in text
    assert (tmp_path / "bench/results/a-nk-sweep.png").stat().st_size > 5000
    page = "<!-- figures: begin -->\n<!-- figures: end -->\n"
    text = measured.with_figures(page, ["bench/results/a-nk-sweep.jsonl"])
    ours = next(row for row in job.rows if row.ours and row.shape[2:4] == (3, 64))
    assert f"3 queries and 64 keys: {ours.median_ms:.3g} ms" in text and "](../bench/results/a-nk-sweep.png)" in text
    assert measured.files_shown(text) == ["bench/results/a-nk-sweep.jsonl"]
