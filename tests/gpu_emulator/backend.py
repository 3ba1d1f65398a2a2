"""Backends whose kernels are compiled for a chip and run by the emulator: the Triton backend as it is, except for who runs a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smattn import validate
from smattn.call import Problem
from smattn.kernels import backend, launch
from smattn.kernels.tiles import Tile
from smattn.kernels.tools import jobs

from .compile import Change, States, bytes_of, state_of
from .compile import launch as run_compiled
from .counters import Counts

CHIPS = (80, 90)
backends: Any = import_module("smattn.backends")  # of this name the package exports a function


class Launched(launch.Recorder):
    """Where launches go: they run, one after the other, and what they executed is added up by kernel."""

    def __init__(self, emulated: Emulated) -> None:
        super().__init__(emulated.arch)
        self.emulated = emulated
        self.states: States = {}

    def take(self, kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
        name, counts = jobs.name_of(kernel), Counts(detailed=self.emulated.detailed)
        self.emulated.counts.append((name, tile, arguments, counts))
        run_compiled(kernel, programs, arguments, tile, self.arch, self.states, counts, self.emulated.changes.get(name))


class Uninitialised(TorchDispatchMode):
    """Inside, torch.empty fills memory with ones, which are NaN, and says which storages hold nothing yet."""

    def __init__(self, states: States) -> None:
        super().__init__()
        self.states, self.kept = states, list[Tensor]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "aten.empty" in str(function) or "aten.new_empty" in str(function):
            self.kept.append(result)  # no other storage may get its address
            bytes_of(result)[:] = 0xFF
            self.states[result.untyped_storage().data_ptr()] = state_of(result)
        return result


class Module:
    """A module of smattn.backends that stands for another one, whose functions it runs where its launches go."""

    module: Any
    launches: Callable[[], AbstractContextManager[None]]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """forward, backward, attention_map and attention_map_backward."""
        if name.startswith("_") or not hasattr(self.module, name):
            raise AttributeError(name)

        def run(*arguments: Any, **options: Any) -> Any:
            with self.launches():
                return getattr(self.module, name)(*arguments, **options)

        return run


@dataclass
class Emulated(Module):
    """Triton's kernels on one chip."""

    arch: int
    counts: list[tuple[str, Tile, dict[str, Any], Counts]] = field(default_factory=list)
    detailed: bool = False  # whether requests to memory are counted
    changes: dict[str, Change] = field(default_factory=dict)  # kernel -> what is done to it before it runs
    module: Any = backend

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        there = problem._replace(device_type="cuda")
        about_the_machine = backend.unsupported_reasons(there._replace(dtype=torch.float32, D=1, Dv=1))
        return [reason for reason in backend.unsupported_reasons(there) if reason not in about_the_machine]

    @contextmanager
    def launches(self) -> Iterator[None]:
        recorder = Launched(self)
        launch.record(recorder)
        try:
            with Uninitialised(recorder.states):
                yield
        finally:
            launch.record(None)


@dataclass(frozen=True)
class Row(backends.Backend):
    emulated: Module | None = None

    def load(self) -> Any:
        return self.emulated


def name_of(arch: int) -> str:
    return f"triton compiled for sm_{arch}, emulated"


def install(*archs: int) -> dict[int, Emulated]:
    """Put the chips' rows into smattn's table of backends."""
    made = {arch: Emulated(arch) for arch in archs}
    add_rows(*(Row(name_of(arch), ("cpu",), "", (), emulated) for arch, emulated in made.items()))
    return made


def add_rows(*rows: Row) -> None:
    backends.TABLE = (*backends.TABLE, *rows)
    backends.NAMES = validate.NAMES = tuple(row.name for row in backends.TABLE)
