"""Everything that only a GPU can show, `make gpu`: on a machine with an NVIDIA GPU, torch, triton and nvcc, without a network.

    python bench/gpu.py [PART ...] [--minutes 8.5]  # `make tune` is the part "tune", which runs only if named

Installs this source tree into build/gpu for the Python that runs it, and changes nothing else of that Python. The C++ parts are built where
CMake and a compiler are at hand, the CUDA C++ kernels where nvcc is too; where pip cannot build, the tree is linked, which is enough for
Triton's kernels. Every part is a command of its own, ceilings and correctness first, and is stopped when its time is up; parts that are
named have all the time there is. What a part had written by then stays. Ends with a line a part.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
PYTHON = sys.executable
INSTALLATION = ("-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--target", str(SITE), str(ROOT))
PROGRAMS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])  # where nvcc may be and no shell finds it
PATIENCE = 15  # seconds to write down what there is, once told to stop
PASSED, FAILED, STOPPED, NOT_RUN = "passed", "FAILED", "STOPPED", "not run"
QUESTION = """import torch, triton
print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), torch.__version__, triton.__version__, sep="\\n")"""
NOT_HERE = 77  # the exit status of a command that found nothing to do


class Part(NamedTuple):
    """A command, run in a folder of the repository; {minutes} in it is what it may use."""

    what: str
    minutes: float  # among all the others
    command: tuple[str, ...]
    folder: str = "."
    modules: tuple[str, ...] = ()  # that Python must have
    tool: tuple[str, ...] = ()  # a program under which the command runs, and its options
    environment: dict[str, str] = {}


class Outcome(NamedTuple):
    state: str
    seconds: float = 0.0
    why: str = ""


def tests(what: str, minutes: float, *selection: str, more: tuple[str, ...] = ()) -> Part:
    """From the folder of the tests: in the root Python would find the folder smattn, without its kernels, before the installed package."""
    words = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection)
    return Part(what, minutes, words, "tests", ("pytest", "hypothesis", *more))


def sanitizer(what: str, tool: str, **environment: str) -> Part:
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "10")
    return Part(what, 1.0, (PYTHON, "bench/sanitized.py"), tool=under, environment=environment)


BENCH = (PYTHON, "bench/run.py", "--device", "cuda", "--seconds", "0.1", "--minutes", "{minutes}")
GRAPHS, FAR, RANKS = "cuda_graph", "past_2_to_the_31", "nccl or two_processes"
ONLY_IF_NAMED = {"tune"}
ALONE = f"({GRAPHS} or {FAR} or {RANKS})"
PARTS = {
    "ceilings": Part("copying and matrix products at best", 0.5, (PYTHON, "bench/ceilings.py")),
    "binary": Part("the compiled extension, and which torch loads it", 0.5, (PYTHON, "bench/binary.py")),
    "graphs": tests("CUDA graphs captured and replayed", 1.0, "--no-skips", "-k", GRAPHS, "test_compile.py"),
    "offsets": tests("offsets past 2^31", 1.0, "--no-skips", "-k", FAR, "test_any_shape.py"),
    "ranks": tests("NCCL and DDP", 1.0, "--no-skips", "-k", RANKS, "test_distributed.py", "test_ddp.py"),
    "suite": tests("every other test that runs on a device", 2.5, "-m", "device and (not slow or gpu)", "-k", f"not {ALONE}",
                   "--continue-on-collection-errors", "-n", "auto", "--dist", "worksteal", more=("xdist",)),
    "memcheck": sanitizer("compute-sanitizer: every access", "memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),  # a tensor, an allocation
    "racecheck": sanitizer("compute-sanitizer: races in shared memory", "racecheck"),
    "bench": Part("every workload beside its peers", 4.0, BENCH, modules=("tqdm", "matplotlib")),
    "tune": Part("the tiles of kernels/configs.py, searched", 60.0, (PYTHON, "bench/tune.py", "--minutes", "{minutes}"), modules=("tqdm",)),
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    return inherited | {"PATH": PROGRAMS, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more


def install(arch: str, until: float) -> Outcome:
    """This tree into SITE, with as much C++ as can be built. arch: as nvcc has it, "90a" say."""
    began = time.monotonic()
    attempts = {
        "with CUDA C++": f"-DSMATTN_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={arch}-real",
        "with C++": "-DSMATTN_CUDA=OFF",
    }
    if find("nvcc") is None:
        del attempts["with CUDA C++"]
    for what, options in attempts.items():
        shutil.rmtree(SITE, ignore_errors=True)
        share = (until - time.monotonic()) / 3  # of the time left: the next attempt, and the parts, want some
        code = command((PYTHON, *INSTALLATION), ROOT, environment(CMAKE_ARGS=options), share)
        if code == 0:
            return Outcome(PASSED, time.monotonic() - began, what)
        print(f"-- not installed {what}", flush=True)
    link()
    return Outcome(PASSED, time.monotonic() - began, "linked, nothing built")


def link() -> None:
    """The package in SITE as links to this tree, kernels/ as smattn.kernels: what needs neither pip nor a compiler."""
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "smattn").mkdir(parents=True)
    for path in [ROOT / "kernels", *(ROOT / "smattn").iterdir()]:
        (SITE / "smattn" / path.name).symlink_to(path)
    version = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    metadata = SITE / f"smattn-{version[1]}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: smattn\nVersion: {version[1]}\n")


def run(part: Part, until: float) -> Outcome:
    """One part, begun when what it needs is there, and ended in time."""
    began = time.monotonic()
    seconds = until - began
    if seconds < 1:
        return Outcome(NOT_RUN, 0.0, "no time was left")
    if absent := [name for name in part.modules if importlib.util.find_spec(name) is None]:
        return Outcome(NOT_RUN, 0.0, f"this Python has no {', '.join(absent)}")
    words, variables = part.command, environment(**part.environment)
    if part.tool:
        tool = find(part.tool[0])
        if tool is None:
            return Outcome(NOT_RUN, 0.0, f"{part.tool[0]} is not installed")
        under = (tool, *part.tool[1:])
        if command((*under, PYTHON, "-c", "import torch; torch.ones(1, device='cuda').sum().item()"), ROOT, variables, seconds) != 0:
            return Outcome(NOT_RUN, time.monotonic() - began, f"{part.tool[0]} is installed and does not work here, as it says above")
        words = (*under, *words)
    words = tuple(word.format(minutes=f"{max(0.0, (seconds - 2 * PATIENCE) / 60):.2f}") if word == "{minutes}" else word for word in words)
    code = command(words, ROOT / part.folder, variables, seconds)
    state = {0: PASSED, NOT_HERE: NOT_RUN, None: STOPPED}.get(code, FAILED)
    why = {STOPPED: "its time was up", NOT_RUN: "as it says above", FAILED: f"exit status {code}"}.get(state, "")
    return Outcome(state, time.monotonic() - began, why)


def command(words: tuple[str, ...], folder: Path, variables: dict[str, str], seconds: float) -> int | None:
    """The exit status; None when it had to be stopped, which it is with all that it started."""
    print("$ " + " ".join(words), flush=True)
    # what a shell starts in the background ignores SIGINT, and hands that on
    heeds_it = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, cwd=folder, env=variables, start_new_session=True, preexec_fn=heeds_it)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # nothing of it is left
            pass
        process.wait()


def find(tool: str) -> str | None:
    return shutil.which(tool, path=PROGRAMS)


def describe_gpu() -> str:
    """ "90a", say, after a line about the machine; exits where torch has no GPU."""
    asked = subprocess.run([PYTHON, "-c", QUESTION], capture_output=True, text=True)
    if asked.returncode != 0:
        sys.exit(f"make gpu needs an NVIDIA GPU, torch and triton for {PYTHON}: {(asked.stderr.strip() or 'no message').splitlines()[-1]}")
    name, major, minor, torch, triton = asked.stdout.splitlines()[-5:]
    print(f"{name}, compute capability {major}.{minor}; torch {torch}, triton {triton}, {PYTHON}", flush=True)
    return f"{major}{minor}" + "a" * (int(major) >= 9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them, in this order, when none is named")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything together (default 8.5)")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    until = time.monotonic() + 60 * args.minutes - PATIENCE
    outcomes = {"install": install(describe_gpu(), until)}
    if outcomes["install"].state == PASSED:
        for name in args.parts or [name for name in PARTS if name not in ONLY_IF_NAMED]:
            print(f"\n== {name}: {PARTS[name].what}", flush=True)
            limit = math.inf if args.parts else time.monotonic() + 60 * PARTS[name].minutes
            outcomes[name] = run(PARTS[name], min(until, limit))
    print("\n" + "\n".join(f"{name:10}{o.state:8}{o.seconds:6.0f} s  {o.why}" for name, o in outcomes.items()))
    bad = {FAILED, STOPPED} | ({NOT_RUN} if args.parts else set())  # what was asked for by name has to run
    ran = [o for name, o in outcomes.items() if name != "install" and o.state == PASSED]
    return 1 if not ran or any(o.state in bad for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
