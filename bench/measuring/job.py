"""One run of the benchmark: where it happens, the rows that it has so far, and the validation that comes before anything is timed."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import platform
import re
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import smattn
from bench.measuring.cell import Cell
from bench.measuring.clock import timing
from bench.measuring.machine import RESULTS, committed, describe_commit, describe_device, name_of, on_a_gpu
from bench.measuring.peers import ours, select_cpu_kernels, which_cpu_kernels
from bench.measuring.validate import Validation, fitting, largest, validate
from bench.measuring.worker import Worker, in_a_line
from bench.reporting.rows import FORWARD, MATMUL, OURS, WARM, Row, write
from smattn.backends import TABLE

SIDE = 2048  # of the calibration's matrices


class Check(NamedTuple):
    """What is validated once: a backend under a mask of a workload, in a dtype."""

    name: str
    workload: str
    mask: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.workload} {name_of(self.dtype)} {self.mask}"


@dataclass
class Job:
    """One run: where it happens, and the rows that it has so far."""

    device: str
    seconds: float  # the time budget of one contestant in one cell
    command: str
    kernels: str = ""  # the instruction set of CPU kernels that is forced, "avx2" say; "" takes the machine's best
    file: Path | None = None  # where the rows go as they come
    validations: dict[Check, Validation] = field(default_factory=dict)
    failed: dict[Check, str] = field(default_factory=dict)  # why, for those that failed
    not_compiled: dict[str, str] = field(default_factory=dict)  # why, for peers by `at`
    rows: list[Row] = field(default_factory=list)
    matmul_ms: float | None = None  # of torch.mm around the cell being measured

    def __post_init__(self) -> None:
        on_a_cpu = torch.device(self.device).type == "cpu"
        self.about: dict[str, Any] = {
            "device": describe_device(self.device),
            "threads": torch.get_num_threads(),
            "versions": {module.__name__: module.__version__ for module in (smattn, torch, triton)} | {"python": platform.python_version()},
            "commit": describe_commit(),
            "command": self.command,
            "kernels": which_cpu_kernels(self.kernels) if on_a_cpu else "",
        }

    def save(self) -> None:
        """Write the rows so far."""
        if self.file:
            write(self.rows, self.file)

    def without_rows(self) -> Job:
        """A copy that rows can be added to elsewhere."""
        other = copy.copy(self)
        other.rows, other.file = [], None
        return other

    def check(self, backends: list[str], cells: list[Cell], until: float = math.inf) -> None:
        """Validate every backend in every cell. One that is outside the budget is not timed there: a wrong kernel's time is no news.

        until: on time.monotonic's clock, when `measure` begins no cell any more, and there is nothing to validate for.
        On a GPU a process of its own validates, which a broken kernel may take down.
        """
        if self.kernels:
            select_cpu_kernels(self.kernels)
        wanted = dict.fromkeys((cell.workload, cell.mask, cell.dtype) for cell in cells)
        scores, apart = largest(self.device), on_a_gpu(self.device)
        with Worker() as worker:
            for (workload, mask, dtype), backend in product(wanted, backends):
                if time.monotonic() > until:
                    break
                key = Check(ours(backend, self.kernels).name, workload.name, mask, dtype)
                arguments = (backend, fitting(workload, scores), mask, dtype, self.device)
                try:
                    found = replace(worker(validate, *arguments) if apart else validate(*arguments), backend=key.name)
                except Exception as error:  # A kernel that does not compile, say, leaves the others to be measured.
                    kind = "" if apart else f"{type(error).__name__}: "  # A worker names it.
                    self.failed[key] = kind + in_a_line(error)
                    print(f"{key}: {error}", flush=True)
                    continue
                self.keep(found)
                if not found.within:
                    self.failed[key] = "outside the error budget"

    def keep(self, validation: Validation) -> None:
        dtype = getattr(torch, validation.dtype)
        self.validations[Check(validation.backend, validation.workload, validation.mask, dtype)] = validation
        print("\n".join(validation.lines()), flush=True)

    def refuse(self, name: str, cell: Cell, why: str) -> None:
        """Time this contestant no more in this cell."""
        self.failed[check_of(name, cell)] = why

    def refusal(self, name: str, cell: Cell) -> str | None:
        """Why this contestant, wrong or broken in this cell, is not timed there."""
        return self.failed.get(check_of(name, cell)) or self.not_compiled.get(self.at(name, cell))

    @staticmethod
    def at(name: str, cell: Cell) -> str:
        return f"{name}, {cell.workload.name} {name_of(cell.dtype)}, {cell.direction}"

    def verdict(self) -> str | None:
        """What of smattn failed, for sys.exit at the end; None when nothing did."""
        failed = [f"{key}: {why}" for key, why in self.failed.items() if key.name.startswith(OURS)]
        return "not timed, for it failed the check: " + "; ".join(failed) if failed else None

    def add(
        self, cell: Cell, backend: str, taken: list[float] | None = None, extra: int | None = None, skipped: str | None = None,
        cache: str = WARM,
    ) -> None:  # fmt: skip
        """Add the row of one contestant in a cell; taken: milliseconds."""
        validation = self.validations.get(check_of(backend, cell))
        self.add_row(
            backend, taken, workload=cell.workload.name, shape=cell.shape, mask=cell.mask, dtype=cell.dtype, direction=cell.direction,
            cache=cache, default=backend == ours(default_backend(cell), self.kernels).name, extra_bytes=extra, io_bytes=cell.io_bytes,
            flops=cell.flops, matmul_ms=self.matmul_ms, skipped=skipped, errors=asdict(validation) if validation else None,
        )  # fmt: skip

    def add_matmul(self, dtype: torch.dtype, taken: list[float], workload: str = MATMUL, side: int = SIDE) -> None:
        """Add the row of torch.mm at side^3."""
        sizes = {"io_bytes": 3 * side**2 * dtype.itemsize, "flops": 2 * side**3}
        self.add_row("torch.mm", taken, workload=workload, shape=(side,) * 3, dtype=dtype, **sizes)

    def add_row(
        self, backend: str, taken: list[float] | None, *, workload: str, shape: tuple[int, ...], dtype: torch.dtype, io_bytes: int,
        flops: int, mask: str = "none", direction: str = FORWARD, cache: str = WARM, default: bool = False, extra_bytes: int | None = None,
        matmul_ms: float | None = None, skipped: str | None = None, errors: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Add a row of this run. Every row of every study is made here. taken: milliseconds, None when it was not timed."""
        times = asdict(timing(taken)) if taken else {"median_ms": None, "p10": None, "p90": None, "reps": 0}
        self.rows.append(
            Row(
                **times, **self.about, workload=workload, shape=shape, mask=mask, dtype=name_of(dtype), direction=direction, cache=cache,
                backend=backend, default=default, extra_bytes=extra_bytes, io_bytes=io_bytes, flops=flops, matmul_ms=matmul_ms,
                errors=errors, skipped=skipped,
            )
        )  # fmt: skip

    def path(self, *labels: str) -> Path:
        """Where the rows go: bench/results/<date>-<device>-<labels>.jsonl, with a number behind it where that is committed already."""
        slug = re.sub(r"[^a-z0-9]+", "-", describe_device(self.device).lower()).strip("-")
        stem = "-".join([f"{datetime.date.today()}", slug, *labels])
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        return next(path for name in names if not committed(path := RESULTS / f"{name}.jsonl"))


def check_of(name: str, cell: Cell) -> Check:
    return Check(name, cell.workload.name, cell.mask, cell.dtype)


def default_backend(cell: Cell) -> str:
    """The backend that backend=None takes."""
    problem, kind = cell.smaller().blank().problem(), torch.device(cell.device).type
    return next(row.name for row in TABLE if kind in row.default_on and not row.unsupported_reasons(problem, "forward"))


def available_backends(device: str) -> list[str]:
    """The backends of the device. Triton is not among a CPU's, where it is interpreted."""
    kind = torch.device(device).type
    names = [row.name for row in TABLE if row.runs_on(kind) and not (kind == "cpu" and row.name == "triton")]
    return [name for name in names if smattn.backends()[name].available]
