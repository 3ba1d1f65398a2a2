"""Where every kernel is started, recorded for ahead-of-time compilation, or prepared to be started again (see smattn/prepared.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import prepared
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
    prepared.switch(recorder is None)


def launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
    """Start `programs` programs of a kernel on the current stream."""
    recording = prepared.recording()
    if _recorder is not None:
        _recorder.take(kernel, programs, arguments, tile)
    elif recording is None:
        kernel[(programs,)](**arguments, **tile.options())
    else:
        with recording.hidden():
            compiled = kernel[(programs,)](**arguments, **tile.options())
            recording.steps.append(_again(recording, kernel, programs, arguments, tile, compiled))


def torch_step(function: Callable[..., Any], *tensors: Tensor | None) -> None:
    """What torch does between launches, function(*tensors), which may allocate and must write to one of the tensors."""
    recording = prepared.recording()
    if recording is None:
        function(*tensors)
        return
    with recording.hidden():
        function(*tensors)
    places = [None if tensor is None else recording.place_of(tensor, whole=True) for tensor in tensors]
    recording.steps.append(lambda tensors, addresses: function(*[None if place is None else tensors[place] for place in places]))


def _again(
    recording: prepared.Recording, kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile, compiled: Any
) -> prepared.Step:
    """The same launch with the pointers of another call, and TMA descriptors made anew from them.

    A compiled kernel is launched as Triton's tutorials do it, compiled[grid](*arguments): its arguments are not looked at again. In their
    places it takes addresses too. compiled is None under the interpreter, which takes tensors.
    """
    values = [arguments[name] for name in kernel.arg_names]
    for at, x in enumerate(values):
        if isinstance(x, Tensor) and x.numel() == 0:
            values[at] = torch.empty(0, dtype=x.dtype, device=x.device)  # nothing is read there; x itself may be a view of an input
    pointers = [(at, recording.place_of(x), x.dtype) for at, x in enumerate(values) if isinstance(x, Tensor) and x.numel() > 0]
    described = [(at, x, recording.place_of(x.base)) for at, x in enumerate(values) if isinstance(x, TensorDescriptor)]
    descriptors = [(at, place, {**vars(x), "base": None}) for at, x, place in described]
    for at, *_ in pointers + described:
        values[at] = None  # the record shall keep no tensor alive
    run = None if compiled is None else compiled[(programs, 1, 1)]

    def step(tensors: list[Tensor], addresses: list[int]) -> None:
        filled = values.copy()
        for at, place, fields in descriptors:
            filled[at] = _descriptor(fields, tensors[place])
        if run is not None:
            for at, place, _ in pointers:
                filled[at] = addresses[place]
            run(*filled)
        else:
            for at, place, dtype in pointers:
                filled[at] = tensors[place].view(dtype)
            kernel[(programs,)](*filled, **tile.options())

    return step


def _descriptor(fields: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """One with the fields of another that Triton has checked, the base apart. To check it again takes longer than to launch a kernel."""
    # It checks shapes, strides, dtypes and alignment, of which the record's key has all, and every buffer is aligned.
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__ = {**fields, "base": base}
    return made


def arch_of(device: torch.device) -> int:
    """The chip to choose tiles for: the device's own, or the one that launches are recorded for."""
    return chip.arch_of(device) if _recorder is None else _recorder.arch
