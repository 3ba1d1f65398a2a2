"""Every Triton kernel goes through the real compiler, in a process without TRITON_INTERPRET, inside its chip's shared memory."""

import csv
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise("Triton kernels")
ROWS = re.compile(
    r"^(\w+) +sm_(\d+) +(\w+) +D=(\d+) +Nq=(\d+) .* (\d+) regs +(\d+) spill .* (\d+) shared +(\d+) per SM *(.*)$", re.MULTILINE
)
# bytes a block may have: CUDA C++ programming guide, table of compute capabilities
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "triton-kernels.csv"
KERNELS = {"forward", "partial", "merge", "delta", "few_queries", "dkdv", "dq", "dmask"}
PASSES = {"forward", "dkdv", "dq", "dmask"}  # of many queries
MAP_KERNELS = {"map", "map_means", "map_rows"}

ONE_OF_EACH_REGIME = """
import json, torch
from smattn.kernels.tools import aot, jobs
calls = [jobs.Job(90, torch.float16, 64, Nq, jobs.FEATURES) for Nq in (13, 1045)]
rows = [row for call in calls for row in aot.compile_job(call)]
broken = {
    "shared": [row._replace(shared=2**20).failure() for row in rows],
    "spill": [row._replace(reading=row.reading._replace(spill_bytes=row.may_spill() + 8)).failure() for row in rows],
    "scalar": [row._replace(reading=row.reading._replace(instruction="")).failure() for row in rows],
    "pointers": [row._replace(reading=row.reading._replace(loads={"128": 1})).failure() for row in rows],
    "serial": [row._replace(groups=row.groups - 1).serialised() for row in rows],
    "twice": [row._replace(counts=row.counts._replace(loop=row.counts.loop._replace(exponentials=10**4))).failure() for row in rows],
}
kernels = [dict(kernel=row.kernel, shared=row.shared, products=row.products, failure=row.failure(), together=row.per_multiprocessor(),
                descriptors=row.descriptors, may_spill=row.may_spill(),
                **row.reading._asdict()) for row in rows]
print(json.dumps([kernels, broken]))
"""
SERIAL = """
        /*0100*/                   WARPGROUP.ARRIVE ;
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0120*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0150*/              @!P1 LDGSTS.E.BYPASS.128 [R3+0x100], desc[UR16][R24.64] ;
        /*0160*/                   LDG.E R4, desc[UR16][R26.64] ;
"""


def without_interpreter(*command, **more):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_one_of_each_regime_compiles():
    result = without_interpreter("-c", ONE_OF_EACH_REGIME)
    assert result.returncode == 0, result.stderr
    kernels, broken = json.loads(result.stdout)
    names = {kernel["kernel"] for kernel in kernels}
    assert {"forward", "partial", "merge", "delta"} < names and len(names) >= 7
    assert {kernel["instruction"] for kernel in kernels} == {"HGMMA", "HMMA", ""}
    by_descriptors = {kernel["kernel"] for kernel in kernels if kernel["descriptors"]}
    assert by_descriptors == {"dkdv", "dmask"}, "padding keeps forward and dq to pointers"
    for i, kernel in enumerate(kernels):
        assert kernel["failure"] == "" and kernel["shared"] <= SHARED_MEMORY[90] and kernel["registers"] > 0, kernel
        assert "128" in kernel["loads"] or not kernel["products"]
        assert 1 <= kernel["together"] <= 32 and kernel["together"] * kernel["shared"] <= 228 * 1024
        assert "1048576 bytes of shared memory" in broken["shared"][i]  # the checks can fail
        assert broken["spill"][i] == f"spills {kernel['may_spill'] + 8} bytes"
        assert broken["scalar"][i] == ("no tensor-core instruction" if kernel["products"] else "")
        assert broken["serial"][i] == (kernel["instruction"] == "HGMMA")
        assert ("exp2 a score" in broken["twice"][i]) == (kernel["kernel"] in PASSES)
        assert (kernel["loop"][0] > 0) == (kernel["products"]) or kernel["kernel"] not in PASSES
        assert kernel["descriptors"] == ("TMA" in kernel["loads"]) == (broken["pointers"][i] == "descriptors, and no load by TMA")


