"""Global memory: the storages of a launch's tensors in one simulated address space, with guards between them, and every access checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
BASE = 0x7F00_0000_0000
GUARD = 65_536  # bytes before and after each allocation that belong to nobody: more than a tile's rows are long together
ALIGNMENT = 1024  # an allocation keeps its address modulo this, on which alignment depends
OUTSIDE, UNWRITTEN, WRITTEN = 0, 1, 3  # the state of a byte
SEVERAL, SEVERAL_PROGRAMS = 63, -1  # who: several warps of a program, as the number of its warp; several programs
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


class Fault(Exception):
    """What the program does is wrong, or undefined: the kind, what happened, and once known the instruction."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what, self.where = kind, what, ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} ({self.where})"


class Lanes(NamedTuple):
    """The threads that take part in an access, as flat arrays, and when."""

    program: Array
    warp: Array
    interval: int  # how many barriers the programs have passed

    def code(self) -> Array:
        """A code of each thread's program and warp; 0 is nobody's."""
        return ((1 + self.program) * 64 + self.warp)[:, None]


class Accesses:
    """Who accessed every two bytes of memory last in this launch, and when."""

    def __init__(self, size: int) -> None:
        self.who = np.zeros(size // 2, np.int64)
        self._when = np.zeros(size // 2, np.int32)

    def check(self, halves: Array, lanes: Lanes, access: str) -> None:
        """Two programs of a launch run at any time. Two warps of a program are in order only where a barrier lies between."""
        self.check_programs(halves, lanes, access)
        who = self.who[halves]
        if ((who != 0) & (who != lanes.code()) & (self._when[halves] == lanes.interval)).any():
            raise Fault("racecheck", f"{access} another warp at the same address, and no barrier between")

    def check_programs(self, halves: Array, lanes: Lanes, access: str) -> None:
        who = self.who[halves]
        if ((who != 0) & (who // 64 != lanes.code() // 64)).any():
            raise Fault("racecheck", f"{access} another program at the same address")

    def note(self, halves: Array, lanes: Lanes) -> None:
        who, mine = self.who[halves], lanes.code()
        of_others = (who != 0) & (who // 64 != mine // 64)
        before = (who == 0) | (who == mine) | (self._when[halves] != lanes.interval)
        after = np.where(of_others, SEVERAL_PROGRAMS, np.where(before, mine, mine | SEVERAL))
        self.who[halves], self._when[halves] = after, lanes.interval
        found = self.who[halves]
        if (lost := found != after).any():
            same = lost & (found // 64 == after // 64)
            self.who[halves[same]] = after[same] | SEVERAL
            self.who[halves[lost & ~same]] = SEVERAL_PROGRAMS


class Allocation(NamedTuple):
    name: str
    start: int
    data: Array  # the owner's bytes
    state: Array | None  # None: they all hold something


class GlobalMemory:
    """One array of bytes, and beside it the state of each byte, and who wrote and who read it."""

    def __init__(self) -> None:
        self._allocations: list[Allocation] = []
        self._size = GUARD

    def add(self, data: Array, address: int, state: Array | None = None, name: str = "") -> int:
        """Take in the bytes of a storage, and return where kernels find it."""
        start = self._size + (address - self._size) % ALIGNMENT
        self._allocations.append(Allocation(name, start, data, state))
        self._size = -(-(start + data.size + GUARD) // ALIGNMENT) * ALIGNMENT
        return BASE + start

    def begin(self) -> None:
        self.data = np.full(self._size, 0xFF, np.uint8)  # NaN in every type
        self.state = np.full(self._size, OUTSIDE, np.uint8)
        for _, start, data, state in self._allocations:
            self.data[start : start + data.size] = data
            self.state[start : start + data.size] = WRITTEN if state is None else state
        self.stores, self.loads = Accesses(self._size), Accesses(self._size)

    def finish(self) -> None:
        """Give the owners their bytes back."""
        for _, start, data, state in self._allocations:
            data[:] = self.data[start : start + data.size]
            if state is not None:
                state[:] = self.state[start : start + data.size]

    def owner(self, address: int) -> str:
        """The name of the storage that the address lies in, or after."""
        return next((each.name for each in reversed(self._allocations) if BASE + each.start <= address), "")

    def load(self, addresses: Array, size: int, count: int, lanes: Lanes) -> Array:
        """(threads, count) elements of `size` bytes, adjacent for each thread."""
        index = self._index(addresses, size, count)
        self._check_state(index, size, "load")
        halves = self._halves(index, size)
        self.stores.check(halves, lanes, "load and store by")
        self.loads.note(halves, lanes)
        return self.data.view(UNSIGNED[size])[index]

    def store(self, addresses: Array, values: Array, lanes: Lanes) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        index = self._index(addresses, size, count)
        outside = _outside(self.state.view(UNSIGNED[size])[index], size)
        if outside.any():
            raise Fault("memcheck", f"store outside every tensor, {describe(addresses, outside)}")
        halves = self._halves(index, size)
        self.stores.check(halves, lanes, "two stores, one by")
        self.loads.check(halves, lanes, "store and load by")
        data = self.data.view(UNSIGNED[size])
        data[index] = values
        if (differs := data[index] != values).any():
            raise Fault("repeatability", f"threads store different values to one address, {describe(addresses, differs)}")
        self.state.view(UNSIGNED[size])[index] = _repeated(WRITTEN, size)
        self.stores.note(halves, lanes)
        self.stores.check_programs(halves, lanes, "two stores, one by")

    def _index(self, addresses: Array, size: int, count: int) -> Array:
        offsets = addresses.astype(np.int64) - BASE
        total = size * count
        outside = (offsets < 0) | (offsets > self.data.size - total)
        if outside.any():
            raise Fault("memcheck", f"access outside of memory, {describe(addresses, outside)}")
        if (misaligned := offsets % total != 0).any():
            raise Fault("memcheck", f"access of {total} bytes that is not aligned, {describe(addresses, misaligned)}")
        return offsets[:, None] // size + np.arange(count)

    def _halves(self, index: Array, size: int) -> Array:
        """Pairs of bytes that elements lie in."""
        if size <= 2:
            return index * size // 2
        return (index[:, :, None] * (size // 2) + np.arange(size // 2)).reshape(len(index), -1)

    def _check_state(self, index: Array, size: int, access: str) -> None:
        states = self.state.view(UNSIGNED[size])[index]
        if (states == _repeated(WRITTEN, size)).all():
            return
        outside = _outside(states, size)
        kind = "outside every tensor" if outside.any() else "of memory that was never written"
        wrong = outside if outside.any() else states != _repeated(WRITTEN, size)
        raise Fault("memcheck", f"{access} {kind}, {describe(index * size + BASE, wrong)}")


def _outside(states: Array, size: int) -> Array:
    """Which elements have a byte that belongs to no tensor: each that does has this bit."""
    inside = _repeated(UNWRITTEN, size)
    return states & inside != inside


def _repeated(byte: int, size: int) -> int:
    return int.from_bytes(bytes([byte]) * size, "little")


def describe(addresses: Array, wrong: Array) -> str:
    """How many accesses are wrong, and the first."""
    rows = wrong.reshape(len(addresses), -1).any(1)
    return f"{int(rows.sum())} of {len(addresses)} threads, first at 0x{int(addresses.reshape(len(addresses), -1)[rows][0, 0]):x}"
