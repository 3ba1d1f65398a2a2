"""The benchmark times contestants in turn, measures memory exactly and reports every failure."""

from __future__ import annotations

import inspect
import io
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.measuring import clock, machine, measure, memory, peers, validate
from bench.measuring import job as bench_job
from bench.measuring.cell import bind
from bench.measuring.compile import compile_ahead
from bench.measuring.fits import why_not
from bench.reporting import report, rows
from bench.reporting.tables import duels
from smattn.testing import WORKLOADS, errors
from tests.support import bench_runs

pytestmark = pytest.mark.promise("benchmarks")
ROOT = Path(__file__).resolve().parents[2]
TINY, REFERENCE, tiny, refuses, job = bench_runs.TINY, bench_runs.REFERENCE, bench_runs.tiny, bench_runs.refuses, bench_runs.job
EAGER, COMPILED, SDPA, FLEX = peers.PEERS
PAIR = replace(tiny(), workload=bench_runs.TINY_PAIR, mask="bias")
SCRATCH = 64 * 2**20


def eager_with_scratch(query, key, value, mask, alpha):
    scratch = torch.ones(SCRATCH // 4)
    out = peers.eager(query, key, value, mask, alpha)
    return out + 0 * scratch[0]


def test_contestants_are_called_in_turn_until_their_budget_is_used():
    order: list[str] = []

    def call(name: str, seconds: float):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    samples = clock.time_interleaved({"slow": call("slow", 0.02), "fast": call("fast", 0.005)}, "cpu", 0.1)
    both = min(len(samples["slow"]), len(samples["fast"]))
    assert order[: 4 * both] == ["slow", "slow", "fast", "fast"] * both  # each finds the caches that its own call left
    assert set(order[4 * both :]) <= {"fast"}
    assert len(samples["slow"]) >= clock.SLOW_REPS and sum(samples["fast"]) >= 50
    assert min(samples["slow"]) >= 20 and 5 <= min(samples["fast"]) < 20


def test_a_timed_call_follows_others_of_its_own_for_some_milliseconds():
    began: list[float] = []

    def quick():
        began.append(time.perf_counter())
        time.sleep(0.001)

    samples = clock.time_interleaved({"quick": quick}, "cpu", 0.1)["quick"]
    assert len(began) > 2 * len(samples) and max(samples) < clock.WARM_MS
    assert 0.1 <= time.perf_counter() - began[0] < 0.2, "the untimed calls are part of the budget"


def test_a_slow_contestant_is_called_fewer_times_but_never_once():
    samples = clock.time_interleaved({"slow": lambda: time.sleep(0.02)}, "cpu", 0.001)
    assert len(samples["slow"]) == clock.SLOW_REPS


def test_timing_is_the_median_with_the_tenth_and_ninetieth_percentile():
    assert clock.timing([float(n) for n in range(11)]) == clock.Timing(5.0, 1.0, 9.0, 11)
    assert clock.timing([3.0]) == clock.Timing(3.0, 3.0, 3.0, 1)


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_bytes_given_and_returned_are_those_of_the_tensors(direction):
    cell = tiny(direction)
    case = cell.case()
    given = [*case.inputs().values()] + [case.dout] * (direction == rows.BOTH)
    returned = bind(peers.eager, case, direction)()
    assert cell.io_bytes == sum(tensor.nbytes for tensor in [*given, *returned])


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_extra_memory_finds_scratch_that_is_freed_within_the_call(direction):
    lean = memory.extra_bytes(EAGER, tiny(direction))
    fat = memory.extra_bytes(peers.Contestant("fat", eager_with_scratch), tiny(direction))
    assert abs(fat - lean - SCRATCH) < 2 * 2**20
    assert -(2**20) < lean < 4 * 2**20


def test_cold_caches_are_emptied_before_each_call_and_outside_its_time():
    order: list[str] = []

    def before():
        order.append("flush")
        time.sleep(0.02)

    samples = clock.time_interleaved({"call": lambda: order.append("call")}, "cpu", 0.1, before)["call"]
    assert order == ["flush", "call"] * len(samples)
    assert clock.MIN_REPS <= len(samples) <= 6  # the time of emptying the caches counts
    assert max(samples) < 20


def test_emptying_the_caches_reads_several_times_their_size():
    assert 2**18 <= clock.largest_cache("cpu") <= 2**31
    assert clock.cache_flush("cpu")().item() * 4 >= 4 * clock.largest_cache("cpu")


def test_extra_memory_of_a_call_that_fails_is_an_error_not_a_number():
    with pytest.raises(RuntimeError, match="no such kernel"):
        memory.extra_bytes(peers.Contestant("broken", refuses), tiny())


@pytest.mark.parametrize("peer", [EAGER, SDPA, FLEX], ids=lambda peer: peer.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cell", [tiny(), PAIR], ids=["a mask for all heads", "a bias for all rows"])
def test_peers_compute_the_same_thing(peer, cell):
    case = cell.case()
    direction = rows.FORWARD if peer.forward_only_on else rows.BOTH
    out, *grads = bind(peer.function, case, direction)()
    results = {"out": out} | {f"d{name}": g.view_as(case.inputs()[name]) for name, g in zip(case.inputs(), grads, strict=False)}
    assert len(results) == (1 if direction == rows.FORWARD else 1 + len(case.inputs()))
    for row in errors(results, case):
        assert row.within, str(row)


def test_a_peer_is_at_most_fifteen_lines():
    for peer in peers.PEERS:
        assert len(inspect.getsource(peer.function).splitlines()) <= 15


def test_every_cell_is_a_row_measured_or_with_the_reason_why_not(job):
    by_name = {(row.backend, row.direction): row for row in job.rows}
    assert len(by_name) == 2 * 4 + 1
    for direction in (rows.FORWARD, rows.BOTH):
        for name in ("smattn/reference", "eager"):
            row = by_name[name, direction]
            assert row.skipped is None and row.median_ms > 0 and row.p10 <= row.median_ms <= row.p90
            assert row.reps >= clock.SLOW_REPS and isinstance(row.extra_bytes, int)
        assert by_name["broken", direction].skipped == "no such kernel"
    assert by_name["forward only", rows.FORWARD].median_ms > 0
    assert by_name["forward only", rows.BOTH].skipped == "has no backward on a CPU"
    assert by_name["smattn/reference", rows.BOTH].flops == 3.5 * 4 * 2 * 5 * 40 * 8
    assert by_name["torch.mm", rows.FORWARD].median_ms > 0


def test_too_large_a_shape_is_left_out_with_the_reason():
    huge = replace(tiny(), workload=replace(TINY, Nq=10**6, Nk=10**6))
    assert "may need" in str(why_not(EAGER, huge))
    assert why_not(peers.ours("cpu"), huge) is None


def test_exactly_one_backend_of_smattn_is_the_default():
    default = bench_job.default_backend(tiny())
    assert default in bench_job.available_backends("cpu")
    assert "triton" not in bench_job.available_backends("cpu")


def test_a_cell_with_cold_caches_has_a_second_row_for_every_contestant_that_ran(tmp_path):
    job = bench_job.Job("cpu", 0.01, "python -m bench.run")
    measure.measure(job, [replace(tiny(), also_cold=True)], [REFERENCE, EAGER, peers.Contestant("broken", refuses)])
    timed = {(row.backend, row.cache) for row in job.rows if row.median_ms and row.workload == TINY.name}
    assert timed == {(name, cache) for name in ("smattn/reference", "eager") for cache in (rows.WARM, rows.COLD)}
    assert {row.cache for row in job.rows if row.backend == "broken"} == {rows.WARM}
    assert all((row.extra_bytes is None) == (row.cache == rows.COLD) for row in job.rows if row.median_ms and row.workload == TINY.name)
    rows.write(job.rows, tmp_path / "run.jsonl")
    text = report.write_report(tmp_path / "run.jsonl").read_text()
    assert text.count("hodor_infer float32 uniform, cold cache, forward+backward") == 1, "timed, but no second line on memory"


@pytest.mark.slow
@pytest.mark.parametrize("peer", [COMPILED, FLEX], ids=lambda peer: peer.name)
def test_what_a_cpu_compiled_ahead_is_not_compiled_again(peer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compile_ahead([tiny(rows.FORWARD)], [peer], lambda name, why: pytest.fail(why))
    libraries = set(tmp_path.rglob("*.so"))
    torch.compiler.reset()
    bind(peer.ready(), tiny().case(), rows.FORWARD)()
    assert libraries and set(tmp_path.rglob("*.so")) == libraries


@pytest.mark.skipif(not peers.cpu_kernels(), reason="there is no compiled extension here")
def test_a_run_says_which_cpu_kernels_ran_and_why(tmp_path):
    job = bench_job.Job("cpu", 0.01, "python -m bench.run")
    name, _, why = job.about["kernels"].partition(": ")
    assert name == peers.cpu_kernels()[0] and why
    measure.measure(job, [tiny(rows.FORWARD)], [EAGER])
    rows.write(job.rows, tmp_path / "run.jsonl")
    assert f"CPU kernels of smattn: {name}: {why}." in report.write_report(tmp_path / "run.jsonl").read_text()


@pytest.mark.skipif("avx2" not in peers.cpu_kernels(), reason="this processor has no AVX2")
def test_peers_are_held_to_the_instruction_set_that_is_forced():
    """A process that is told so says it of itself, and `bench.run --kernels avx2` becomes such a process."""
    asked = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    for name, capability in (("avx2", "AVX2"), ("baseline", "DEFAULT")):
        told = subprocess.run(asked, env=os.environ | machine.HELD_TO[name], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == capability
    command = [sys.executable, "-m", "bench.run", "--device", "cpu", "--kernels", "avx2", "--minutes", "0", "--compile", "only"]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert ", AVX2;" in done.stdout.splitlines()[0]


@pytest.mark.skipif(len(peers.cpu_kernels()) < 2, reason="one set of CPU kernels, or none: nothing to force")
def test_forced_cpu_kernels_are_validated_and_measured_under_their_name():
    name = peers.cpu_kernels()[-1]
    job = bench_job.Job("cpu", 0.01, "python -m bench.run", kernels=name)
    try:
        job.check(["cpu"], [tiny()])
        measure.measure(job, [tiny()], [peers.ours("cpu", name), EAGER])
    finally:
        peers.select_cpu_kernels(peers.cpu_kernels()[0])
    ours = job.rows[0]
    assert (ours.backend, ours.default, ours.ours) == (f"smattn/cpu ({name})", True, True)
    assert ours.kernels == f"{name}: it was asked for"
    assert ours.errors is not None and ours.errors["backend"] == ours.backend
    assert [duel.ours for duel in duels(job.rows).values()] == [ours]


def test_a_backend_is_not_timed_where_it_is_outside_the_budget_or_broken(job, monkeypatch):
    good = next(iter(job.validations.values()))
    bad = replace(good, tensors=good.tensors | {"dmask": good.tensors["dmask"] | {"within": False}})
    monkeypatch.setattr(bench_job, "validate", lambda *args: good)
    sound = bench_job.Job("cpu", 0.01, "")
    sound.check(["reference"], [tiny()])
    assert sound.verdict() is None

    def raises(*args):
        raise RuntimeError("no such kernel")

    for outcome, why in ((lambda *args: bad, "outside the error budget"), (raises, "RuntimeError: no such kernel")):
        monkeypatch.setattr(bench_job, "validate", outcome)
        wrong = bench_job.Job("cpu", 0.01, "")
        wrong.check(["reference"], [tiny()])
        measure.measure(wrong, [tiny()], [REFERENCE, EAGER])
        rows_of = {row.backend: row for row in wrong.rows}
        assert (rows_of["smattn/reference"].median_ms, rows_of["smattn/reference"].skipped) == (None, why)
        assert rows_of["eager"].median_ms is not None
        assert f"smattn/reference hodor_infer float32 uniform: {why}" in str(wrong.verdict())


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda w: w.name)
def test_validated_shapes_fit_and_keep_keys_and_head_size(workload):
    w = validate.fitting(workload)
    assert 1 <= math.prod(w.batch) * w.H * w.Nq * w.Nk <= validate.LARGEST["cpu"]
    assert (w.Nk, w.D) == (workload.Nk, workload.D)
    on_a_gpu = validate.fitting(workload, validate.LARGEST["cuda"])
    assert (on_a_gpu.H, on_a_gpu.Nq) == (workload.H, workload.Nq), "the kernel that is timed is the one that was checked"


def test_a_committed_result_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_job, "RESULTS", tmp_path)
    job = bench_job.Job("cpu", 0.01, "")
    first = job.path("part")
    assert job.path("part") == first, "no repository: the same name again"
    rows.write([], first)
    for command in (["init", "-q"], ["add", first.name]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    second = job.path("part")
    assert second.name == first.name.replace("-part.jsonl", "-part-2.jsonl")
    rows.write([], second)
    assert job.path("part") == second, "of the runs that nobody committed the last is kept"


def test_processors_that_go_by_one_name_are_told_apart(monkeypatch):
    about = "processor\t: 0\nmodel name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n"
    monkeypatch.setattr(machine, "open", lambda path: io.StringIO(about), raising=False)
    assert machine.describe_device("cpu").startswith("AMD EPYC (family 25, model 17), ")
