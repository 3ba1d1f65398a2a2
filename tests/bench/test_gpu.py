"""`make gpu` on a machine without a GPU: what it would run, and what it makes of the outcomes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import run as gpu
from bench.gpu import sanitized
from smattn import cpu

pytestmark = pytest.mark.promise("benchmarks")
ROOT = Path(__file__).resolve().parents[2]
LATER = 3600.0


def in_python(code: str, **more) -> gpu.Part:
    return gpu.Part("a test", 1.0, (sys.executable, "-c", code), **more)


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    return tmp_path / "logs"


def run(part: gpu.Part, seconds: float = LATER) -> gpu.Outcome:
    return gpu.run({"it": part}, time.monotonic() + seconds)["it"]


@pytest.mark.parametrize(
    "code, state, why",
    [("", gpu.PASSED, ""), ("raise SystemExit(3)", gpu.FAILED, "exit status 3"), ("raise SystemExit(77)", gpu.NOT_RUN, "as it says above")],
)
def test_the_outcome_of_a_part_is_that_of_its_command(code, state, why):
    outcome = run(in_python(code))
    assert (outcome.state, outcome.why) == (state, why)


def test_a_part_whose_time_is_up_is_told_so_and_then_killed_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 3)
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "told")!r}, "w").write("yes")
    time.sleep(60)
"""
    outcome = run(in_python(code), seconds=4)
    assert outcome.state == gpu.STOPPED and 4 < outcome.seconds < 20
    assert (tmp_path / "told").read_text() == "yes", "it may write down what there is"
    stat = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_part_that_lacks_something_says_what():
    assert run(in_python("", modules=("json", "no_such_module"))).why == "this Python has no no_such_module"
    assert run(in_python(""), seconds=0.5).why == "no time was left"


def test_parts_run_side_by_side_and_what_each_printed_is_shown_when_it_ends(logs, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "PATIENCE", 3)
    talks = "import sys, time; print('said {0}', flush=True); print('and more', file=sys.stderr); time.sleep({1}); print('at the end')"
    parts = {"long": in_python(talks.format("long", 60)), "short": in_python(talks.format("short", 2)), "bad": in_python("1 / 0")}
    parts["absent"] = in_python("", modules=("no_such_module",))
    outcomes = gpu.run(parts, time.monotonic() + 8)
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {"long": gpu.STOPPED, "short": gpu.PASSED, "bad": gpu.FAILED, "absent": gpu.NOT_RUN} and list(states) == list(parts)
    assert 7 < outcomes["long"].seconds < 14 and outcomes["short"].seconds < 7
    assert (logs / "short.txt").read_text() == "said short\nand more\nat the end\n"
    shown = capfd.readouterr().out
    assert shown.index("\n== bad\n") < shown.index("\n== short\n") < shown.index("\n== long\nsaid long\n") and "ZeroDivisionError" in shown


def test_what_measures_time_runs_alone_and_what_fills_a_cache_before_it(monkeypatch):
    default = list(gpu.stages([]))
    assert default[0] == ["calls"] and default[-1] == ["bench"] and {"suite", "memcheck", "racecheck", "peers"} <= set(default[1])
    assert sum(default, []) == [name for name in gpu.PARTS if name not in gpu.ONLY_IF_NAMED] and len(default) == 3
    assert list(gpu.stages(["bench"])) == [["peers"], ["bench"]] and list(gpu.stages(["racecheck"])) == [["calls"], ["racecheck"]]
    assert list(gpu.stages(["ceilings", "tune"])) == [["ceilings"], ["tune"]]
    assert gpu.INSTALLING + sum(map(gpu.minutes, default)) == pytest.approx(gpu.MINUTES), "what the parts may take is the whole"


def test_minutes_left_are_handed_on():
    code = "import sys; left = float(sys.argv[1]); sys.exit(not 0 < left < 1)"
    part = gpu.Part("", 5.0, (sys.executable, "-c", code, "{minutes}"))
    assert run(part, seconds=80).state == gpu.PASSED


def test_the_command_makes_no_environment():
    for variables, command in (("gpu PART=graphs", "graphs --minutes 8.5"), ("tune MINUTES=9", "tune --minutes 9")):
        make = ["make", "-n", "--no-print-directory", "PYTHON=python", *variables.split()]  # this test may run under make itself
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines() == [f"python -m bench.gpu.run {command}"], done.stderr


