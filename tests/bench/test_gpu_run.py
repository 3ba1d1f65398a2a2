"""A run of the benchmark on a GPU, tried without one: its timer, its rows, and the report of them."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from bench import run as bench_run
from bench.measuring import cell as bench_cell
from bench.measuring import clock, compile, fits, measure, peers
from bench.measuring import job as bench_job
from bench.measuring.cell import Cell, bind
from bench.measuring.worker import Lost
from bench.reporting import report, rows
from smattn.testing import WORKLOADS
from tests.support import bench_runs

pytestmark = pytest.mark.promise("benchmarks")

tiny, a_run = bench_runs.tiny_self, bench_runs.a_run


class Clock:
    """A device whose calls take a given time each, and which does nothing before it is asked."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now
                clock.log.append("record")

            def synchronize(self):
                clock.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)

    def call(self, name, ms):
        def run():
            self.now += ms
            self.log.append(name)

        return run


def test_a_cold_call_on_a_gpu_is_launched_behind_the_emptying_of_the_cache(monkeypatch):
    fake = Clock(monkeypatch)
    assert clock.once(fake.call("call", 0.25), "cuda", fake.call("flush", 7.0)) == 0.25
    assert fake.log == ["flush", "record", "call", "record", "wait"]


def test_a_warm_call_on_a_gpu_finds_it_idle(monkeypatch):
    fake = Clock(monkeypatch)
    samples = clock.time_interleaved({"call": fake.call("call", 2.0)}, "cuda", 1e-9)["call"]
    assert samples == [2.0] * clock.SLOW_REPS
    assert fake.log == ["record", "call", "record", "wait"] * 4 * clock.SLOW_REPS  # three of them are untimed, by WARM_MS


def test_a_graph_holds_several_calls_after_one_outside_it(monkeypatch):
    fake = Clock(monkeypatch)

    @contextmanager
    def captured(graph):
        fake.log.append("begin")
        yield
        fake.log.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fake.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="the replay"))
    monkeypatch.setattr(torch.cuda, "graph", captured)
    assert clock.in_graph(fake.call("call", 1.0)) == "the replay"
    assert fake.log == ["call", "wait", "begin", *["call"] * clock.GRAPH_CALLS, "end"]


def test_a_call_in_a_graph_is_one_of_those_captured(monkeypatch):
    def in_graph(call):
        if call is broken:
            raise RuntimeError("cannot be captured\nfor a reason")
        return lambda: [call() for _ in range(clock.GRAPH_CALLS)]

    fake = Clock(monkeypatch)
    broken = fake.call("broken", 1.0)
    monkeypatch.setattr(measure, "in_graph", in_graph)
    samples, refused = measure.time_in_graphs({"call": fake.call("call", 0.5), "broken": broken}, "cuda", 1e-9)
    assert set(samples) == {"call"} and set(samples["call"]) == {0.5}
    assert refused == {"broken": "cannot be captured"}


def chosen() -> list[Cell]:
    """The cells that `python -m bench.run --device cuda` measures."""
    args = argparse.Namespace(full=False, device="cuda", workloads=None, dtypes=None)
    return bench_run.chosen_cells(args, on_a_gpu=True)


def test_a_run_on_a_gpu_has_every_workload_mask_and_direction():
    cells = chosen()
    every = {(w.name, mask, direction) for w in WORKLOADS.values() for mask in w.masks for direction in (rows.FORWARD, rows.BOTH)}
    assert {(c.workload.name, c.mask, c.direction) for c in cells} == every
    assert {c.dtype for c in cells} == {torch.bfloat16} and len(cells) == len(every)
    assert {c.workload.name for c in cells if c.also_graph} == {"hodor_train", "hodor_infer"}
    assert {c.workload.name for c in cells if c.also_cold} >= {"video64k", "queries100", "hodor_train"}
    shapes = [(c.shape, c.direction) for c in cells if len(c.workload.masks) > 1]
    assert shapes[::2] == shapes[1::2], "the masks of a shape side by side: what is compiled for one serves the other"


def test_the_rows_of_a_run_are_in_its_file_and_become_a_report(a_run):
    found = rows.read(a_run.file)
    assert [replace(row, errors=None) for row in found] == [replace(row, errors=None) for row in a_run.rows]
    text = report.write_report(a_run.file).read_text()
    assert "torch.copy_, float32, 262144: " in text and "TB/s, read and written" in text and "torch.mm, bfloat16, 64 x 64 x 64" in text
    assert "| self1k forward+backward, against FlexAttention | at least 3 times | – | not yet run |" in text
    assert "| self1k forward+backward, against SDPA with the bias | at least 3 times | – |" not in text


