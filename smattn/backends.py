"""The one table of backends: which exist, what each cannot do, and which one runs a call.

A backend is a module with these functions, as reference.py has them; it is imported when it is first considered:

    unsupported_reasons(problem) -> list[str]
    forward(call, *, save_out, save_mbar) -> (out, Saved)
    backward(call, saved, dout, dlse, needs) -> Gradients
    attention_map(call) -> (map, Saved)
    attention_map_backward(call, saved, dmap, needs) -> Gradients
"""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from .call import Problem

_import = cache(importlib.import_module)  # importlib takes microseconds to find what it has imported before


class Status(NamedTuple):
    """Whether a backend can run on this machine, or every reason why not; and where it has several sets of kernels, which runs and why."""

    available: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    name: str
    device_types: tuple[str, ...] | None  # None stands for every device
    module: str
    default_on: tuple[str, ...]  # device types on which backend=None considers it before the reference

    def runs_on(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    def load(self) -> ModuleType:
        return _import(self.module)

    def unsupported_reasons(self, problem: Problem, operation: str) -> list[str]:
        """Why this backend cannot run `operation`, one of the functions above, on such a call; empty when it can."""
        if not self.runs_on(problem.device_type):
            return [f"it does not run on device type {problem.device_type!r}, only on {', '.join(self.device_types or ())}"]
        try:
            module = self.load()
        except ImportError as error:
            return [f"it could not be imported: {error}"]
        reasons: list[str] = module.unsupported_reasons(problem)
        return reasons if hasattr(module, operation) else [*reasons, f"it has no {operation} in this version"]


TABLE = (
    Backend("triton", ("cuda", "cpu"), "smattn.kernels.backend", default_on=("cuda",)),
    Backend("cuda", ("cuda", "cpu"), "smattn.cuda", default_on=("cuda",)),
    Backend("cpu", ("cpu",), "smattn.cpu", default_on=("cpu",)),
    Backend("reference", None, "smattn.reference", default_on=("cuda", "cpu")),  # the last resort on every device: it is plain torch
)
NAMES = tuple(row.name for row in TABLE)


def resolve(problem: Problem, name: str, operation: str) -> ModuleType:
    """The module that runs this call: the one named, or for "" the first of the table that can. The reference, its last, always can.

    Raises ValueError with every reason if the one named cannot run it. Warns once if none but the reference can.
    """
    if name:
        chosen = next(row for row in TABLE if row.name == name)
        reasons = chosen.unsupported_reasons(problem, operation)
        if reasons:
            raise ValueError(f"backend={name!r} cannot run this call: {'; '.join(reasons)}")
        return chosen.load()
    *fused, reference = TABLE
    refused: list[str] = []
    for row in fused:
        if row.runs_on(problem.device_type) and problem.device_type not in row.default_on:
            continue
        reasons = row.unsupported_reasons(problem, operation)
        if not reasons:
            return row.load()
        refused.append(f"{row.name}: {', '.join(reasons)}")
    _warn_once(f"smattn runs on the reference, which is slow and holds whole score tensors: {'; '.join(refused)}")
    return reference.load()


def backends() -> dict[str, Status]:
    """What this machine can run: backend name -> Status(available, reasons why not, notes on what runs).

    A backend is available when it runs a small float32 call on one of the machine's devices.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    table = {}
    for row in TABLE:
        reasons = {device: row.unsupported_reasons(_probe(device), "forward") for device in devices}
        available = not all(reasons.values())
        why_not = () if available else tuple(dict.fromkeys(sum(reasons.values(), [])))
        notes: tuple[str, ...] = getattr(row.load(), "notes", tuple)() if available else ()
        table[row.name] = Status(available, why_not, notes)
    return table


def _probe(device_type: str) -> Problem:
    return Problem(1, 1, 1, 1, 1, 32, 32, torch.float32, None, None, device_type)


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """The stacklevel at which a warning of the function that asks points at the first line outside of smattn and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("smattn", "torch"):
        level, frame = level + 1, frame.f_back
    return level
