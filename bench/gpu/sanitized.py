"""A few small calls of every fused backend of this machine's device: `python -m bench.gpu.sanitized [--under memcheck]`

The calls have both regimes, every option, ragged sizes, forward and every gradient: each kernel runs, with no more work than it takes to
find a bad access or a race. They run in processes side by side, which compile what they call; with --under they run in one process under a
tool of compute-sanitizer. The exit status is 77 when that is not installed or does not work here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch

from bench.gpu.run import NOT_HERE
from bench.measuring.worker import Worker
from smattn.backends import TABLE
from smattn.testing import make_case, run

DTYPES = (torch.float16, torch.float32)
QUERIES, KEYS = (13, 150), 203  # few and many, and no multiple of a tile
PROCESSES = 16
TRIAL = "import torch; torch.ones(1, device='cuda').sum().item()"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"B": 1},
    "padding, dropout, lse": {"D": 48, "Hkv": 1, "dropout_p": 0.3, "padded": 0.3, "with_lse": True},
    "key-only mask": {"mask_shape": (1, 2, 1, KEYS), "padded": 0.3},
    "map": {"B": 1, "as_map": True},
}


def backends(device: str) -> list[str]:
    problem = make_case(1, 1, 1, 1, 32, device=device).problem()
    return [row.name for row in TABLE if row.name != "reference" and not row.unsupported_reasons(problem, "forward")]


def calls(device: str) -> list[tuple[str, torch.dtype, int, str, str]]:
    return list(product(backends(device), DTYPES, QUERIES, OPTIONS, [device]))


def check(backend: str, dtype: torch.dtype, Nq: int, options: str, device: str) -> str:
    """A line when all is well. Raises RuntimeError when a result is not finite."""
    sizes = {"B": 2, "H": 2, "Nq": Nq, "Nk": KEYS, "D": 32, "dtype": dtype, "device": device}
    results = run(make_case(**(sizes | OPTIONS[options])), backend)
    bad = [tensor for tensor, value in results.items() if not value[value != float("-inf")].isfinite().all()]  # lse may be -inf.
    if bad:
        raise RuntimeError(f"{', '.join(bad)} not finite")
    return f"{said(backend, dtype, Nq, options)}: done"


def said(backend: str, dtype: torch.dtype, Nq: int, options: str) -> str:
    return f"{backend}, {str(dtype)[6:]}, {Nq} queries, {options}"


def side_by_side(device: str) -> int:
    """Make each call in a process that it may take down; returns how many failed."""

    def one(arguments: tuple[str, torch.dtype, int, str, str]) -> int:
        try:
            with Worker() as worker:
                print(worker(check, *arguments), flush=True)
            return 0
        except RuntimeError as error:
            print(f"{said(*arguments[:4])}: {error}", flush=True)
            return 1

    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        return sum(pool.map(one, calls(device)))


def under(tool: str, find: Callable[[str], Any] = shutil.which) -> int:
    """Make the calls under a tool of compute-sanitizer; returns the exit status."""
    sanitizer = find("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed")
        return NOT_HERE
    # Without torch's cache of memory each tensor is an allocation that memcheck knows.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    words = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "10"]
    words += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks the driver for what it may not have.
    words.append(sys.executable)
    if subprocess.run([*words, "-c", TRIAL], env=environment).returncode != 0:
        print("compute-sanitizer is installed and does not work here, as it says above")
        return NOT_HERE
    return subprocess.run([*words, "-m", "bench.gpu.sanitized", "--here"], env=environment).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--under", choices=("memcheck", "racecheck"), help="a tool of compute-sanitizer")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.under:
        return under(args.under)
    if not args.here:
        return 1 if side_by_side(device) else 0
    for call in calls(device):
        print(check(*call), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
