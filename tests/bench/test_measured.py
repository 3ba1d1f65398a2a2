"""Reports, docs/measured.md and the six rows of README.md show what is in committed result files, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.measuring.machine import published
from bench.reporting import measured, readme_figures, report, rows
from tests.support import bench_runs

pytestmark = pytest.mark.promise("benchmarks")

ROOT = Path(__file__).resolve().parents[2]
job, a_run = bench_runs.job, bench_runs.a_run


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


def test_committed_results_have_the_row_form():
    for file in published("*.jsonl"):
        table = rows.read(file)
        assert any(row.workload == rows.MATMUL for row in table), f"{file.name} has no calibration"
        for row in table:
            assert (row.median_ms is None) == (row.reps == 0), row
            assert row.median_ms is not None or row.skipped, row
            if row.ours and row.direction == rows.BOTH:
                assert row.errors is not None and all(tensor["within"] for tensor in row.errors["tensors"].values()), row
        assert file.with_suffix(".md").exists()


def test_the_figures_of_the_page_come_from_committed_result_files():
    page, committed_files = measured.PAGE.read_text(), set(published("*.jsonl"))
    cpu_files, gpu_files = measured.files_shown(page), measured.files_shown(page, measured.GPU)
    assert {ROOT / file for file in [*cpu_files, *gpu_files]} <= committed_files
    assert cpu_files or not committed_files, "a result file is committed, the page shows none: python -m bench.reporting.measured FILE"
    assert [measured.is_on_a_gpu(file) for file in [*cpu_files, *gpu_files]] == [False] * len(cpu_files) + [True] * len(gpu_files)
    assert measured.with_gpu_figures(measured.with_figures(page, cpu_files), gpu_files) == page


def test_the_readme_has_the_machine_that_ran_last(monkeypatch):
    monkeypatch.setattr(measured, "machine", lambda file: file[-7])
    monkeypatch.setattr(measured, "kernels_are_forced", lambda file: "-forced" in file)
    runs = [f"bench/results/2026-11-{run}.jsonl" for run in ("21-a", "29-b", "20-b", "28-a")]
    assert measured.of_the_newest(runs) == runs[1:3] and measured.of_the_newest([]) == []
    on_one_day = [f"bench/results/2026-11-{run}.jsonl" for run in ("29-a", "29-b", "29-a")]
    assert measured.of_the_newest(on_one_day[:2]) == on_one_day[1:2], "the one that stands last on the page"
    forced = "bench/results/2026-11-30-forced-c.jsonl"  # whose figures the README does not show
    assert measured.of_the_newest([*runs, forced]) == runs[1:3]


def test_the_rows_of_the_readme_come_from_committed_result_files():
    readme = (ROOT / "README.md").read_text()
    files = readme_figures.files_shown(readme)
    shown = measured.files_shown(measured.PAGE.read_text()) + measured.files_shown(measured.PAGE.read_text(), measured.GPU)
    assert files and set(files) <= set(shown) and {ROOT / file for file in files} <= set(published("*.jsonl"))
    assert len({measured.machine(file) for file in files}) == 1
    text = readme_figures.with_readme_figures(readme, files)
    assert text == readme and "[All figures](docs/measured.md)" in text
    block = readme_figures.BLOCK.search(text)[0]
    assert block.count("\n| ") == 1 + readme_figures.ROWS and measured.machine(files[0]) in block


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes rows to a result file that both pages find, of a machine of any name."""
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    monkeypatch.setattr(readme_figures, "ROOT", tmp_path)

    def write(table: list[rows.Row], name: str, device: str = "a machine") -> str:
        rows.write([replace(row, default=row.ours, device=device) for row in table], tmp_path / "bench/results" / name)
        return f"bench/results/{name}"

    return write


PAGE = """before
<!-- figures: begin -->
stale
<!-- figures: end -->
<!-- gpu figures: begin -->
old
<!-- gpu figures: end -->
after
"""


def test_figures_replace_what_stands_between_the_markers(job, results):
    file = results(job.rows, "one.jsonl")
    text = measured.with_figures(PAGE, [file])
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text and "\nold\n" in text
    assert measured.files_shown(text) == [file] and measured.files_shown(text, measured.GPU) == []
    assert measured.with_figures(text, measured.files_shown(text)) == text
    row = next(row for row in job.rows if row.ours and row.direction == rows.FORWARD)
    assert f"| hodor_infer float32 uniform | {row.median_ms:.3g} |" in text.replace(" † |", " |")


def test_machines_stand_side_by_side_and_a_new_run_replaces_those_of_its_machine(job, results):
    amd, amd_16, intel, amd_new = (results(job.rows, f"{name}.jsonl", name[:3]) for name in ("amd", "amd-16", "int", "amd-new"))
    assert measured.to_show([amd, amd_16], [intel]) == [amd, amd_16, intel]
    assert measured.to_show([amd, amd_16, intel], [amd_new]) == [amd_new, intel]
    assert measured.to_show([amd, intel], []) == [amd, intel]
    text = measured.with_figures(PAGE, [amd, amd_16, intel])
    assert text.index("### amd") < text.index("### int") and text.count("### ") == 2


def test_the_readme_has_the_first_rows_of_runs_whose_kernels_are_not_forced(job, results):
    forced = [replace(row, backend="smattn/cpu (avx2)") if row.ours else row for row in job.rows]
    files = [results(forced, "forced.jsonl"), results(job.rows, "one.jsonl")]
    text = readme_figures.with_readme_figures(PAGE, files)
    assert "stale" not in text and readme_figures.files_shown(text) == files[1:] and "a machine: medians of smattn/reference" in text
    row = next(row for row in job.rows if row.ours and row.direction == rows.FORWARD)
    assert f"| hodor_infer, float32 | {row.median_ms:.3g} |" in text.replace(" † |", " |")


def test_the_page_has_a_line_or_the_table_of_a_run_on_a_gpu(a_run, results):
    assert measured.NO_GPU in measured.with_gpu_figures(PAGE, []) and "no run" in measured.NO_GPU.lower()
    file = results(a_run.rows, "one.jsonl")
    text = measured.with_gpu_figures(PAGE, [file])
    assert measured.is_on_a_gpu(file) and "\nstale\n" in text and "\nold\n" not in text
    assert "| self1k bfloat16 blob" in text and "| not yet run |" in text
    assert measured.files_shown(text, measured.GPU) == [file] and measured.files_shown(text) == []
    assert measured.with_gpu_figures(text, [file]) == text
