"""The benchmark measures what it says: time in turn, memory exactly, every failure reported; and every published figure comes from it."""

from __future__ import annotations

import inspect
import json
import subprocess
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.measuring import harness, measure, peers, validate
from bench.measuring import job as bench_job
from bench.reporting import readme_figures, report, rows
from bench.studies import brgemm, nk_sweep
from smattn.testing import WORKLOADS, Workload, errors

pytestmark = pytest.mark.promise("benchmarks")
ROOT = Path(__file__).resolve().parents[2]
TINY = Workload("hodor_infer", 1, 2, 5, 40, 8, "tiny")  # under a known name, so that what looks it up finds it
REFERENCE = peers.ours("reference")
EAGER, _, SDPA, FLEX = peers.PEERS
SCRATCH = 64 * 2**20


def tiny(direction: str = rows.BOTH) -> harness.Cell:
    return harness.Cell(TINY, "uniform", torch.float32, "cpu", direction)


def eager_with_scratch(query, key, value, mask, alpha):
    scratch = torch.ones(SCRATCH // 4)
    out = peers.eager(query, key, value, mask, alpha)
    return out + 0 * scratch[0]


def refuses(query, key, value, mask, alpha):
    raise RuntimeError("no such kernel\nand a long explanation")


def test_contestants_are_called_in_turn_until_their_budget_is_used():
    order: list[str] = []

    def call(name: str, seconds: float):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    samples = harness.time_interleaved({"slow": call("slow", 0.02), "fast": call("fast", 0.005)}, "cpu", 0.1)
    both = min(len(samples["slow"]), len(samples["fast"]))
    assert order[: 4 * both] == ["slow", "slow", "fast", "fast"] * both  # each with the caches that its own call left
    assert set(order[4 * both :]) <= {"fast"}
    assert len(samples["slow"]) >= harness.SLOW_REPS and sum(samples["fast"]) >= 50
    assert min(samples["slow"]) >= 20 and 5 <= min(samples["fast"]) < 20


def test_a_timed_call_follows_others_of_its_own_for_some_milliseconds():
    began: list[float] = []

    def quick():
        began.append(time.perf_counter())
        time.sleep(0.001)

    samples = harness.time_interleaved({"quick": quick}, "cpu", 0.1)["quick"]
    assert len(began) > 2 * len(samples) and max(samples) < harness.WARM_MS
    assert 0.1 <= time.perf_counter() - began[0] < 0.2, "the untimed calls are part of the budget"


def test_a_slow_contestant_is_called_fewer_times_but_never_once():
    samples = harness.time_interleaved({"slow": lambda: time.sleep(0.02)}, "cpu", 0.001)
    assert len(samples["slow"]) == harness.SLOW_REPS


def test_timing_is_the_median_with_the_tenth_and_ninetieth_percentile():
    assert harness.timing([float(n) for n in range(11)]) == harness.Timing(5.0, 1.0, 9.0, 11)
    assert harness.timing([3.0]) == harness.Timing(3.0, 3.0, 3.0, 1)


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_bytes_given_and_returned_are_those_of_the_tensors(direction):
    cell = tiny(direction)
    case = cell.case()
    given = [*case.inputs().values()] + [case.dout] * (direction == rows.BOTH)
    returned = harness.bind(peers.eager, case, direction)()
    assert cell.io_bytes == sum(tensor.nbytes for tensor in [*given, *returned])


@pytest.mark.parametrize("direction", [rows.FORWARD, rows.BOTH])
def test_extra_memory_finds_scratch_that_is_freed_within_the_call(direction):
    lean = harness.extra_bytes(EAGER, tiny(direction))
    fat = harness.extra_bytes(peers.Contestant("fat", eager_with_scratch), tiny(direction))
    assert abs(fat - lean - SCRATCH) < 2 * 2**20
    assert -(2**20) < lean < 4 * 2**20


def test_cold_caches_are_emptied_before_each_call_and_outside_its_time():
    order: list[str] = []

    def before():
        order.append("flush")
        time.sleep(0.02)

    samples = harness.time_interleaved({"call": lambda: order.append("call")}, "cpu", 0.1, before)["call"]
    assert order == ["flush", "call"] * len(samples)
    assert harness.MIN_REPS <= len(samples) <= 6  # what emptying takes is part of the budget
    assert max(samples) < 20


def test_emptying_the_caches_reads_several_times_their_size():
    assert 2**18 <= harness.largest_cache("cpu") <= 2**31
    assert harness.cache_flush("cpu")().item() * 4 >= 4 * harness.largest_cache("cpu")


def test_extra_memory_of_a_call_that_fails_is_an_error_not_a_number():
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.extra_bytes(peers.Contestant("broken", refuses), tiny())


@pytest.mark.parametrize("peer", [EAGER, SDPA, FLEX], ids=lambda peer: peer.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_compute_the_same_thing(peer):
    case = tiny().case()
    direction = rows.FORWARD if peer.forward_only_on else rows.BOTH
    out, *grads = harness.bind(peer.function, case, direction)()
    results = {"out": out} | {f"d{name}": g.view_as(case.inputs()[name]) for name, g in zip(case.inputs(), grads, strict=False)}
    assert len(results) == (1 if direction == rows.FORWARD else 6)
    for row in errors(results, case):
        assert row.within, str(row)


def test_a_peer_is_at_most_fifteen_lines():
    for peer in peers.PEERS:
        assert len(inspect.getsource(peer.function).splitlines()) <= 15


@pytest.fixture(scope="module")
def job() -> bench_job.Job:
    job = bench_job.Job("cpu", 0.01, "python -m bench.run")
    validation = validate.validate("reference", TINY, "uniform", torch.float32, "cpu")
    job.validations["smattn/reference", TINY.name, "uniform", torch.float32] = validation
    broken = peers.Contestant("broken", refuses)
    for direction in (rows.FORWARD, rows.BOTH):
        forward_only = replace(EAGER, name="forward only", forward_only_on=("cpu",))
        measure.measure(job, [tiny(direction)], [REFERENCE, EAGER, forward_only, broken])
    return job


def test_every_cell_is_a_row_measured_or_with_the_reason_why_not(job):
    by_name = {(row.backend, row.direction): row for row in job.rows}
    assert len(by_name) == 2 * 4 + 1
    for direction in (rows.FORWARD, rows.BOTH):
        for name in ("smattn/reference", "eager"):
            row = by_name[name, direction]
            assert row.skipped is None and row.median_ms > 0 and row.p10 <= row.median_ms <= row.p90
            assert row.reps >= harness.SLOW_REPS and isinstance(row.extra_bytes, int)
        assert by_name["broken", direction].skipped == "no such kernel"
    assert by_name["forward only", rows.FORWARD].median_ms > 0
    assert by_name["forward only", rows.BOTH].skipped == "has no backward on a CPU"
    assert by_name["smattn/reference", rows.BOTH].flops == 3.5 * 4 * 2 * 5 * 40 * 8
    assert by_name["torch.mm", rows.FORWARD].median_ms > 0


def test_too_large_a_shape_is_left_out_with_the_reason():
    huge = replace(tiny(), workload=replace(TINY, Nq=10**6, Nk=10**6))
    assert "may need" in str(measure.why_not(EAGER, huge))
    assert measure.why_not(peers.ours("cpu"), huge) is None


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
    assert ours.errors is not None and ours.errors["backend"] == ours.backend
    assert [duel.ours for duel in readme_figures.duels(job.rows).values()] == [ours]


def test_the_sweep_over_keys_becomes_a_plot_a_report_and_a_line_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(nk_sweep, "KEYS", (16, 64))
    monkeypatch.setattr(nk_sweep, "QUERIES", (2, 3))
    monkeypatch.setattr(readme_figures, "ROOT", tmp_path)
    job = bench_job.Job("cpu", 0.01, "python -m bench.studies.nk_sweep")
    name = bench_job.default_backend(tiny())
    measure.measure(job, nk_sweep.sweep("cpu", torch.float32), [peers.ours(name), EAGER])
    rows.write(job.rows, tmp_path / "bench/results/a-nk-sweep.jsonl")
    text = nk_sweep.write_report(tmp_path / "bench/results/a-nk-sweep.jsonl").read_text()
    assert "| nq3_nk64 float32 uniform, forward+backward" in text
    assert (tmp_path / "bench/results/a-nk-sweep.png").stat().st_size > 5000
    readme = "<!-- figures: begin -->\n<!-- figures: end -->\n"
    text = readme_figures.with_figures(readme, ["bench/results/a-nk-sweep.jsonl"])
    ours = next(row for row in job.rows if row.ours and row.shape[2:4] == (3, 64))
    assert f"3 queries and 64 keys: {ours.median_ms:.3g} ms" in text and "](bench/results/a-nk-sweep.png)" in text
    assert readme_figures.files_shown(text) == ["bench/results/a-nk-sweep.jsonl"]


def test_tiles_become_rows_and_a_table(tmp_path):
    job = bench_job.Job("cpu", 0.01, "python -m bench.studies.brgemm")
    for tile in brgemm.TILES:
        for name, taken in ((brgemm.PRODUCT, [2.0, 2.0]), (brgemm.BRGEMM, [3.0, 3.0])):
            job.rows.append(brgemm.row(job, tile, torch.float32, name, taken))
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


def test_rows_survive_the_file_and_become_a_report(job, tmp_path):
    path = tmp_path / "run.jsonl"
    rows.write(job.rows, path)
    assert rows.read(path) == [replace(row, errors=json.loads(json.dumps(row.errors))) for row in job.rows]
    text = report.write_report(path).read_text()
    assert "broken, hodor_infer float32 uniform, forward: no such kernel" in text
    assert "smattn/reference hodor_infer float32 uniform, 1 2 5 40 8" in text
    assert all((tmp_path / f"run-{what}.png").stat().st_size > 5000 for what in ("time", "memory"))
    path.write_text(path.read_text().replace('"reps"', '"repetitions"'))
    with pytest.raises(TypeError):
        rows.read(path)


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
    assert 1 <= w.B * w.H * w.Nq * w.Nk <= validate.LARGEST["cpu"]
    assert (w.Nk, w.D) == (workload.Nk, workload.D)
    on_a_gpu = validate.fitting(workload, validate.LARGEST["cuda"])
    assert (on_a_gpu.H, on_a_gpu.Nq) == (workload.H, workload.Nq), "the kernel that is timed is the one that was checked"


def committed_results() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "bench/results/*.jsonl"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split()]


def test_committed_results_have_the_row_form():
    for file in committed_results():
        table = rows.read(file)
        assert any(row.workload == rows.MATMUL for row in table), f"{file.name} has no calibration"
        for row in table:
            assert (row.median_ms is None) == (row.reps == 0), row
            assert row.median_ms is not None or row.skipped, row
            if row.ours and row.direction == rows.BOTH:
                assert row.errors is not None and all(tensor["within"] for tensor in row.errors["tensors"].values()), row
        assert file.with_suffix(".md").exists()


def test_the_figures_of_the_readme_come_from_a_committed_result_file():
    readme = (ROOT / "README.md").read_text()
    files = readme_figures.files_shown(readme)
    committed = set(committed_results())
    assert {ROOT / file for file in files} <= committed
    assert files or not committed, "a result file is committed, the README shows none: python -m bench.reporting.readme_figures FILE"
    assert readme_figures.with_figures(readme, files) == readme


def test_figures_replace_what_stands_between_the_markers(job, tmp_path, monkeypatch):
    monkeypatch.setattr(readme_figures, "ROOT", tmp_path)
    rows.write([replace(row, default=row.ours) for row in job.rows], tmp_path / "bench/results/one.jsonl")
    readme = "before\n<!-- figures: begin -->\nstale\n<!-- figures: end -->\nafter\n"
    text = readme_figures.with_figures(readme, ["bench/results/one.jsonl"])
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert readme_figures.files_shown(text) == ["bench/results/one.jsonl"]
    assert readme_figures.with_figures(text, readme_figures.files_shown(text)) == text
    row = next(row for row in job.rows if row.ours and row.direction == rows.FORWARD)
    assert f"| hodor_infer float32 uniform | {row.median_ms:.3g} |" in text.replace(" † |", " |")


def test_a_cell_measured_while_the_machine_was_busy_is_marked(job, tmp_path):
    def with_matmul(slow: tuple[str, ...]) -> list[rows.Row]:
        """The rows, had torch.mm taken 90 ms at its best, and twice that around the cells of these directions."""
        best = [replace(row, p10=90.0) if row.workload == rows.MATMUL else row for row in job.rows]
        return [replace(row, matmul_ms=row.matmul_ms and (180.0 if row.direction in slow else 90.0)) for row in best]

    busy = with_matmul((rows.BOTH,))
    assert report.disturbed(with_matmul(())) == set()
    assert {key.direction for key in report.disturbed(busy)} == {rows.BOTH}
    assert {key.direction for key in report.disturbed(with_matmul((rows.FORWARD, rows.BOTH)))} == {rows.FORWARD, rows.BOTH}
    rows.write(busy, tmp_path / "busy.jsonl")
    text = report.write_report(tmp_path / "busy.jsonl").read_text()
    assert "| hodor_infer float32 uniform, forward+backward † |" in text and "| hodor_infer float32 uniform, forward |" in text


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
