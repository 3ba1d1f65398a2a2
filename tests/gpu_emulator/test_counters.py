"""What the kernels execute beside what they have to: tensor operations, exponentials and loads."""

import pickle
from collections import Counter
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from smattn.kernels.tiles import Tile
from smattn.kernels.tools.sources import sources
from smattn.testing import assert_within_budget, make_case, run
from tests.gpu_emulator import emulate
from tests.gpu_emulator.compile import launch
from tests.gpu_emulator.counters import Counts
from tests.gpu_emulator.emulate import HEAD, Key, Total, add_up, rows, text
from tests.support.emulated_triton import ROWS, backend

pytestmark = pytest.mark.promise("compiled code")


@triton.jit
def copy_kernel(from_ptr, to_ptr, N, BLOCK: tl.constexpr):
    """Where N is no multiple of 16, the compiler does not know that neighbours are loaded together, though from_ptr is aligned."""
    at = tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < N, other=0))


@pytest.mark.parametrize("arch", backend.CHIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_loads_of_single_elements_are_told_from_those_of_16_bytes(dtype, arch):
    for N, width in ((1024, 16), (1023, dtype.itemsize)):
        counts = Counts(detailed=True)
        x, out = torch.randn(1024).to(dtype), torch.zeros(1024, dtype=dtype)
        launch(copy_kernel, 1, dict(from_ptr=x, to_ptr=out, N=N, BLOCK=1024), Tile(1, 1, warps=4, stages=1), arch, {}, counts)
        assert torch.equal(out[:N], x[:N]) and not out[N:].any()
        assert counts.widths == {("from_ptr", width): 1024 * dtype.itemsize // (32 * width)}
        assert counts.bytes_a_thread("from_ptr") == width


def test_rows_are_named_as_in_the_compilers_table():
    lines = (emulate.RESULTS.parent / "triton-kernels.csv").read_text().splitlines()
    compiled = next(line for line in lines if not line.startswith("#")).split(",")
    assert {"kernel", "arch", "D", "block_m", "block_n", "warps"} <= set(HEAD) & set(compiled)


def test_a_run_that_was_stopped_goes_on_and_says_what_did_not_run(monkeypatch, tmp_path):
    """Time passes once for each specialisation, of ten problems."""
    ran, progress, kept = [], emulate.Progress(), tmp_path / "kept"
    clock = count()
    monkeypatch.setattr(emulate, "install", lambda *archs: ROWS)
    monkeypatch.setattr(emulate, "check", lambda drawn, case, name, row: ran.append(case.rng))
    monkeypatch.setattr(emulate, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(emulate, "shutil", SimpleNamespace(which=lambda name: None))
    emulate.run(progress, seed=3, count=40, until=1, kept=kept)
    assert progress.problems == 20 == len(ran)
    progress = pickle.loads(kept.read_bytes())
    emulate.run(progress, seed=3, count=40, until=float("inf"), kept=kept)
    assert progress.problems == 40 and ran == [case.rng for _, case in islice(emulate.problems(3), 40)]
    assert not kept.exists() and progress.summary(3).endswith("0 failed; no CUDA C++ kernel ran, since there is no nvcc here")


def test_what_failed_is_tried_again_and_counted_once(monkeypatch, tmp_path):
    ran, progress, kept = [], emulate.Progress(), tmp_path / "kept"

    def check(drawn, case, name, row):
        ran.append(case.rng)
        assert len(ran) not in (3, 25)

    monkeypatch.setattr(emulate, "install", lambda *archs: ROWS)
    monkeypatch.setattr(emulate, "check", check)
    monkeypatch.setattr(emulate, "shutil", SimpleNamespace(which=lambda name: None))
    emulate.run(progress, seed=3, count=20, until=float("inf"), kept=kept)
    assert [number for number, _ in progress.failures] == [2] and ", 1 failed" in progress.summary(3)
    progress = pickle.loads(kept.read_bytes())
    emulate.run(progress, seed=3, count=20, until=float("inf"), kept=kept)
    assert ran[20:] == [ran[2]] and progress.problems == 20 == sum(progress.ran[f"sm_{arch}"] for arch in backend.CHIPS)
    assert not progress.failures and not kept.exists()


@pytest.mark.slow
@pytest.mark.parametrize("arch", backend.CHIPS)
def test_tensor_operations_executed_over_needed(arch, capsys):
    """Sizes that fill every tile, so that what is above 1 is computed more than once. The masks are aligned, and a thread loads 16 bytes of
    them at a time. What it loads by less, down to element by element, is printed."""
    totals: dict[Key, Total] = {}
    row = ROWS[arch]
    row.detailed = True
    try:
        for D, mask_dtype in ((64, torch.float16), (128, torch.float32)):
            row.counts.clear()
            case = make_case(1, 1, 256, 128, D, dtype=torch.float16, mask_dtype=mask_dtype)
            assert_within_budget(run(case, backend.name_of(arch)), case)
            add_up(totals, arch, row.counts)
    finally:
        row.detailed = False
    with capsys.disabled():
        print("\n" + text(totals))
        for key, total in sorted(totals.items()):
            widths = total.counts.widths
            narrow = ", ".join(f"{number} of {name} by {width} bytes" for (name, width), number in widths.items() if width < 16)
            print(f"{key.kernel}, D {key.D}, of {widths.total()} loads: {narrow}")
    table = {key: dict(zip(HEAD, line, strict=True)) for key, line in zip(sorted(totals), rows(totals), strict=True)}
    assert {key.kernel for key in table} == {"forward", "dkdv", "dq", "dmask"}
    assert all(1 <= float(line["flops_over_needed"]) <= 1.13 for line in table.values()), "dM has one of zeros, the forward one with ones"
    assert all(2 <= float(line["bytes_a_load"]) <= 512 for line in table.values())
    assert {line["mask_bytes_a_thread"] for line in table.values()} == {"16.00"}


def test_products_that_gradients_need():
    """q k, and dO v but for dV alone, and one for each that is a product itself. A launch without tensor cores does not count."""
    wanted = {("DV",): 64 + 32, ("DK",): 64 + 32 + 64, ("DK", "DV"): 64 + 32 + 64 + 32, ("DMASK",): 64 + 32, ("DQ", "DALPHA"): 64 + 32 + 64}
    for names, columns in wanted.items():
        assert emulate.products({"D": 64, "DV": 32, "NEED_DMASK": False, **{f"NEED_{name}": True for name in names}}, "dkdv") == columns
    totals, arguments = {}, {"q_ptr": torch.empty(1, 1, 64, 64), "Nk": 64, "D": 64, "NEED_DQ": True}
    with_products = Counter({"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": 64 * 64 * 2 * 64 // (16 * 8 * 8)})
    launches = [("dq", Tile(64, 64, 4, 1), arguments, Counts(opcodes=opcodes)) for opcodes in (Counter(), with_products)]
    add_up(totals, 80, launches)
    (line,) = rows(totals)
    assert dict(zip(HEAD, line, strict=True))["flops_over_needed"] == "1.00"


@pytest.mark.parametrize("minutes", [0, 1])
def test_only_a_run_that_came_to_its_end_is_written(minutes, monkeypatch, tmp_path, capsys):
    def run(progress, seed, count, until, kept):
        progress.problems = count if minutes else 10

    monkeypatch.setattr(emulate, "run", run)
    monkeypatch.setattr(emulate, "CACHE", tmp_path)
    monkeypatch.setattr(emulate, "RESULTS", tmp_path / "bench" / "results" / "table.csv")
    monkeypatch.setattr(emulate, "ROOT", tmp_path)
    monkeypatch.setattr(emulate, "of_what_runs", lambda: "")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert emulate.main(["--problems", "20", "--minutes", str(minutes), "--write"]) == (0 if minutes else 1)
    assert emulate.RESULTS.exists() == bool(minutes)
    assert ("stopped before problem 10 of 20: " in capsys.readouterr().out) == (not minutes)


def test_the_committed_run_is_of_these_kernels():
    """`make emulate PROBLEMS=1000 EMULATE=--write` makes the table again, in some ten minutes."""
    table = emulate.RESULTS.read_text()
    assert f"kernels/*.py sha256 {sources()}\n" in table and "1000 problems" in table and " 0 failed" in table


def test_a_table_may_have_tiles_that_differ_in_registers_alone():
    tiles = (Tile(64, 64, 4, 1, 128), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1, 96))
    assert len(rows({Key("forward", 80, 2, 64, tile): Total() for tile in tiles})) == 3
