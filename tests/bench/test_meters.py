"""What stands in a row is what it says: the caches' state, the same work for all, and memory beyond inputs and results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.measuring import job as bench_job
from bench.measuring import measure, memory, peers
from bench.measuring.cell import bind
from bench.reporting import rows
from smattn.testing import errors
from tests.support import bench_runs
from tests.support.bench_runs import REFERENCE, tiny

pytestmark = pytest.mark.promise("benchmarks")
EAGER, SDPA = peers.PEERS[0], peers.PEERS[2]
PAIR = replace(tiny(), workload=bench_runs.TINY_PAIR, mask="bias")
WINDOWS = replace(PAIR, workload=replace(bench_runs.TINY_PAIR, B=2))


def without_mask(query, key, value, mask, alpha):
    return peers.eager(query, key, value, 0 * mask, alpha)


def on_two_threads(query, key, value, mask, alpha):
    if torch.get_num_threads() != 2:
        raise RuntimeError(f"{torch.get_num_threads()} threads")
    return peers.eager(query, key, value, mask, alpha)


def test_a_cold_call_is_timed_behind_the_emptying_of_the_caches(monkeypatch):
    asked = []

    def timed(calls, device, seconds, before=None):
        asked.append((sorted(calls), before))
        return {name: [1.0] * 3 for name in calls}

    monkeypatch.setattr(measure, "cache_flush", lambda device: "the emptying")
    monkeypatch.setattr(measure, "time_interleaved", timed)
    monkeypatch.setattr(measure, "extra_bytes", lambda *arguments: 0)
    measure.measure_cell(bench_job.Job("cpu", 0.01, ""), replace(tiny(), also_cold=True), [REFERENCE])
    assert [before for names, before in asked if names != ["mm"]] == [None, "the emptying"]


def test_every_contestant_is_asked_for_the_same_gradients():
    calls, refused = measure.bound(bench_job.Job("cpu", 0.01, ""), tiny(), [REFERENCE, EAGER, SDPA])
    assert not refused and {len(call()) for call in calls.values()} == {6}


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_a_peer_that_computes_something_else_is_not_timed(direction):
    wrong = peers.Contestant("wrong", without_mask)
    calls, refused = measure.bound(bench_job.Job("cpu", 0.01, ""), tiny(direction), [REFERENCE, EAGER, wrong])
    assert list(calls) == [REFERENCE.name, "eager"] and refused == {"wrong": "its results are not those of smattn/reference"}


def test_the_meter_of_a_gpu_leaves_out_what_was_there_and_what_is_returned(monkeypatch):
    answers = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 1000, "max_memory_allocated": 1500}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    assert memory.peak_beyond_results(lambda: (lambda: (torch.ones(25),), None), "cuda") == 1500 - 1000 - 100


def test_memory_is_measured_with_as_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert memory.extra_bytes(peers.Contestant("threads", on_two_threads), tiny()) is not None
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [tiny(), PAIR, WINDOWS], ids=["mask", "bias", "bias of each group"])
@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if peer.compiled], ids=lambda peer: peer.name)
def test_what_is_compiled_computes_the_same(peer, cell):
    torch.compiler.reset()
    case = cell.case()
    out, *grads = bind(peer.ready(), case, rows.FORWARD if peer.forward_only_on else rows.BOTH)()
    results = {"out": out} | {f"d{name}": grad.view_as(case.inputs()[name]) for name, grad in zip(case.inputs(), grads, strict=False)}
    assert all(row.within for row in errors(results, case))
