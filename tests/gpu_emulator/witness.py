"""Which barriers of a kernel a run needs, by definition: between the barrier before one and the barrier behind it, one warp uses a byte of
shared memory before it, another behind it, and one of the two writes.

Racecheck finds the same by what it keeps of each byte since the last barrier. This keeps both sides whole, and is too slow for every run.
A warpgroup that waits for its products may write where they read, and whoever waits for a tensor copy is behind it and what went before it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from . import machine
from .memory import Array, GlobalMemory
from .parser import Immediate, Instruction, Kernel
from .shared import SharedMemory
from .translate import Step, Translator, instruction

NEEDED: set[tuple[str, int]] = set()  # the kernel, and the number of the instruction


class Witness(SharedMemory):
    """Of each byte a bit for each warp that read or wrote it, and for each warpgroup whose products read it, on both sides of a barrier."""

    KINDS = ("read", "wrote", "multiplied")
    OF_EACH_BYTE = (*SharedMemory.OF_EACH_BYTE, *KINDS, *(f"{kind}_before" for kind in KINDS))
    barrier_between = ("", -1)

    def __init__(self, programs: int, size: int) -> None:
        super().__init__(programs, size)
        for name in self.OF_EACH_BYTE[-2 * len(self.KINDS) :]:
            setattr(self, name, np.zeros(self.data.size, np.uint16))

    def rows(self, chosen: Array) -> SharedMemory:
        part = super().rows(chosen)
        part.barrier_between = self.barrier_between  # type: ignore[attr-defined]
        return part

    def barrier(self) -> None:
        super().barrier()
        for kind in self.KINDS:
            setattr(self, f"{kind}_before", getattr(self, kind))
            setattr(self, kind, np.zeros(self.data.size, np.uint16))

    def _use(self, index: Array, size: int, warp: Array, writes: bool, marks: str) -> None:
        """index: (threads, elements) of `size` bytes."""
        places = (index[:, :, None] * size + np.arange(size)).reshape(len(index), -1)
        one = np.ones((), np.uint16)
        bit, group = (one << warp.astype(np.uint16))[:, None], (one << (warp // 4).astype(np.uint16))[:, None]
        others = self.wrote_before[places] & ~bit
        if writes:
            others |= self.read_before[places] & ~bit | self.multiplied_before[places] & ~group
        if others.any():
            NEEDED.add(self.barrier_between)
        if marks:
            np.bitwise_or.at(getattr(self, marks), places, np.broadcast_to(bit, places.shape))

    def load(self, index: Array, size: int, warp: Array) -> Array:
        self._use(index, size, warp, False, "read")
        return super().load(index, size, warp)

    def store(self, index: Array, values: Array, warp: Array) -> None:
        self._use(index, values.dtype.itemsize, warp, True, "wrote")
        super().store(index, values, warp)

    def begin_copy(self, bytes_index: Array, warp: Array) -> None:
        self._use(bytes_index[:, None], 1, warp, True, "wrote")
        super().begin_copy(bytes_index, warp)

    def end_copy(self, bytes_index: Array, values: Array, writer: Array | int) -> None:
        if isinstance(writer, int):
            for name in self.OF_EACH_BYTE[-2 * len(self.KINDS) :]:
                getattr(self, name)[bytes_index] = 0
        else:
            self._use(bytes_index[:, None], 1, writer - 1, True, "wrote")
        super().end_copy(bytes_index, values, writer)

    def begin_mbarrier(self, index: Array, warp: Array) -> None:
        self._use(index, 8, warp, True, "wrote")
        super().begin_mbarrier(index, warp)

    def use_mbarrier(self, index: Array, warp: Array) -> None:
        """What one warp does, to arrive or to send a copy, could end the wait of the others for what was before."""
        self._use(index, 8, warp, bool((warp == warp[0]).all()), "read")
        super().use_mbarrier(index, warp)

    def end_mbarrier(self, index: Array, warp: Array) -> None:
        self._use(index, 8, warp, True, "wrote")
        super().end_mbarrier(index, warp)

    def begin_product(self, places: Array) -> None:
        if self.wrote_before[places].any():
            NEEDED.add(self.barrier_between)
        super().begin_product(places)

    def end_product(self, places: Array) -> None:
        for number in range(places.shape[1]):
            self.multiplied[places[:, number]] |= np.uint16(1 << number)
        super().end_product(places)


class NothingExchanged(GlobalMemory):
    """Barriers put accesses to global memory in order as well. They matter where a kernel loads what it stores, and none here does."""

    def finish(self) -> None:
        assert not ((self.loads.who != 0) & (self.stores.who != 0)).any()
        super().finish()


def watched(kernel: Kernel) -> Kernel:
    """The kernel with barriers that say which they are, for a run whose shared memory is a Witness."""
    each = kernel.instructions
    return replace(kernel, instructions=[_named(at, one) if one.opcode == "bar.sync" else one for at, one in enumerate(each)])


def _named(at: int, barrier: Instruction) -> Instruction:
    return barrier._replace(opcode="watched.bar.sync", operands=(*barrier.operands, Immediate(at)))


@instruction(r"watched\.bar\.sync")
def barrier(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    number = each.operands[1]
    assert isinstance(number, Immediate)

    def run(group: machine.Group, active: Array | None) -> None:
        group.barrier(active)
        shared: Any = group.shared
        shared.barrier_between = (group.launch.code.kernel.name, number.value)

    return Step(run, ())