def test_without_a_gpu_it_says_what_is_missing():
    blind, command = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": ""}, [sys.executable, "-m", "bench.gpu.run"]
    done = subprocess.run([*command, "suite"], capture_output=True, text=True, env=blind)
    assert done.returncode == 1 and "needs an NVIDIA GPU, torch and triton" in done.stderr
    done = subprocess.run([*command, "no-such-part"], capture_output=True, text=True, env=blind)
    assert done.returncode == 2 and "no part no-such-part" in done.stderr


def test_the_parts_end_in_a_line_each_and_one_failure_fails_the_run(monkeypatch, capsys):
    parts = {"good": in_python(""), "bad": in_python("raise SystemExit(1)"), "absent": in_python("", modules=("no_such_module",))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "describe_gpu", lambda: "90a")
    monkeypatch.setattr(gpu, "install", lambda arch, until: gpu.Outcome(gpu.PASSED, 1.0, arch))
    assert gpu.main([]) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[:2] for line in lines] == [["install", "passed"], ["good", "passed"], ["bad", "FAILED"], ["absent", "not"]]
    del parts["bad"]
    assert gpu.main([]) == 0 and gpu.main(["good"]) == 0
    assert gpu.main(["good", "absent"]) == 1, "what is named has to run"
    del parts["good"]
    assert gpu.main([]) == 1, "something has to run"


def test_the_shares_are_of_the_time_that_is_left(monkeypatch):
    """The time that a part does not use goes to the next ones, and whatever happens, the last one ends in time."""
    limits, now = {}, [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])

    def run(parts, until):
        (name,) = parts
        limits[name] = until - now[0]
        now[0] += {"unused": 0.0, "late": limits[name] + gpu.PATIENCE}.get(name, limits[name])
        return {name: gpu.Outcome(gpu.PASSED)}

    parts = {name: in_python("", alone=True)._replace(minutes=m) for name, m in (("unused", 2.0), ("late", 3.0), ("last", 1.0))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "describe_gpu", lambda: "90a")
    monkeypatch.setattr(gpu, "install", lambda arch, until: gpu.Outcome(gpu.PASSED, until))
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "time", clock)
    gpu.main(["--minutes", "10"])
    whole = 600 - gpu.PATIENCE
    assert limits["unused"] == pytest.approx(whole / 3) and limits["late"] == pytest.approx(whole * 3 / 4)
    assert limits["last"] == pytest.approx(whole / 4 - gpu.PATIENCE) and now[0] == pytest.approx(1000 + whole)
    now[0] = 1000.0
    gpu.main(["last", "--minutes", "10"])
    assert limits["last"] == pytest.approx(whole), "alone it has all the time"


def test_an_installation_falls_back_to_less_and_needs_no_network(tmp_path, monkeypatch):
    tried = []

    def run(parts, until, variables):
        (name,) = parts
        tried.append((parts[name].command, variables["CMAKE_ARGS"]))
        return {name: gpu.Outcome(gpu.FAILED)}

    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "find", lambda tool: f"/usr/bin/{tool}")
    outcome = gpu.install("90a", time.monotonic() + 60)
    assert (outcome.state, outcome.why) == (gpu.PASSED, "linked, nothing built")
    assert [options for _, options in tried] == ["-DSMATTN_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real", "-DSMATTN_CUDA=OFF"]
    assert all({"--no-index", "--no-build-isolation", "--no-deps", "--target"} <= set(words) for words, _ in tried)
    monkeypatch.setattr(gpu, "find", lambda tool: None)
    tried.clear()
    gpu.install("90a", time.monotonic() + 60)
    assert [options for _, options in tried] == ["-DSMATTN_CUDA=OFF"]
    code = "import smattn, smattn.kernels.backend as b; print(smattn.__version__, smattn.__file__, b.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=gpu.environment(), capture_output=True, text=True)
    files = [str(tmp_path / "site/smattn" / name) for name in ("__init__.py", "kernels/backend.py")]
    assert done.stdout.split()[1:] == files, done.stderr


