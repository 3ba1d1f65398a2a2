"""Where every kernel is started, or recorded for ahead-of-time compilation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from . import chip
from .tiles import Tile


@dataclass
class Recorder:
    """Collects launches instead of running them, for ahead-of-time compilation: (kernel, arguments, tile)."""

    arch: int
    launches: list[tuple[Any, dict[str, Any], Tile]] = field(default_factory=list)

    def take(self, kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
        self.launches.append((kernel, arguments, tile))


_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """From now on hand every launch to `recorder`. With None, kernels run again."""
    global _recorder
    _recorder = recorder


def launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
    """Start `programs` programs of a kernel on the current stream."""
    if _recorder is not None:
        _recorder.take(kernel, programs, arguments, tile)
    else:
        kernel[(programs,)](**arguments, **tile.options())


def arch_of(device: torch.device) -> int:
    """The chip to choose tiles for: the device's own, or the one that launches are recorded for."""
    return chip.arch_of(device) if _recorder is None else _recorder.arch
