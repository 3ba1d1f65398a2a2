"""The sweep over numbers of keys, and the call in its variants: their rows become reports and parts of the page."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.measuring import measure, peers
from bench.measuring.job import Job, default_backend
from bench.reporting import measured, rows
from bench.studies import nk_sweep, variants
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


@pytest.fixture
def small(monkeypatch):
    """The variants of few queries and keys, with nothing compiled and a small product to calibrate by."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(variants, "matmul_call", lambda *_: lambda: torch.ones(8, 8) @ torch.ones(8, 8))
    for name in variants.NAMES:
        monkeypatch.setitem(variants.WORKLOADS, name, replace(variants.WORKLOADS[name], Nq=13, Nk=40))


def test_the_contestants_of_every_variant_agree_and_become_a_table_of_the_page(small, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    job = Job("cpu", 0.0, "python -m bench.studies.variants")
    quiet = [ms for variant in variants.VARIANTS for ms in variants.measure(job, "self1k", variant, torch.float32, default_backend(tiny()))]
    job.add_matmul(torch.float32, quiet)
    file = "bench/results/a-variants-float32.jsonl"
    rows.write(job.rows, tmp_path / file)
    text = variants.write_report(tmp_path / file).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| self1k, ")]
    assert len(lines) == len(variants.VARIANTS) and all(line.count("×") == 2 for line in lines)
    timed = {(row.workload, row.backend) for row in job.rows if not row.ours}
    assert ("self1k, no mask", "sdpa") in timed and ("self1k, lse too", "sdpa") not in timed, "SDPA does not give lse"
    page = measured.with_figures("<!-- figures: begin -->\n<!-- figures: end -->\n", [file])
    assert variants.table(job.rows) in page and measured.files_shown(page) == [file]


def test_a_variant_that_a_peer_computes_otherwise_is_not_timed(small, monkeypatch):
    right = variants.eager
    monkeypatch.setattr(variants, "eager", lambda case: tuple(2 * tensor for tensor in right(case)))
    with pytest.raises(RuntimeError, match="its results are not those of smattn/"):
        variants.measure(Job("cpu", 0.0, ""), "self1k", variants.VARIANTS[0], torch.float32, default_backend(tiny()))


def test_packed_projections_are_views_of_one_tensor_with_the_same_numbers():
    case = variants.VARIANTS[0].case("hodor_train", torch.float32, "cpu")
    laid_out = variants.packed(case)
    assert laid_out.key.untyped_storage().data_ptr() == laid_out.value.untyped_storage().data_ptr()
    assert laid_out.key.stride() == (2 * 9504 * 256, 32, 512, 1)
    for name, tensor in case.inputs().items():
        assert torch.equal(tensor, laid_out.inputs()[name])
