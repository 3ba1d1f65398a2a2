"""The benchmark measures what it says: time in turn, memory exactly, every failure reported; and every published figure comes from it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import harness  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import readme_figures  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
import run as bench_run  # noqa: E402
import validate  # noqa: E402

from smattn.testing import WORKLOADS, Workload, errors  # noqa: E402

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
    assert order[: 2 * both] == ["slow", "fast"] * both
    assert set(order[2 * both :]) <= {"fast"}
    assert len(samples["slow"]) >= harness.SLOW_REPS and sum(samples["fast"]) >= 100
    assert min(samples["slow"]) >= 20 and 5 <= min(samples["fast"]) < 20


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
def job() -> measure.Job:
    job = measure.Job("cpu", 0.01, "python bench/run.py")
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
    default = measure.default_backend(tiny())
    assert default in measure.backends_to_time("cpu")
    assert "triton" not in measure.backends_to_time("cpu")


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


def test_nothing_is_timed_when_a_backend_is_outside_the_budget(job, monkeypatch):
    good = next(iter(job.validations.values()))
    bad = replace(good, tensors=good.tensors | {"dmask": good.tensors["dmask"] | {"within": False}})
    monkeypatch.setattr(bench_run, "interpreted_triton", lambda names: "not now")
    monkeypatch.setattr(bench_run, "validate", lambda *args: good)
    bench_run.check(measure.Job("cpu", 0.01, ""), ["reference"], [tiny()])
    monkeypatch.setattr(bench_run, "validate", lambda *args: bad)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench_run.check(measure.Job("cpu", 0.01, ""), ["reference"], [tiny()])


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda w: w.name)
def test_validated_shapes_fit_and_keep_keys_and_head_size(workload):
    w = validate.fitting(workload)
    assert 1 <= w.B * w.H * w.Nq * w.Nk <= validate.LARGEST
    assert (w.Nk, w.D) == (workload.Nk, workload.D)


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
    assert files or not committed, "a result file is committed, the README shows none: python bench/readme_figures.py FILE"
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
    quiet = [replace(row, matmul_ms=row.matmul_ms and 90.0) for row in job.rows]
    busy = [replace(row, matmul_ms=row.matmul_ms and (180.0 if row.direction == rows.BOTH else 90.0)) for row in job.rows]
    assert report.disturbed(quiet) == set()
    assert {key[3] for key in report.disturbed(busy)} == {rows.BOTH}
    rows.write(busy, tmp_path / "busy.jsonl")
    text = report.write_report(tmp_path / "busy.jsonl").read_text()
    assert "| hodor_infer float32 uniform, forward+backward † |" in text and "| hodor_infer float32 uniform, forward |" in text
