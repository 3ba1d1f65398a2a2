"""A call that is made again: it repeats the allocations and launches of an earlier one, without planning or describing anything.

Python needs several times as long to plan a call and to name its kernels' arguments as to hand them to the driver. All of it follows
from the call's key: shapes, strides, dtypes, flags, device, and each address modulo ALIGNMENT, for which Triton compiles. So the first
call of a key only leaves its key here, the second is recorded while it runs, and every later one is repeated on its own tensors, with new
buffers. Lengths that never come twice cost a key each, and no record.

A record is kept only if it is all that the call did: torch's operators other than allocations and views have to be announced as steps.
Only real tensors come here, since torch.compile and torch.export call the fake functions of ops.py with theirs. A record holds no tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = 1024  # keys; the oldest one goes first
ALIGNMENT = 16  # bytes
ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)

Step = Callable[[list[Tensor], list[int]], None]  # of all tensors of the call, inputs first, and their addresses


class Record(NamedTuple):
    """What a call does with its inputs."""

    buffers: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # sizes and dtype of every allocation, results included
    steps: tuple[Step, ...]
    results: tuple[int, ...]  # their places among inputs and buffers

    def repeat(self, tensors: list[Tensor], addresses: list[int]) -> tuple[Tensor, ...]:
        device = tensors[0].device
        buffers = [torch.empty(sizes, dtype=dtype, device=device) for sizes, dtype in self.buffers]
        tensors += buffers
        addresses += [buffer.data_ptr() for buffer in buffers]
        for step in self.steps:
            step(tensors, addresses)
        return tuple([tensors[place] for place in self.results])


class Recording(TorchDispatchMode):
    """Sees what a call allocates, and is told of its launches. It holds every buffer until the end, so that no two have one address."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = list(inputs)
        self.inputs = len(inputs)
        self.steps: list[Step] = []
        self.is_complete = True
        self._is_hidden = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS and not self._is_hidden:
            self.tensors.append(result)
            self.is_complete &= result.is_contiguous() and result.device == self.tensors[0].device
        elif not self._is_hidden:
            self.is_complete &= function.is_view
        return result

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside the block torch's operators are part of a step."""
        self._is_hidden = True
        try:
            yield
        finally:
            self._is_hidden = False

    def place_of(self, tensor: Tensor, whole: bool = False) -> int:
        """The place of the call's tensor at this address; `whole`: and of its form. Where there is none, the call cannot be repeated."""
        address = tensor.data_ptr()
        found = next((place for place, other in enumerate(self.tensors) if other.data_ptr() == address and other.numel() > 0), -1)
        self.is_complete &= found >= 0 and not (whole and _form(self.tensors[found]) != _form(tensor))
        return found

    def record(self, results: Sequence[Tensor]) -> Record | None:
        """All of it, or None where that is not all that the call did, or where results are not whole buffers."""
        buffers = [(tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) for tensor in self.tensors[self.inputs :]]
        places = []
        for result in results:
            form = (result.data_ptr(), tuple(result.shape), result.dtype)
            place = next((i for i, buffer in enumerate(buffers) if buffer == form and self.inputs + i not in places), None)
            if place is None or not result.is_contiguous():
                return None
            places.append(self.inputs + place)
        return Record(tuple(buffer[1:] for buffer in buffers), tuple(self.steps), tuple(places)) if self.is_complete else None


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


SEEN, NEVER = "seen once", "cannot be repeated"
_records: dict[tuple[Any, ...], Record | str] = {}
_changes = threading.Lock()
_here = threading.local()
_is_on = True


def switch(on: bool) -> None:
    """From now on calls are repeated, or all made anew. Either way nothing of earlier ones is kept: what decides a call may change now."""
    global _is_on
    _is_on = on
    forget()


def forget() -> None:
    with _changes:
        _records.clear()


def recording() -> Recording | None:
    """The recording of the call that this thread makes, if it is recorded."""
    found: Recording | None = getattr(_here, "recording", None)
    return found


def call(compute: Callable[..., tuple[Tensor, ...]], arguments: tuple[Any, ...], tensors: int) -> tuple[Tensor, ...]:
    """compute(*arguments), an op's results, or the same by an earlier call's record. The first `tensors` arguments are Tensor | None."""
    if not _is_on:
        return compute(*arguments)
    inputs: list[Tensor] = []
    addresses: list[int] = []
    parts: list[Any] = [compute]
    for x in arguments[:tensors]:
        if x is None:
            parts.append(None)
        else:
            address = x.data_ptr()
            inputs.append(x)
            addresses.append(address)
            parts += (x.shape, x.stride(), x.dtype, x.get_device(), address % ALIGNMENT)
    parts += [tuple(flag) if isinstance(flag, list) else flag for flag in arguments[tensors:]]
    key = tuple(parts)
    known = _records.get(key)
    if isinstance(known, Record):
        return known.repeat(inputs, addresses)
    if known is None:
        _keep(key, SEEN)
    elif known is SEEN and _are_apart(inputs):
        return _record(key, compute, arguments, inputs)
    return compute(*arguments)


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether an address tells which input is meant."""
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel() > 0]
    return len(set(addresses)) == len(addresses)


def _record(
    key: tuple[Any, ...], compute: Callable[..., tuple[Tensor, ...]], arguments: tuple[Any, ...], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    _here.recording = Recording(tensors)
    try:
        with _here.recording as made:
            results = compute(*arguments)
        _keep(key, made.record(results) or NEVER)
    finally:
        _here.recording = None
    return results


def _keep(key: tuple[Any, ...], value: Record | str) -> None:
    with _changes:
        if key not in _records and len(_records) >= LIMIT:
            del _records[next(iter(_records))]
        _records[key] = value
