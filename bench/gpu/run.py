"""`make gpu`: everything that only a GPU can show, on a machine with an NVIDIA GPU, torch, triton and nvcc, without a network.

    python -m bench.gpu.run [PART ...] [--minutes 8.5]  # `make tune` is the part "tune", which runs only if it is named

It installs this source tree into build/gpu for the Python that runs it, and changes nothing else of that Python. The C++ parts are built
where CMake and a compiler are at hand, and the CUDA C++ kernels where nvcc is too. Where pip cannot build, the tree is linked, which is
enough for Triton's kernels. Each part is a command of its own. Those that measure time, or keep all cores busy by themselves, run alone.
The others run side by side, for nearly all of their time goes into compilers and into starting processes.

Each part has a share of the time that is left when it begins, so that the whole ends in time, and what a part does not use is left to those
after it. A part is stopped when its time is up; what it had written by then stays, in build/logs too. A line for each part ends the output.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench"  # Commands run here, for in the root Python would find smattn/ without kernels before the installed package.
SITE, LOGS = ROOT / "build" / "gpu", ROOT / "build" / "logs"
PYTHON = sys.executable
INSTALLATION = ("-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--target", str(SITE), str(ROOT))
PROGRAMS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])  # nvcc may be where no shell finds it.
PATIENCE = 15  # seconds that a part has to write down what there is, once it is told to stop
PASSED, FAILED, STOPPED, NOT_RUN = "passed", "FAILED", "STOPPED", "not run"
QUESTION = """import torch, triton
print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), torch.__version__, triton.__version__, sep="\\n")"""
NOT_HERE = 77  # the exit status of a command that found nothing to do


class Part(NamedTuple):
    """A command. {minutes} in it stands for what it may use."""

    what: str
    minutes: float  # what it may take of MINUTES, or as large a share of another time
    command: tuple[str, ...]
    alone: bool = False
    modules: tuple[str, ...] = ()  # the modules that Python must have


class Outcome(NamedTuple):
    state: str
    seconds: float = 0.0
    why: str = ""


def tests(what: str, minutes: float, *options: str, files: Sequence[str] = ("",), more: tuple[str, ...] = ()) -> Part:
    words = (PYTHON, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *options, *(f"../tests/{file}" for file in files))
    return Part(what, minutes, words, modules=("pytest", "hypothesis", *more))


MINUTES, INSTALLING, TOGETHER = 8.5, 1.6, 3.3
BENCH = (PYTHON, "-m", "bench.run", "--device", "cuda", "--seconds", "0.1", "--minutes", "{minutes}", "--compile")
SANITIZED = (PYTHON, "-m", "bench.gpu.sanitized", "--under")
GRAPHS, FAR, RANKS = "cuda_graph", "past_2_to_the_31", "nccl or two_processes"
ONLY_IF_NAMED = {"ceilings", "questions", "tune"}  # The benchmark begins with the first.
BEFORE = {"bench": "peers", "memcheck": "calls", "racecheck": "calls"}  # These need caches that those fill.
ALONE = f"({GRAPHS} or {FAR} or {RANKS})"
# Most of the suite's time is Triton's: it compiles some 1000 kernels for a chip that has none yet, a CPU second or two each.
PARTS = {
    "ceilings": Part("copying and matrix products at best", 0.5, (PYTHON, "-m", "bench.measuring.ceilings"), alone=True),
    "calls": Part("small calls of every fused backend, side by side", 0.5, (PYTHON, "-m", "bench.gpu.sanitized"), alone=True),
    "suite": tests("every other test that runs on a device", TOGETHER, "-m", "device and (not slow or gpu)", "-k", f"not {ALONE}",
                   "--continue-on-collection-errors", "-n", "logical", "--dist", "worksteal", more=("xdist",)),
    "binary": Part("the compiled extension, and which torch loads it", TOGETHER, (PYTHON, "-m", "bench.gpu.binary")),
    "graphs": tests("CUDA graphs captured and replayed", TOGETHER, "--no-skips", "-k", GRAPHS, files=("torch/test_compile.py",)),
    "offsets": tests("offsets past 2^31", TOGETHER, "--no-skips", "-k", FAR, files=("promises/test_any_shape.py",)),
    "ranks": tests("NCCL and DDP", TOGETHER, "--no-skips", "-k", RANKS, files=("torch/test_distributed.py", "torch/test_ddp.py")),
    "memcheck": Part("those small calls under compute-sanitizer: every access", TOGETHER, (*SANITIZED, "memcheck")),
    "racecheck": Part("and again: races in shared memory", TOGETHER, (*SANITIZED, "racecheck")),
    "peers": Part("what the benchmark compiles, for each of its shapes", TOGETHER, (*BENCH, "only"), modules=("tqdm",)),
    "bench": Part("every workload beside its peers", 3.1, (*BENCH, "not"), alone=True, modules=("tqdm", "matplotlib")),
    "questions": Part("the tiles that counts chose, each beside another", 3, (PYTHON, "-m", "bench.gpu.questions"), alone=True),
    "tune": Part("the tiles of kernels/tiles.csv, searched", 8.5, (PYTHON, "-m", "bench.gpu.tune", "--minutes", "{minutes}"), alone=True,
                 modules=("tqdm",)),
}  # fmt: skip


def stages(named: Sequence[str]) -> Iterator[list[str]]:
    """The parts that run at once: one that runs alone, or all in a row that do not. All parts take part when none is named."""
    asked = {*named, *(BEFORE[name] for name in named if name in BEFORE)}
    stage: list[str] = []
    for name in [name for name in PARTS if name in asked or not named and name not in ONLY_IF_NAMED]:
        if stage and (PARTS[name].alone or PARTS[stage[-1]].alone):
            yield stage
            stage = []
        stage.append(name)
    if stage:
        yield stage


def minutes(stage: Sequence[str]) -> float:
    return max(PARTS[name].minutes for name in stage)


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(SITE), str(ROOT), os.environ.get("PYTHONPATH")]))
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # There are many processes, and each would start one for every core.
    return inherited | alone | {"PATH": PROGRAMS, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more


def install(arch: str, until: float) -> Outcome:
    """Install this tree into SITE with as much C++ as can be built. arch: as nvcc names it, "90a" say."""
    began = time.monotonic()
    attempts = {
        "with CUDA C++": f"-DSMATTN_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={arch}-real",
        "with C++": "-DSMATTN_CUDA=OFF",
    }
    if find("nvcc") is None:
        del attempts["with CUDA C++"]
    for what, options in attempts.items():
        shutil.rmtree(SITE, ignore_errors=True)
        share = 0.8 * (until - time.monotonic())  # The next attempt need not compile again what this one compiled in vain.
        if install_once(environment(CMAKE_ARGS=options), time.monotonic() + share):
            return Outcome(PASSED, time.monotonic() - began, what)
        print(f"-- not installed {what}", flush=True)
    link()
    return Outcome(PASSED, time.monotonic() - began, "linked, nothing built")


def link() -> None:
    """Make the package in SITE of links to this tree, which needs neither pip nor a compiler."""
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "smattn").mkdir(parents=True)
    for path in [ROOT / "kernels", *(ROOT / "smattn").iterdir()]:
        (SITE / "smattn" / path.name).symlink_to(path)
    version = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    metadata = SITE / f"smattn-{version[1]}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: smattn\nVersion: {version[1]}\n")


def install_once(variables: dict[str, str], until: float) -> bool:
    part = Part("installation", INSTALLING, (PYTHON, *INSTALLATION))
    return run({"install": part}, until, variables)["install"].state == PASSED


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    began: float

    def outcome(self) -> Outcome:
        code, seconds = self.process.poll(), time.monotonic() - self.began
        if code is None:
            return Outcome(STOPPED, seconds, "its time was up")
        state = {0: PASSED, NOT_HERE: NOT_RUN}.get(code, FAILED)
        return Outcome(state, seconds, {PASSED: "", NOT_RUN: "as it says above"}.get(state, f"exit status {code}"))


def run(parts: Mapping[str, Part], until: float, variables: dict[str, str] | None = None) -> dict[str, Outcome]:
    """Run parts side by side, if what they need is there, and end them in time. What a part alone prints is shown as it comes."""
    outcomes: dict[str, Outcome] = {}
    running: dict[str, Running] = {}
    for name, part in parts.items():
        if reason := why_not(part, until):
            outcomes[name] = Outcome(NOT_RUN, 0.0, reason)
        else:
            running[name] = start(name, part, until, variables or environment(), shown=len(parts) == 1)
    try:
        while running and time.monotonic() < until:
            for name in [name for name, one in running.items() if one.process.poll() is not None]:
                outcomes[name] = end(name, running.pop(name), shown=len(parts) == 1)
            time.sleep(0.05)
    finally:
        late = {name: one.outcome() for name, one in running.items()}
        stop([one.process for one in running.values()])
        for name, one in running.items():
            outcomes[name] = late[name]._replace(seconds=end(name, one, shown=len(parts) == 1).seconds)
    return {name: outcomes[name] for name in parts}


def why_not(part: Part, until: float) -> str:
    """Why a part cannot begin; "" when it can."""
    if until - time.monotonic() < 1:
        return "no time was left"
    absent = [name for name in part.modules if importlib.util.find_spec(name) is None]
    return f"this Python has no {', '.join(absent)}" if absent else ""


def start(name: str, part: Part, until: float, variables: dict[str, str], shown: bool) -> Running:
    left = max(0.0, until - time.monotonic() - 2 * PATIENCE) / 60
    words = [word.format(minutes=f"{left:.2f}") if word == "{minutes}" else word for word in part.command]
    print("$ " + " ".join(words), flush=True)
    # What a shell starts in the background ignores SIGINT and hands that on, so the part is told to heed it.
    heeds_it = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    LOGS.mkdir(parents=True, exist_ok=True)
    with open(os.devnull if shown else LOGS / f"{name}.txt", "wb") as log:
        out = None if shown else log
        process = subprocess.Popen(
            words, cwd=FOLDER, env=variables, stdout=out, stderr=out, start_new_session=True, preexec_fn=heeds_it
        )  # fmt: skip
    return Running(process, time.monotonic())


def end(name: str, one: Running, shown: bool) -> Outcome:
    """End a part, if it has not ended by itself, with all that it started, and show what it printed."""
    outcome = one.outcome()
    stop([one.process])
    if not shown:
        print(f"\n== {name}\n" + (LOGS / f"{name}.txt").read_text(errors="replace"), flush=True)
    return outcome


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell each process to stop, and after PATIENCE kill it with all that it started."""
    ending = time.monotonic() + PATIENCE
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    for process in processes:
        try:
            process.wait(max(0.0, ending - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # Nothing of it is left.
            pass
        process.wait()


def find(tool: str) -> str | None:
    return shutil.which(tool, path=PROGRAMS)


def describe_gpu() -> str:
    """Print a line about the machine; returns its architecture, "90a" say. Exits where torch has no GPU."""
    asked = subprocess.run([PYTHON, "-c", QUESTION], capture_output=True, text=True)
    if asked.returncode != 0:
        sys.exit(f"make gpu needs an NVIDIA GPU, torch and triton for {PYTHON}: {(asked.stderr.strip() or 'no message').splitlines()[-1]}")
    name, major, minor, torch, triton = asked.stdout.splitlines()[-5:]
    print(f"{name}, compute capability {major}.{minor}; torch {torch}, triton {triton}, {PYTHON}", flush=True)
    return f"{major}{minor}" + "a" * (int(major) >= 9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them, in this order, when none is named")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything together (default {MINUTES})")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    now = time.monotonic
    until = now() + 60 * args.minutes - PATIENCE
    left = list(stages(args.parts))
    arch, shares = describe_gpu(), sum(map(minutes, left))
    outcomes = {"install": install(arch, now() + (until - now()) * INSTALLING / (INSTALLING + shares))}
    while left:
        stage, share = left[0], minutes(left[0]) / sum(map(minutes, left))
        for name in left.pop(0):
            print(f"\n== {name}: {PARTS[name].what}", flush=True)
        outcomes |= run({name: PARTS[name] for name in stage}, now() + (until - now()) * share)
    print("\n" + "\n".join(f"{name:10}{o.state:8}{o.seconds:6.0f} s  {o.why}" for name, o in outcomes.items()))
    bad = {FAILED, STOPPED} | ({NOT_RUN} if args.parts else set())  # What was asked for by name has to run.
    ran = [o for name, o in outcomes.items() if name != "install" and o.state == PASSED]
    return 1 if not ran or any(o.state in bad for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