def collected(name: str) -> set[str]:
    """The tests that a part would run on a machine with a GPU."""
    part = gpu.PARTS[name]
    words = [word for word in part.command if word not in ("-n", "logical", "--dist", "worksteal")]
    done = subprocess.run([*words, "--collect-only"], cwd=gpu.FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def named(tests: set[str], name: str) -> set[str]:
    return {test for test in tests if f"::{name}" in test}


@pytest.mark.slow
def test_the_parts_share_out_every_test_that_runs_on_a_device():
    graphs, offsets, ranks, suite = (collected(name) for name in ("graphs", "offsets", "ranks", "suite"))
    assert {"few queries" in test for test in graphs} == {True, False} and named(graphs, "test_cuda_graph_") == graphs
    assert {test.split("::")[1].split("[")[0] for test in offsets} == {
        "test_mask_offsets_past_2_to_the_31", "test_query_key_and_value_offsets_past_2_to_the_31", "test_padding_offsets_past_2_to_the_31"
    }  # fmt: skip
    assert any("nccl-1" in test for test in ranks) and named(ranks, "test_two_processes_have_the_gradients_of_one")
    assert not suite & (graphs | offsets | ranks)
    for name in ("test_random_calls", "test_the_same_bits_every_time", "test_extra_memory_is_under_the_ceiling", "test_named_workloads"):
        assert named(suite, name), name
    assert not named(suite, "test_more_random_calls") and not named(suite, "test_both_contestants_compute_every_tile")
    dtypes = {test.split("triton-")[1].rstrip("]") for test in named(suite, "test_random_calls[") if "triton" in test}
    assert dtypes == {"float16", "bfloat16", "float32"}


NO_SKIPS = """
import pytest
@pytest.mark.skipif({skipped}, reason="for the test")
def test_one():
    pass
"""


@pytest.mark.parametrize("skipped, status", [(True, 1), (False, 0)])
def test_a_skipped_test_fails_a_part_that_must_run(tmp_path, skipped, status):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_one.py").write_text(NO_SKIPS.format(skipped=skipped))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-skips", "--rootdir", tmp_path, "test_one.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == status, done.stdout


LOSES_ITS_GPU = """
import torch
def test_first():
    pass
def test_second():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
    raise AssertionError("what was wrong")
def test_third():
    assert torch.cuda.synchronize.__name__ != "broken"
def test_fourth():
    pass
"""


def test_tests_after_one_that_breaks_the_gpu_have_a_new_process(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_one.py").write_text(LOSES_ITS_GPU)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    distribution = [word for word in gpu.PARTS["suite"].command if word in ("-n", "--dist", "worksteal")]
    distribution.insert(1, "1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *distribution, "--rootdir", tmp_path, "test_one.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and "3 passed" in done.stdout and "what was wrong" in done.stdout, done.stdout


FEWER = "from bench.gpu import sanitized as s; s.DTYPES, s.QUERIES = s.DTYPES[:1], (5,)"


def test_small_calls_of_every_fused_backend_run_where_there_is_no_sanitizer():
    code = f"import sys; sys.path.append({str(ROOT)!r}); {FEWER}; sys.exit(s.main(['--here']))"
    interpreted = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=interpreted, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {f"{name}, float16, 5 queries, {options}: done" for name in ("triton", "cpu") for options in sanitized.OPTIONS}
    assert lines <= set(done.stdout.splitlines())


def test_small_calls_side_by_side_fail_one_by_one(monkeypatch, capsys):
    monkeypatch.setattr(sanitized, "calls", lambda device: [(name, torch.float32, 5, "map", "cpu") for name in ("cpu", "no-such")])
    assert sanitized.side_by_side("cpu") == 1
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines[0] == "cpu, float32, 5 queries, map: done" and lines[1].startswith("no-such, float32, 5 queries, map: ValueError: backend")


def test_a_sanitizer_that_is_not_there_or_does_not_work_is_not_a_failure(monkeypatch, capfd):
    assert sanitized.under("memcheck", lambda tool: None) == gpu.NOT_HERE == sanitized.NOT_HERE
    assert sanitized.under("racecheck", lambda tool: "/bin/false") == gpu.NOT_HERE
    assert "not installed" in (said := capfd.readouterr().out) and "does not work here" in said
    ran = []

    def done(words, env):
        ran.append((words, env.get("PYTORCH_NO_CUDA_MEMORY_CACHING")))
        return SimpleNamespace(returncode=3 * ("--here" in words))

    monkeypatch.setattr(sanitized.subprocess, "run", done)
    assert sanitized.under("memcheck", lambda tool: tool) == 3 and sanitized.under("racecheck", lambda tool: tool) == 3
    assert [(words[2], uncached) for words, uncached in ran] == [("memcheck", "1")] * 2 + [("racecheck", None)] * 2


@pytest.mark.skipif(bool(cpu.reasons()), reason="there is no compiled extension here")
def test_the_binary_says_which_torch_built_it_and_which_loads_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "bench.gpu.binary", cpu.LIBRARY.path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"loaded by torch {torch.__version__}" in done.stdout, done.stderr
    assert "built with torch 2." in done.stdout
    other = tmp_path / "_cpu.so"
    other.write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-m", "bench.gpu.binary", other], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "does not load with torch" in done.stderr
