"""Validate out and all five gradients of a backend against float64, beside plain PyTorch's errors and the budget of smattn.testing.

`TRITON_INTERPRET=1 python -m bench.measuring.validate` validates interpreted Triton at reduced sizes and prints JSON, which bench.run on a
CPU reads.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

import smattn
from bench.measuring.machine import ROOT, name_of
from smattn.testing import WORKLOADS, Case, Error, Workload, errors, run, workload_case

LARGEST = {"cpu": 2**23, "cuda": 2**27}  # scores, for which float64 takes seconds
BYTES = 256  # of a GPU's memory that a score needs: float64 takes two dozen tensors of scores
INTERPRETED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Validation:
    """The errors of one backend on one workload, as in smattn.testing. Each norm is (max, Frobenius)."""

    backend: str
    workload: str
    shape: tuple[int, ...]  # B, H, Nq, Nk, D as validated, which is the workload's unless that is too large
    mask: str
    dtype: str
    tensors: dict[str, dict[str, Any]]  # "out", "dquery" and so on -> error, plain, allowed, within

    @property
    def within(self) -> bool:
        return all(tensor["within"] for tensor in self.tensors.values())

    def share(self, name: str) -> float:
        """The share of its budget that a tensor uses, in the worse norm."""
        tensor = self.tensors[name]
        return max(error / allowed if error else 0.0 for error, allowed in zip(tensor["error"], tensor["allowed"], strict=True))

    def lines(self) -> Iterator[str]:
        yield f"{self.backend}  {self.workload} {self.dtype} {self.mask}, B H Nq Nk D = {' '.join(map(str, self.shape))}"
        yield f"    {'':8}{'error':>10}{'plain':>10}{'allowed':>10}    budget used (max norm shown, the worse of two norms counted)"
        for name, tensor in self.tensors.items():
            error, plain, allowed = (tensor[key][0] for key in ("error", "plain", "allowed"))
            verdict = "" if tensor["within"] else "   OUTSIDE"
            yield f"    {name:8}{error:10.1e}{plain:10.1e}{allowed:10.1e}{self.share(name):7.0%}{verdict}"


def validate(backend: str, workload: Workload, mask: str, dtype: torch.dtype, device: str) -> Validation:
    return validate_case(backend, _case(workload, mask, dtype, device), workload, mask)


@lru_cache(1)  # One backend after the other takes it.
def _case(workload: Workload, mask: str, dtype: torch.dtype, device: str) -> Case:
    return workload_case(workload, mask=mask, dtype=dtype, device=device)


def validate_case(backend: str, case: Case, w: Workload, mask: str) -> Validation:
    rows = errors(run(case, backend=backend), case)
    shape, dtype = (math.prod(w.batch), w.H, w.Nq, w.Nk, w.D), name_of(case.query.dtype)
    return Validation(f"smattn/{backend}", w.name, shape, mask, dtype, {row.name: _as_dict(row) for row in rows})


def _as_dict(row: Error) -> dict[str, Any]:
    return {"error": row.error, "plain": row.plain, "allowed": row.allowed, "within": row.within}


def largest(device: str) -> int:
    """The number of scores that the float64 reference can be given."""
    kind = torch.device(device).type
    return LARGEST[kind] if kind == "cpu" else min(LARGEST[kind], torch.cuda.mem_get_info(device)[0] // BYTES)


def fitting(w: Workload, scores: int = LARGEST["cpu"]) -> Workload:
    """The workload with as much of its batch, then heads, then queries as so many scores hold. Keys and head size stay."""
    rows = w.rows and min(w.rows, max(1, scores // (w.H * w.Nq * w.Nk)))
    scores //= rows or 1  # those of each row
    B = min(w.B, max(1, scores // (w.H * w.Nq * w.Nk)))
    H = min(w.H, max(1, scores // (B * w.Nq * w.Nk)))
    return replace(w, B=B, rows=rows, H=H, Nq=min(w.Nq, max(1, scores // (B * H * w.Nk))))


def reduced(w: Workload) -> Workload:
    """A workload small enough for an interpreter, and still of several blocks."""
    return replace(w, B=1, rows=w.rows and 2, H=2, Nq=min(w.Nq, 136), Nk=min(w.Nk, 100))


def interpreted_triton(names: list[str]) -> list[Validation] | str:
    """Validate interpreted Triton on the named workloads, in a process of its own; or say why that is not possible here."""
    if os.name != "posix":
        return "Triton needs Linux"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", __spec__.name, *names], env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        return (done.stderr.strip() or "no message").splitlines()[-1]
    return [Validation(**json.loads(line)) for line in done.stdout.splitlines()]


def main(names: list[str]) -> None:
    status = smattn.backends()["triton"]
    if not status.available:
        sys.exit(f"not available: {'; '.join(status.reasons)}")
    for name in names:
        for dtype in INTERPRETED_DTYPES:
            result = validate("triton", reduced(WORKLOADS[name]), "uniform", dtype, "cpu")
            print(json.dumps({**vars(result), "backend": "smattn/triton (interpreted)"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