def test_machine_code_of_serialised_wgmma_is_read_as_such():
    machine_code = pytest.importorskip("smattn.kernels.tools.machine_code")
    assert machine_code.tensor_cores(SERIAL) == ("HGMMA", 1, 1, 2)
    pipelined = SERIAL.replace("R24, gsb0 ;\n", "R24 ;\n").replace("!UPT, gsb0", "!UPT").replace("        /*0120*/", "//")
    assert machine_code.tensor_cores(pipelined)[1:3] == (2, 2)
    assert machine_code.loads(SERIAL) == {"128": 1, "32": 1}


def test_it_refuses_to_run_under_the_interpreter():
    result = without_interpreter("-m", "smattn.kernels.tools.aot", TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize("words", ["--processes 0", "--every -1", "--every 1.5", "--table /none/table.csv"])
def test_wrong_options_are_refused_before_anything_is_compiled(words):
    result = without_interpreter("-m", "smattn.kernels.tools.aot", *words.split())
    assert result.returncode == 2 and words.split()[0] in result.stderr and "Traceback" not in result.stderr


def test_an_error_without_a_message_is_still_named():
    aot = pytest.importorskip("smattn.kernels.tools.aot")
    assert aot.last_line(AssertionError()) == "AssertionError: " and aot.last_line(ValueError("a\nb\n")) == "ValueError: b"


def test_the_table_in_the_results_is_of_the_present_kernels_and_tiles():
    from smattn.kernels.tools.jobs import SAMPLE, jobs, name_of, record
    from smattn.kernels.tools.sources import sources

    head, *lines = RESULTS.read_text().splitlines()
    assert re.fullmatch(r"# triton 3\.\d+\.\d+, kernels/\*\.py sha256 [0-9a-f]{16}", head)
    again = f"make it anew: python -m smattn.kernels.tools.aot --sample --table {RESULTS}"
    assert head.endswith(sources()), again
    compiled = {
        (row["kernel"], row["arch"], row["dtype"], row["D"], Nq, row["Nk"], row["variant"],
         *(row[column] for column in ("block_m", "block_n", "warps", "stages", "maxnreg")))
        for row in csv.DictReader(lines) for Nq in row["queries"].split()
    }  # fmt: skip
    launched = {
        (name_of(kernel), str(j.arch), str(j.dtype)[6:], str(j.D), str(j.Nq), str(j.Nk), j.variant.name,
         *("" if value is None else str(value) for value in tile[:5]))
        for j in jobs([80, 90, 100], SAMPLE) for kernel, _, tile in record(j)
    }  # fmt: skip
    assert compiled == launched, again


def test_what_a_table_is_of_changes_with_code_and_with_nothing_else(monkeypatch, tmp_path):
    sources = pytest.importorskip("smattn.kernels.tools.sources")
    (tmp_path / "tools").mkdir()
    found = []
    for name, text in (
        ("a.py", "x = 1\n\ny = 2\n"), ("a.py", "x = 1  # one\n# two\n\n\ny = 2\n"), ("tools/b.py", "x = 3\n"), ("tiles.csv", "1"),
        ("a.py", "x = 1\n\ny = 3\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(sources, "KERNELS", tmp_path)
        found.append(sources.sources())
    assert found[0] == found[1] == found[2] == found[3] != found[4]


def test_the_costs_of_odd_lengths_in_the_docs_are_those_of_the_table():
    costs = {}
    for row in csv.DictReader(RESULTS.read_text().splitlines()[1:]):
        if row["variant"] == "bfloat16 mask" and row["kernel"] in PASSES and row["dtype"] == "bfloat16":
            cost = max(int(row["issue"]) + int(row["tensor"] or 0), int(row["exp2"]), int(row["passes"]))
            costs[row["kernel"], row["arch"], row["D"], row["Nk"]] = cost
    lines = []
    for name, kernel in {"forward": "forward", "dQ": "dq", "dK and dV": "dkdv", "dM": "dmask"}.items():
        pairs = [(costs[kernel, arch, D, "1045"], costs[kernel, arch, D, "4096"]) for D in ("64", "128") for arch in ("80", "90")]
        lines.append(f"| {name} | " + " | ".join(f"{odd} / {even}, {odd / even:.2f}" for odd, even in pairs) + " |")
    assert "\n".join(lines) in (RESULTS.parents[2] / "docs" / "design" / "tiles.md").read_text(), "\n".join(lines)


def test_the_table_in_the_results_is_of_every_call_of_the_sample_and_without_a_failure():
    from smattn.kernels.tools.jobs import SAMPLE, jobs

    rows = list(csv.DictReader(RESULTS.read_text().splitlines()[1:]))
    compiled = {(row["arch"], row["dtype"], row["D"], row["Nk"], row["variant"], Nq) for row in rows for Nq in row["queries"].split()}
    sample = jobs([80, 90, 100], SAMPLE)
    assert compiled == {(str(j.arch), str(j.dtype)[6:], str(j.D), str(j.Nk), j.variant.name, str(j.Nq)) for j in sample}
    assert {row["kernel"] for row in rows} == KERNELS | MAP_KERNELS | {"reduce", "delta_sweep", "soft_mask"}
    assert all(row["failure"] == "" for row in rows)
    assert sum(int(row["spill_bytes"]) > 0 for row in rows) < len(rows) // 50, "what may spill a little is rare"
    assert all(int(row["shared"]) <= SHARED_MEMORY[int(row["arch"])] and int(row["per_sm"]) >= 1 for row in rows)
    # Of a mask per head, dM's pass has a single batch element and head, and no loop to count.
    passes = [row for row in rows if row["kernel"] in PASSES and "float16" in row["dtype"] and int(row["D"]) <= 128]
    passes = [row for row in passes if row["kernel"] != "dmask" or "mask per head" not in row["variant"]]
    assert all(int(row["issue"]) > 0 and float(row["exp2_a_score"]) < 1.3 for row in passes if "map" not in row["variant"])
    with_products = [row for row in rows if row["kernel"] in KERNELS - {"merge", "delta"}]
    assert all(row["instruction"] for row in with_products if row["dtype"] != "float32" or "tf32" in row["variant"])


def test_a_call_of_the_sample_that_a_chip_leaves_out_is_compiled_for_another():
    from smattn.kernels.tools.jobs import SAMPLE, jobs, one_of

    def without_the_chip(calls):
        return {job._replace(arch=0) for job in calls}

    sample = list(jobs([80, 90, 100], SAMPLE))
    third = one_of(3, sample)
    on_all = set.intersection(*(without_the_chip(job for job in sample if job.arch == arch) for arch in (80, 90, 100)))
    assert len(on_all) > 30 and on_all <= without_the_chip(third) and len(third) < len(sample) / 3 + 2
    assert set(one_of(1, sample)) == set(sample)


@pytest.mark.slow
def test_a_third_of_the_sample_compiles_and_has_every_kernel_on_every_chip():
    """In 16 bits and in float32. The table in the results is of all of it, which takes three times as long."""
    result = without_interpreter("-m", "smattn.kernels.tools.aot", "--sample", "--every", "3")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [match.groups() for match in ROWS.finditer(result.stdout)]
    counted = int(re.search(r"^(\d+) kernels compiled for sm_80, sm_90, sm_100, 0 failed$", result.stdout, re.MULTILINE)[1])
    assert len(rows) == counted
    over = [row for row in rows if int(row[7]) > SHARED_MEMORY[int(row[1])]]
    assert over == []
    compiled = {(kernel, arch, dtype.replace("bfloat", "float")) for kernel, arch, dtype, *_ in rows}
    missing = set(product(KERNELS, ("80", "90", "100"), ("float16", "float32"))) - compiled
    missing |= set(product(KERNELS, ("32", "64", "128", "256"))) - {(kernel, D) for kernel, _, _, D, *_ in rows}
    missing |= MAP_KERNELS - {kernel for kernel, *_ in rows}
    assert missing == set()