def test_attention_without_a_mask_is_a_line_and_no_peer(a_run):
    price = [row for row in a_run.rows if row.backend == rows.UNMASKED]
    assert {row.direction for row in price} == {rows.FORWARD, rows.BOTH} and all(row.median_ms for row in price)
    quick = [replace(row, median_ms=1e-9, extra_bytes=0) if row.backend == rows.UNMASKED else row for row in a_run.rows]
    for duel in report.duels(quick).values():
        assert duel.fastest is not None and duel.fastest.backend in ("eager", "sdpa")
    case = tiny(rows.BOTH).case()
    assert len(bind(peers.WITHOUT_MASK.function, case, rows.BOTH, peers.WITHOUT_MASK.gradients)()) == 1 + 3


def test_the_rows_so_far_survive_when_the_process_dies(tmp_path, monkeypatch, a_run):
    path = tmp_path / "run.jsonl"
    rows.write(a_run.rows[:2], path)
    monkeypatch.setattr(rows.json, "dumps", lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rows.write(a_run.rows, path)
    assert rows.read(path) == a_run.rows[:2]


def test_what_was_measured_before_a_signal_is_kept_and_calibrated(monkeypatch, tmp_path):
    measured = measure.measure_cell

    def stopped(job, cell, contestants):
        if cell.mask == "blob":
            raise KeyboardInterrupt
        return measured(job, cell, contestants)

    job = bench_job.Job("cpu", 0.01, "")
    job.file = tmp_path / "run.jsonl"
    monkeypatch.setattr(measure, "measure_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(job, [tiny(rows.FORWARD), tiny(rows.FORWARD, "blob")], [peers.ours("cpu")])
    assert [row.workload for row in rows.read(job.file)] == ["self1k", rows.MATMUL]


def test_memory_that_torch_holds_for_later_is_free(monkeypatch):
    cell = replace(tiny(rows.BOTH), device="cuda")
    needed = cell.score_bytes
    for name, held in (("mem_get_info", (needed - 1, 0)), ("memory_reserved", 100), ("memory_allocated", 90)):
        monkeypatch.setattr(torch.cuda, name, lambda held=held: held)
    assert fits.why_not(peers.PEERS[0], cell) is None
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    assert "may need" in str(fits.why_not(peers.PEERS[0], cell))


def test_what_no_time_was_left_for_is_a_row_that_says_so():
    job = bench_job.Job("cpu", 0.01, "")
    measure.measure(job, [tiny(rows.BOTH)], [peers.ours("cpu")], until=time.monotonic() - 1)
    assert [(row.backend, row.median_ms, row.skipped) for row in job.rows] == [("smattn/cpu", None, "no time was left")]


class Inside:
    """A Worker whose calls run in this process."""

    def __init__(self, silence=0.0):
        pass

    def __enter__(self):
        return lambda function, *args: function(*args)

    def __exit__(self, *exception):
        pass


def test_what_is_compiled_ahead_is_run_once_a_shape(monkeypatch, capsys):
    done = []

    def compiled(contestant, cell, threads):
        done.append((contestant.name, cell.shape, cell.direction))
        if contestant.name == "flex":
            raise RuntimeError("no such kernel" if cell.direction == rows.BOTH else "CUDA out of memory")
        if contestant.name == "compiled":
            raise Lost("compiled", "nothing was heard of it")

    monkeypatch.setattr(compile, "Worker", Inside)
    monkeypatch.setattr(compile, "_compile", compiled)
    cells = [tiny(direction, mask) for direction in (rows.FORWARD, rows.BOTH) for mask in ("uniform", "blob")]
    contestants = [peers.ours("cpu"), *peers.PEERS, peers.WITHOUT_MASK]  # of which nothing of smattn's compiles on a CPU
    failed = {}
    compile.compile_ahead(cells, contestants, failed.__setitem__)
    each = product(("compiled", "flex"), [tiny(rows.BOTH).shape], (rows.FORWARD, rows.BOTH))
    assert sorted(done) == sorted(each) and done[0][2] == rows.BOTH, "the longest first"
    printed = "flex, self1k bfloat16, forward+backward: no such kernel"
    assert printed in capsys.readouterr().out and [": ".join(one) for one in failed.items()] == [printed]
    job = bench_job.Job("cpu", 0.01, "", not_compiled=failed)
    refused = {(peer.name, cell.direction) for peer, cell in product(contestants, cells) if job.refusal(peer.name, cell)}
    assert refused == {("flex", rows.BOTH)} and job.verdict() is None
    compile.compile_ahead(cells, contestants, failed.__setitem__, until=time.monotonic() - 1)
    assert len(done) == 4


def test_what_cannot_be_compiled_is_known_to_the_run_that_compiles_nothing(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(bench_run, "NOT_COMPILED", tmp_path / "build" / "not-compiled.json")

    def compile_ahead(cells, contestants, cannot, until):
        limits.append(until)
        cannot("flex, self1k", "why")
        if until == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "compile_ahead", compile_ahead)
    args = argparse.Namespace(compile="not", minutes=10.0)
    assert bench_run.compiled(args, [], [], 0.0, "here") == {} and limits == []
    for args.compile in ("only", "first", "not"):
        assert bench_run.compiled(args, [], [], 0.0, "here") == {"flex, self1k": "why"}
    assert limits == [600.0, 600.0 * bench_run.COMPILING]
    assert bench_run.compiled(args, [], [], 0.0, "another machine") == {}
    stopped = argparse.Namespace(compile="only", minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        bench_run.compiled(stopped, [], [], 0.0, "a third")
    assert bench_run.compiled(args, [], [], 0.0, "a third") == {"flex, self1k": "why"}


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_what_is_compiled_ahead_has_the_form_of_what_is_timed(direction):
    blank, case = tiny(direction).blank(), tiny(direction).case()
    assert blank.mask.dtype == torch.bfloat16 and bind(peers.eager, blank, direction)()
    for name in ("dout", *case.inputs()):
        one, other = getattr(blank, name), getattr(case, name)
        assert (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device), name


def test_the_tensors_of_a_shape_are_drawn_once_for_each_mask(monkeypatch):
    drawn, workload_case = [], bench_cell.workload_case
    monkeypatch.setattr(bench_cell, "workload_case", lambda *args, **more: drawn.append(args) or workload_case(*args, **more))
    bench_cell._case.cache_clear()
    bench_cell._outline.cache_clear()
    job = bench_job.Job("cpu", 0.01, "")
    for direction, mask in product((rows.FORWARD, rows.BOTH), ("uniform", "blob")):
        cell = tiny(direction, mask)
        cell.case()
        job.add(cell, "smattn/cpu")
    assert len(drawn) == 2 + 2, "and once more for its outline, without numbers"


def dies(query, key, value, mask, alpha):
    os._exit(3)


def test_a_contestant_that_takes_its_process_down_is_left_out_and_the_others_are_measured():
    job = bench_job.Job("cpu", 0.01, "")
    with measure.Worker() as worker:
        contestants = [peers.ours("cpu"), peers.Contestant("smattn/bad", dies), peers.PEERS[0]]
        measure.cell_of(job, tiny(rows.BOTH), contestants, worker, time.monotonic() + 100)
    found = {row.backend: row for row in job.rows}
    assert found["smattn/cpu"].median_ms and found["eager"].median_ms
    assert found["smattn/bad"].skipped == "it took its process down: its process ended with exit code 3"
    assert "smattn/bad self1k bfloat16 uniform: it took its process down" in str(job.verdict())


def test_the_check_on_a_gpu_is_in_a_process_of_its_own_and_goes_on_after_a_failure(monkeypatch):
    monkeypatch.setattr(bench_job, "on_a_gpu", lambda device: True)
    monkeypatch.setattr(bench_job, "describe_device", lambda device: "a made-up GPU")
    job = bench_job.Job("cpu", 0.01, "")
    job.check(["no-such", "cpu"], [tiny(rows.BOTH)])
    assert job.refusal("smattn/cpu", tiny(rows.BOTH)) is None and len(job.validations) == 1
    assert str(job.refusal("smattn/no-such", tiny(rows.BOTH))).startswith("ValueError: backend")


def test_a_cell_whose_process_is_lost_for_no_known_reason_has_rows_that_say_so():
    def call(function, *args):
        raise measure.Lost("timing", "nothing was heard of it for 150 s")

    job = bench_job.Job("cpu", 0.01, "")
    assert measure.cell_of(job, tiny(rows.BOTH), [peers.ours("cpu"), peers.PEERS[0]], call, time.monotonic() + 100) == []
    assert [row.skipped for row in job.rows] == ["nothing was heard of it for 150 s"] * 2
