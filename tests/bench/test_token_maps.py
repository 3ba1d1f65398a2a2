"""bench/studies/token_maps.py: contestants compute the same, memory is that of the call, and rows become a table."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.measuring import job as bench_job
from bench.measuring import memory
from bench.measuring.machine import published
from bench.reporting import rows
from bench.studies import token_maps
from smattn.testing import Workload

pytestmark = pytest.mark.promise("benchmarks")
ROOT = Path(__file__).resolve().parents[2]
TINY = Workload("vit_cls", 1, 2, 48, 48, 8, "tiny")  # it has a known name, so that look-ups find it
STAGE = token_maps.Stage(TINY, rows.BOTH, "cpu", layers=2)
NOT_COMPILED = {name: peer for name, peer in token_maps.PEERS.items() if not isinstance(peer, token_maps.Compiled)}
CONTESTANTS = {"smattn/cpu": token_maps.with_smattn} | NOT_COMPILED


def test_a_contestant_that_computes_something_else_is_not_timed():
    token_maps.agree(STAGE, CONTESTANTS.values())

    def wrong(layers):
        outs, maps = token_maps.stacked(layers)
        return outs, 1.01 * maps

    with pytest.raises(AssertionError):
        token_maps.agree(STAGE, [token_maps.with_smattn, wrong])


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_a_call_returns_outputs_map_and_gradients(direction):
    results = replace(STAGE, direction=direction).steps(token_maps.with_smattn)()
    shapes = [tuple(tensor.shape) for tensor in results]
    layer, of_map = (1, 2, 48, 8), (1, token_maps.CLASSES, 48)
    assert shapes == [layer] * 2 + [of_map] + [layer] * (6 if direction == rows.BOTH else 0)


def test_memory_of_stacked_matrices_is_seen():
    w = Workload("vit_cls", 1, 4, 512, 512, 8, "a matrix of 1 MiB a head")
    stage = token_maps.Stage(w, rows.FORWARD, "cpu", layers=8)

    def peak(contestant):
        return memory.peak_beyond_results(partial(stage.call_and_warm_up, contestant), "cpu")

    assert peak(token_maps.stacked) > 8 * 4 * 2**20 > 4 * peak(token_maps.with_smattn)


def test_rows_become_a_report(tmp_path, monkeypatch):
    job = bench_job.Job("cpu", 0.01, "python -m bench.studies.token_maps")
    errors = token_maps.check("vit_cls", "reference", "cpu")
    quiet = [ms for direction in (rows.FORWARD, rows.BOTH) for ms in token_maps.measure(
        job, replace(STAGE, direction=direction), CONTESTANTS, "smattn/cpu", errors
    )]  # fmt: skip
    job.add_matmul(torch.float32, quiet)
    rows.write(job.rows, tmp_path / "a-token-maps.jsonl")
    text = token_maps.write_report(tmp_path / "a-token-maps.jsonl").read_text()
    assert [line.count("|") for line in text.splitlines() if "| smattn/cpu |" in line] == [7, 7]
    assert text.count("| stacked |") == 2 and "vit_cls 1 2 48 48 8" in text and "torch.mm, float32" in text


def test_the_table_of_the_readme_is_that_of_the_newest_committed_rows():
    newest = max(published("*-token-maps.jsonl"))
    assert token_maps.section(newest, "../../bench/results") in (ROOT / "examples" / "wsss" / "README.md").read_text()
