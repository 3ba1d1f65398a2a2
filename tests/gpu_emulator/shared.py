"""Shared memory of the programs that run together, and what racecheck knows of each byte."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import UNSIGNED, Array, Fault

BASE = 1024  # the address of the first byte, aligned as tensor copies want it; below lies nothing
# Who wrote a byte since the last barrier: 0 for nobody, 1 + warp, or SEVERAL. Marks: it holds nothing, or a copy is under way.
SEVERAL, BY_WARPS, COPYING, UNWRITTEN = 63, 0x3F, 0x40, 0x80
OF_WARPGROUP = 100  # + its number: read by a wgmma of that warpgroup, since the last barrier


class SharedMemory:
    """The bytes of `programs` programs one behind the other. An index is a byte's place in that, an address is what PTX sees."""

    OF_EACH_BYTE = ("data", "writer", "reader", "held", "unfenced")

    def __init__(self, programs: int, size: int) -> None:
        self.programs, self.size = programs, -(-size // 16) * 16
        total = programs * self.size
        self.data = np.full(total, 0xFF, np.uint8)
        self.writer = np.full(total, UNWRITTEN, np.uint8)
        self.reader = np.zeros(total, np.uint8)
        self.held = np.zeros(total, np.uint8)  # mbarriers, and operands of a wgmma that nobody waited for yet
        self.unfenced = np.zeros(total, np.uint8)  # written by threads, and not yet made visible to TMA and wgmma

    def rows(self, chosen: Array) -> SharedMemory:
        """The memory of some of the programs."""
        part = type(self)(0, 0)
        part.programs, part.size = int(chosen.sum()), self.size
        for name in self.OF_EACH_BYTE:
            setattr(part, name, getattr(self, name).reshape(self.programs, -1)[chosen].reshape(-1))
        return part

    def index(self, row: Array, addresses: Array, size: int, count: int) -> Array:
        """(threads, count) places of elements of `size` bytes, in units of such elements."""
        offsets = addresses.astype(np.int64) - BASE
        total = size * count
        if (outside := (offsets < 0) | (offsets > self.size - total)).any():
            raise Fault("memcheck", f"access outside of shared memory, {int(outside.sum())} threads, first at {int(addresses[outside][0])}")
        if (offsets % total).any():
            raise Fault("memcheck", f"access of {total} bytes to shared memory that is not aligned")
        return (row * self.size + offsets)[:, None] // size + np.arange(count)

    def load(self, index: Array, size: int, warp: Array) -> Array:
        """What each thread reads. warp: of each thread."""
        kind = UNSIGNED[size]
        mine = _repeated(warp + 1, kind)[:, None]
        self.check_readable(index, kind, mine)
        self._note_readers(index, kind, mine)
        return self.data.view(kind)[index]

    def _note_readers(self, index: Array, kind: np.dtype[Any], mine: Array) -> None:
        readers = self.reader.view(kind)
        before = readers[index]
        after = np.where((before == 0) | (before == mine), mine, _repeated(np.uint8(SEVERAL), kind))
        readers[index] = after
        if (lost := readers[index] != after).any():
            readers[index[lost]] = _repeated(np.uint8(SEVERAL), kind)

    def check_readable(self, index: Array, kind: np.dtype[Any], mine: Array) -> None:
        """Nobody else wrote there since the last barrier, no copy is under way, and something was written at all."""
        writers = self.writer.view(kind)[index]
        doubtful = (writers != 0) & (writers != mine)
        if not doubtful.any():
            return
        codes = np.ascontiguousarray(writers[doubtful]).view(np.uint8)
        own = np.ascontiguousarray(np.broadcast_to(mine, writers.shape)[doubtful]).view(np.uint8)
        if (codes & COPYING).any():
            raise Fault("racecheck", "load of shared memory where a copy was not waited for")
        if (codes & UNWRITTEN).any():
            raise Fault("memcheck", "load of shared memory that was never written")
        if ((codes != 0) & (codes != own)).any():
            raise Fault("racecheck", "load of what another warp stored to shared memory, and no barrier between")

    def store(self, index: Array, values: Array, warp: Array) -> None:
        kind = values.dtype
        mine = _repeated(warp + 1, kind)[:, None]
        data, writers = self.data.view(kind), self.writer.view(kind)
        self.check_writable(index, kind, mine, warp)
        if (self._written_by_others(index, kind, mine) & (data[index] != values)).any():
            raise Fault("racecheck", "store over what another warp stored to shared memory, and no barrier between")
        data[index] = values
        if (data[index] != values).any():
            raise Fault("repeatability", "threads store different values to one address of shared memory")
        writers[index] = np.broadcast_to(mine, index.shape)
        if (lost := writers[index] != mine).any():
            writers[index[lost]] = _repeated(np.uint8(SEVERAL), kind)
        self.unfenced.view(kind)[index] = _repeated(np.uint8(1), kind)

    def check_writable(self, index: Array, kind: np.dtype[Any], mine: Array, warp: Array) -> None:
        """Nobody else read there since the last barrier, and neither a copy nor a wgmma nor an mbarrier uses it."""
        if self.held.view(kind)[index].any():
            raise Fault("racecheck", "write to an operand of a wgmma that was not waited for, or to an mbarrier")
        if (self.writer.view(kind)[index] & _repeated(np.uint8(COPYING), kind)).any():
            raise Fault("racecheck", "write where a copy was not waited for")
        readers = self.reader.view(kind)[index]
        group = _repeated(OF_WARPGROUP + warp // 4, kind)[:, None]
        if ((readers != 0) & (readers != mine) & (readers != group)).any():
            codes = np.ascontiguousarray(np.where((readers != mine) & (readers != group), readers, 0)).view(np.uint8)
            own = np.ascontiguousarray(np.broadcast_to(mine, readers.shape)).view(np.uint8)
            groups = np.ascontiguousarray(np.broadcast_to(group, readers.shape)).view(np.uint8)
            if ((codes != 0) & (codes != own) & (codes != groups)).any():
                raise Fault("racecheck", "write over what another warp read of shared memory, and no barrier between")

    def _written_by_others(self, index: Array, kind: np.dtype[Any], mine: Array) -> Array:
        """Since the last barrier."""
        by = self.writer.view(kind)[index] & _repeated(np.uint8(BY_WARPS), kind)
        codes = np.ascontiguousarray(by).view(np.uint8).reshape(*by.shape, -1)  # of each byte: wide stores go over narrow ones
        return ((codes != 0) & (codes != np.ascontiguousarray(mine).view(np.uint8).reshape(len(mine), 1, -1))).any(-1)

    def _check_unused(self, index: Array, kind: np.dtype[Any], warp: Array) -> Array:
        """Nobody else read or wrote there since the last barrier, and nothing is under way. Returns the code of each thread's warp."""
        mine = _repeated(warp + 1, kind)[:, None]
        self.check_writable(index, kind, mine, warp)
        if self._written_by_others(index, kind, mine).any():
            raise Fault("racecheck", "a copy or an mbarrier where another warp stored, and no barrier between")
        return mine

    def begin_copy(self, bytes_index: Array, warp: Array) -> None:
        """A copy may land there at any time from now on. warp: who issued the copy of each byte."""
        self._check_unused(bytes_index[:, None], UNSIGNED[1], warp)
        self.writer[bytes_index] |= COPYING

    def end_copy(self, bytes_index: Array, values: Array, writer: Array | int) -> None:
        """It has landed. writer: 0 where whoever waited for it may read it at once, else 1 + warp."""
        self.data[bytes_index] = values
        self.writer[bytes_index] = writer

    def begin_mbarrier(self, index: Array, warp: Array) -> None:
        """One is there from now on, which nothing else may read or write. index: of 8 bytes."""
        mine = self._check_unused(index, UNSIGNED[8], warp)
        self.writer.view(np.uint64)[index] = mine | _repeated(np.uint8(UNWRITTEN), UNSIGNED[8])
        self.held.view(np.uint64)[index] = 1

    def use_mbarrier(self, index: Array, warp: Array) -> None:
        """Arrivals and waits are in no order among themselves, but after the mbarrier is made, and before it ends."""
        mine = _repeated(warp + 1, UNSIGNED[8])[:, None]
        if self._written_by_others(index, UNSIGNED[8], mine).any():
            raise Fault("racecheck", "use of an mbarrier that another warp made, and no barrier between")
        self._note_readers(index, UNSIGNED[8], mine)

    def end_mbarrier(self, index: Array, warp: Array) -> None:
        self.held.view(np.uint64)[index] = 0
        mine = self._check_unused(index, UNSIGNED[8], warp)
        self.writer.view(np.uint64)[index] = mine | _repeated(np.uint8(UNWRITTEN), UNSIGNED[8])

    def begin_product(self, places: Array) -> None:
        """A wgmma reads these bytes from now on, (programs, warpgroups, bytes)."""
        codes = self.writer[places]
        if (codes & UNWRITTEN).any():
            raise Fault("memcheck", "a wgmma reads shared memory that was never written")
        if (codes & COPYING).any():
            raise Fault("racecheck", "a wgmma reads shared memory where a copy was not waited for")
        if codes.any():
            raise Fault("racecheck", "a wgmma reads what threads stored to shared memory, and no barrier between")
        if self.unfenced[places].any():
            raise Fault("racecheck", "a wgmma reads what threads stored to shared memory, and no fence.proxy.async between")
        self.held[places] = 1

    def end_product(self, places: Array) -> None:
        """It was waited for. Its warpgroup may write there at once, whose products are complete when they are for one of its threads."""
        self.held[places] = 0
        for number in range(places.shape[1]):
            before, own = self.reader[places[:, number]], OF_WARPGROUP + number
            self.reader[places[:, number]] = np.where((before == 0) | (before == own), own, SEVERAL)

    def barrier(self) -> None:
        self.writer.view(np.uint64)[:] &= np.uint64(0xC0C0_C0C0_C0C0_C0C0)
        self.reader[:] = 0


def _repeated(codes: Array | np.uint8, kind: np.dtype[Any]) -> Array:
    """Each code in every byte of an element."""
    return np.asarray(codes).astype(kind) * kind.type(int.from_bytes(b"\1" * kind.itemsize, "little"))
