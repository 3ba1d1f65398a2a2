"""The studies: their rows become plots and tables, and what is not computed is not timed."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from bench.measuring import measure, peers
from bench.measuring.job import Job, default_backend
from bench.reporting import measured, rows
from bench.studies import brgemm, nk_sweep
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


def test_tiles_become_rows_and_a_table(tmp_path):
    job = Job("cpu", 0.01, "python -m bench.studies.brgemm")
    for tile in brgemm.TILES:
        for name, taken in ((brgemm.PRODUCT, [2.0, 2.0]), (brgemm.BRGEMM, [3.0, 3.0])):
            brgemm.add(job, tile, torch.float32, name, taken)
    rows.write(job.rows, tmp_path / "brgemm.jsonl")
    lines = brgemm.write_report(tmp_path / "brgemm.jsonl").read_text().splitlines()
    assert sum(line.endswith("| 1.50 |") for line in lines) == len(brgemm.TILES)


def test_a_tile_that_is_not_computed_is_noticed_before_it_is_timed():
    idle = SimpleNamespace(ours_float32=lambda *args: None, brgemm_float32=lambda *args: None)
    with pytest.raises(AssertionError, match=brgemm.PRODUCT):
        brgemm.calls(idle, brgemm.TILES[0], torch.float32)


@pytest.mark.slow
@pytest.mark.skipif("avx512" not in peers.cpu_kernels(), reason="the tiles are those of AVX-512")
def test_both_contestants_compute_every_tile(tmp_path):
    library = brgemm.build(str(tmp_path))
    for tile, dtype in product(brgemm.TILES, brgemm.dtypes()):
        assert list(brgemm.calls(library, tile, dtype)) == [brgemm.PRODUCT, brgemm.BRGEMM], "checked inside"
