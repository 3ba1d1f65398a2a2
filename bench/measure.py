"""Time and memory of every contestant in every cell, as rows; what was not measured is a row that says why."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from harness import Cell, Step, bind, extra_bytes, time_interleaved, timing, warm_up
from peers import Contestant
from rows import BOTH, FORWARD, MATMUL, OURS, Row
from tqdm import tqdm  # type: ignore[import-untyped]
from validate import Validation

import smattn
from smattn.backends import TABLE

ROOT = Path(__file__).resolve().parent.parent
SCORE_TENSORS = {FORWARD: 4, BOTH: 7}  # what a contestant that holds them may hold at once, float32
SIDE = 2048  # of the calibration's matrices


@dataclass
class Job:
    """One run: where it happens, and the rows it has so far."""

    device: str
    seconds: float  # time budget of one contestant in one cell
    command: str
    validations: dict[tuple[str, str, str, torch.dtype], Validation] = field(default_factory=dict)  # by backend, workload, mask, dtype
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

    def add(self, cell: Cell, backend: str, taken: list[float] | None = None, extra: int | None = None, skipped: str | None = None) -> None:
        validation = self.validations.get((backend, cell.workload.name, cell.mask, cell.dtype))
        self.rows.append(
            Row(
                **_times(taken), **self.about, workload=cell.workload.name, shape=cell.shape, mask=cell.mask, dtype=_name(cell.dtype),
                direction=cell.direction, backend=backend, default=backend == OURS + default_backend(cell), extra_bytes=extra,
                io_bytes=cell.io_bytes, flops=cell.flops, matmul_ms=self.matmul_ms, skipped=skipped,
                errors=asdict(validation) if validation else None,
            )
        )  # fmt: skip

    def add_matmul(self, dtype: torch.dtype, taken: list[float]) -> None:
        self.rows.append(
            Row(
                **_times(taken), **self.about, workload=MATMUL, shape=(SIDE,) * 3, mask="none", dtype=_name(dtype), direction=FORWARD,
                backend="torch.mm", default=False, extra_bytes=None, io_bytes=3 * SIDE**2 * dtype.itemsize, flops=2 * SIDE**3,
                matmul_ms=None, errors=None, skipped=None,
            )
        )  # fmt: skip


def measure(job: Job, cells: list[Cell], contestants: list[Contestant]) -> None:
    """Every contestant in every cell, and torch.mm around each cell: its spread says how quiet the machine was."""
    matmuls = {dtype: _matmul(dtype, job.device) for dtype in {cell.dtype: None for cell in cells}}
    calibration: dict[torch.dtype, list[float]] = {dtype: [] for dtype in matmuls}
    with tqdm(total=len(cells) * len(contestants), desc="time and memory", file=sys.stdout, mininterval=1) as bar:
        for cell in cells:
            bar.set_postfix_str(f"{cell.workload.name} {_name(cell.dtype)} {cell.mask} {cell.direction}")
            calibration[cell.dtype] += measure_cell(job, cell, contestants, matmuls[cell.dtype], bar.update)
    for dtype, taken in calibration.items():
        job.add_matmul(dtype, taken)


def measure_cell(
    job: Job, cell: Cell, contestants: list[Contestant], matmul: Callable[[], object], done: Callable[[], object]
) -> list[float]:
    """Add the cell's rows; the milliseconds of the calibration around it."""
    torch.compiler.reset()
    case, calls, refused = cell.case(), dict[str, Step](), dict[str, str]()
    for contestant in contestants:
        try:
            if reason := why_not(contestant, cell):
                raise RuntimeError(reason)
            call = bind(contestant.ready(), case, cell.direction)
            warm_up(call, job.device)
            calls[contestant.name] = call
        except Exception as error:  # a peer that cannot run the cell is reported, and the others are measured
            refused[contestant.name] = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
    quiet = time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
    samples = time_interleaved(calls, job.device, job.seconds)
    quiet += time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
    job.matmul_ms = timing(quiet).median_ms
    for contestant in contestants:
        name, extra = contestant.name, None
        reason = refused.get(name)
        if reason is None:
            try:
                extra = extra_bytes(contestant, cell)
            except (RuntimeError, OSError) as error:
                reason = f"memory not measured: {error}"
        job.add(cell, name, samples.get(name), extra, reason)
        done()
    return quiet


def why_not(contestant: Contestant, cell: Cell) -> str | None:
    """Why a contestant is left out of a cell, None when it is not."""
    kind = torch.device(cell.device).type
    if cell.direction == BOTH and kind in contestant.forward_only_on:
        return f"has no backward on a {kind.upper()}"
    B, H, Nq, Nk, _ = cell.shape
    needed = SCORE_TENSORS[cell.direction] * 4 * B * H * Nq * Nk
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else _free_memory()
    if contestant.holds_scores and needed > free:
        return f"may need {needed / 1e9:.0f} GB for its score tensors, {free / 1e9:.0f} GB are free"
    return None


def default_backend(cell: Cell) -> str:
    """The backend that backend=None takes."""
    problem, kind = cell.smaller().case().problem(), torch.device(cell.device).type
    return next(row.name for row in TABLE if kind in row.default_on and not row.unsupported_reasons(problem, "forward"))


def backends_to_time(device: str) -> list[str]:
    """The available backends of the device; on a CPU not Triton, which is interpreted there."""
    kind = torch.device(device).type
    names = [row.name for row in TABLE if kind in row.device_types and not (kind == "cpu" and row.name == "triton")]
    return [name for name in names if smattn.backends()[name].available]


def describe_device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def describe_commit() -> str:
    """The commit, with + when what is measured differs from it; "unknown" outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "smattn", "kernels", "csrc", "bench/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _matmul(dtype: torch.dtype, device: str) -> Callable[[], object]:
    a = torch.randn(SIDE, SIDE, device=device).to(dtype)
    out = torch.mm(a, a)
    return lambda: torch.mm(a, a, out=out)


def _times(taken: list[float] | None) -> dict[str, Any]:
    return asdict(timing(taken)) if taken else {"median_ms": None, "p10": None, "p90": None, "reps": 0}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _free_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
