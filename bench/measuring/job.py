"""One run of the benchmark: where it happens, the rows it has so far, and the validation that comes before anything is timed."""

from __future__ import annotations

import copy
import datetime
import itertools
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

import smattn
from bench.measuring.harness import Cell, on_a_gpu, timing
from bench.measuring.peers import ours, select_cpu_kernels
from bench.measuring.validate import Validation, fitting, largest, validate
from bench.measuring.worker import Worker, in_a_line
from bench.reporting.rows import FORWARD, MATMUL, OURS, WARM, Row, write
from smattn.backends import TABLE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SIDE = 2048  # of the calibration's matrices


@dataclass
class Job:
    """One run: where it happens, and the rows it has so far."""

    device: str
    seconds: float  # time budget of one contestant in one cell
    command: str
    kernels: str = ""  # the set of CPU kernels forced, "avx2" say; "": the machine's best
    file: Path | None = None  # where the rows go as they come
    validations: dict[tuple[str, str, str, torch.dtype], Validation] = field(default_factory=dict)  # by backend, workload, mask, dtype
    failed: dict[tuple[str, str, str, torch.dtype], str] = field(default_factory=dict)  # of these: why
    not_compiled: dict[str, str] = field(default_factory=dict)  # peers, by `at`: why
    rows: list[Row] = field(default_factory=list)
    matmul_ms: float | None = None  # around the cell being measured

    def __post_init__(self) -> None:
        self.about: dict[str, Any] = {
            "device": describe_device(self.device),
            "threads": torch.get_num_threads(),
            "versions": {module.__name__: module.__version__ for module in (smattn, torch, triton)} | {"python": platform.python_version()},
            "commit": describe_commit(),
            "command": self.command,
        }

    def save(self) -> None:
        """Write what there is."""
        if self.file:
            write(self.rows, self.file)

    def without_rows(self) -> Job:
        """A copy to add rows to elsewhere."""
        other = copy.copy(self)
        other.rows, other.file = [], None
        return other

    def check(self, backends: list[str], cells: list[Cell]) -> None:
        """Validate every backend in every cell: one that is outside the budget is not timed there, for a wrong kernel's time is no news.

        On a GPU in a process of its own, which a broken kernel may take down.
        """
        if self.kernels:
            select_cpu_kernels(self.kernels)
        wanted = dict.fromkeys((cell.workload, cell.mask, cell.dtype) for cell in cells)
        scores, apart = largest(self.device), on_a_gpu(self.device)
        with Worker() as worker:
            for (workload, mask, dtype), backend in product(wanted, backends):
                name, fitted = ours(backend, self.kernels).name, fitting(workload, scores)
                try:
                    arguments = (backend, fitted, mask, dtype, self.device)
                    found = replace(worker(validate, *arguments) if apart else validate(*arguments), backend=name)
                except Exception as error:  # a kernel that does not compile, say: the others are measured
                    why = in_a_line(error) if apart else f"{type(error).__name__}: {in_a_line(error)}"  # a worker names the type
                    self.failed[name, workload.name, mask, dtype] = why
                    print(f"{name} {workload.name} {name_of(dtype)} {mask}: {error}", flush=True)
                    continue
                self.keep(found)
                if not found.within:
                    self.failed[name, workload.name, mask, dtype] = "outside the error budget"

    def refuse(self, name: str, cell: Cell, why: str) -> None:
        self.failed[name, cell.workload.name, cell.mask, cell.dtype] = why

    def refusal(self, name: str, cell: Cell) -> str | None:
        """Why this contestant, wrong or broken in this cell, is not timed there."""
        return self.failed.get((name, cell.workload.name, cell.mask, cell.dtype)) or self.not_compiled.get(self.at(name, cell))

    @staticmethod
    def at(name: str, cell: Cell) -> str:
        return f"{name}, {cell.workload.name} {name_of(cell.dtype)}, {cell.direction}"

    def verdict(self) -> str | None:
        """For sys.exit, at the end: what of smattn failed; None when nothing did."""
        ours = {key: why for key, why in self.failed.items() if key[0].startswith(OURS)}
        failed = [f"{name} {workload} {name_of(dtype)} {mask}: {why}" for (name, workload, mask, dtype), why in ours.items()]
        return "not timed, for it failed the check: " + "; ".join(failed) if failed else None

    def keep(self, validation: Validation) -> None:
        self.validations[validation.backend, validation.workload, validation.mask, getattr(torch, validation.dtype)] = validation
        print("\n".join(validation.lines()), flush=True)

    def add(
        self, cell: Cell, backend: str, taken: list[float] | None = None, extra: int | None = None, skipped: str | None = None,
        cache: str = WARM,
    ) -> None:  # fmt: skip
        validation = self.validations.get((backend, cell.workload.name, cell.mask, cell.dtype))
        default = backend == ours(default_backend(cell), self.kernels).name
        self.rows.append(
            Row(
                **_times(taken), **self.about, workload=cell.workload.name, shape=cell.shape, mask=cell.mask, dtype=name_of(cell.dtype),
                direction=cell.direction, cache=cache, backend=backend, default=default, extra_bytes=extra, io_bytes=cell.io_bytes,
                flops=cell.flops, matmul_ms=self.matmul_ms, skipped=skipped, errors=asdict(validation) if validation else None,
            )
        )  # fmt: skip

    def add_matmul(self, dtype: torch.dtype, taken: list[float], workload: str = MATMUL, side: int = SIDE) -> None:
        self.add_ceiling(workload, "torch.mm", (side,) * 3, dtype, taken, 3 * side**2 * dtype.itemsize, 2 * side**3)

    def add_ceiling(
        self, workload: str, what: str, shape: tuple[int, ...], dtype: torch.dtype, taken: list[float], io_bytes: int, flops: int
    ) -> None:
        self.rows.append(
            Row(
                **_times(taken), **self.about, workload=workload, shape=shape, mask="none", dtype=name_of(dtype), direction=FORWARD,
                cache=WARM, backend=what, default=False, extra_bytes=None, io_bytes=io_bytes, flops=flops,
                matmul_ms=None, errors=None, skipped=None,
            )
        )  # fmt: skip

    def path(self, *labels: str) -> Path:
        """Where the rows go: bench/results/<date>-<device>-<labels>.jsonl, with a number after it where that is committed already."""
        slug = re.sub(r"[^a-z0-9]+", "-", describe_device(self.device).lower()).strip("-")
        stem = "-".join([f"{datetime.date.today()}", slug, *labels])
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        return next(path for name in names if not committed(path := RESULTS / f"{name}.jsonl"))


def default_backend(cell: Cell) -> str:
    """The backend that backend=None takes."""
    problem, kind = cell.smaller().blank().problem(), torch.device(cell.device).type
    return next(row.name for row in TABLE if kind in row.default_on and not row.unsupported_reasons(problem, "forward"))


def available_backends(device: str) -> list[str]:
    """Those of the device; on a CPU not Triton, which is interpreted there."""
    kind = torch.device(device).type
    names = [row.name for row in TABLE if kind in row.device_types and not (kind == "cpu" and row.name == "triton")]
    return [name for name in names if smattn.backends()[name].available]


def describe_device(device: str) -> str:
    if on_a_gpu(device):
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


def committed(path: Path) -> bool:
    """Whether git keeps this file: a figure of the README may come from it."""
    try:
        return bool(_git("ls-files", "--", str(path), folder=path.parent))
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, no such folder
        return False


def describe_commit() -> str:
    """The commit, with + when what is measured differs from it; "unknown" outside a repository."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "smattn", "kernels", "csrc", "bench/*.py", "bench/*.cpp")
        return _git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _times(taken: list[float] | None) -> dict[str, Any]:
    return asdict(timing(taken)) if taken else {"median_ms": None, "p10": None, "p90": None, "reps": 0}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
