"""Tensor copies (TMA) and the mbarriers that they complete on: "Tensor copy" and "mbarrier".

A copy lands when its mbarrier is waited for, and the first try of every such wait fails.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .copies import Copy
from .memory import UNSIGNED, Array, Fault, Lanes
from .memory_access import Place
from .parser import Address, Instruction
from .shared import BASE
from .translate import PARAMETER_BASE, Step, Translator, instruction
from .warps import by_warp

if TYPE_CHECKING:
    from .machine import Group


class TensorMap(NamedTuple):
    """A tensor and the blocks that it is copied in, innermost axis first. Strides are in bytes."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    element: int
    swizzle: int  # 0, or 1, 2, 3 for rows of 32, 64, 128 bytes

    def block_at(self, corner: Array) -> tuple[Array, Array]:
        """Of each element of the block, outermost axis first: its address, and whether it lies inside the tensor."""
        inside: Array = np.ones((), bool)
        address: Array = np.full((), self.address, np.int64)
        for axis, (start, length, size, stride) in enumerate(zip(corner, self.block, self.sizes, self.strides, strict=True)):
            at = (int(start) + np.arange(length)).reshape(-1, *[1] * axis)
            inside = inside & (at >= 0) & (at < size)
            address = address + at * stride
        return address.reshape(-1), np.broadcast_to(inside, self.block[::-1]).reshape(-1)


def swizzled(addresses: Array, mode: int) -> Array:
    """Where an address of a swizzled tile lies, "Swizzling Modes": 16-byte pieces are permuted by the rows that they are in."""
    if mode == 0:
        return addresses
    return addresses ^ (((addresses >> 7) & (2**mode - 1)) << 4)


class Barrier:
    """An mbarrier of each program: arrivals and bytes that its phase still waits for."""

    def __init__(self, programs: int) -> None:
        self.valid = np.zeros(programs, bool)
        self.count, self.arrivals, self.bytes, self.phase = (np.zeros(programs, np.int64) for _ in range(4))
        self.copies: list[Copy] = []
        self.tried = np.zeros(programs, bool)
        self.waited = -1  # the interval between barriers of the last wait

    def rows(self, chosen: Array) -> Barrier:
        part = Barrier(0)
        for name in ("valid", "count", "arrivals", "bytes", "phase", "tried"):
            setattr(part, name, getattr(self, name)[chosen])
        part.copies = [copy.rows(chosen) for copy in self.copies]
        part.waited = self.waited
        return part

    def turn(self) -> None:
        """Begin the next phase where this one is complete."""
        complete = self.valid & (self.arrivals == 0) & (self.bytes == 0)
        self.phase += complete
        self.arrivals[:] = np.where(complete, self.count, self.arrivals)


class Barriers:
    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.by_address: dict[int, Barrier] = {}

    def rows(self, chosen: Array) -> Barriers:
        part = Barriers(int(chosen.sum()))
        part.by_address = {address: barrier.rows(chosen) for address, barrier in self.by_address.items()}
        return part

    def at(self, group: Group, place: Place, active: Array | None) -> tuple[Barrier, Array]:
        """The one that all threads name, and where it is in shared memory, in units of 8 bytes."""
        addresses = place.of(group, active)
        if (addresses != addresses[0]).any():
            raise Fault("refused", "threads that name different mbarriers")
        index = group.shared.index(group.rows(active), addresses, 8, 1)
        return self.by_address.setdefault(int(addresses[0]), Barrier(self.programs)), index

    def used(self, group: Group, place: Place, active: Array | None) -> Barrier:
        barrier, index = self.at(group, place, active)
        if not barrier.valid[group.rows(active)].all():
            raise Fault("memcheck", "use of an mbarrier that is not initialised")
        group.shared.use_mbarrier(index, group.warp(active))
        return barrier


MBARRIER = r"(?:\.shared(?:::cta)?)?\.b64"


@instruction(r"mbarrier\.(init|inval)" + MBARRIER)
def initialise(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """mbarrier.init and mbarrier.inval."""
    place = Place(translator, each.operands[0])
    count = translator.slot(each.operands[1], "b32") if match[1] == "init" else None

    def run(group: Group, active: Array | None) -> None:
        rows, warp = group.rows(active), group.warp(active)
        barrier, index = group.barriers.at(group, place, active)
        if count is None:
            if not barrier.valid[rows].all():
                raise Fault("memcheck", "the end of an mbarrier that is not initialised")
            if any(len(copy.row) for copy in barrier.copies):
                raise Fault("racecheck", "an mbarrier ends before the copies that it counts")
            barrier.valid[rows] = False
            group.shared.end_mbarrier(index, warp)
            return
        group.shared.begin_mbarrier(index, warp)
        barrier.count[rows] = barrier.arrivals[rows] = group.pick(group.registers[count], active)
        barrier.bytes[rows], barrier.phase[rows], barrier.valid[rows] = 0, 0, True

    return Step(run, ())


@instruction(r"mbarrier\.arrive(\.expect_tx)?" + MBARRIER)
def arrive(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """One arrival a thread, and with expect_tx bytes more to wait for."""
    place = Place(translator, each.operands[1])
    expected = translator.slot(each.operands[2], "b32") if match[1] else None

    def run(group: Group, active: Array | None) -> None:
        rows = group.rows(active)
        barrier = group.barriers.used(group, place, active)
        if expected is not None:
            np.add.at(barrier.bytes, rows, group.pick(group.registers[expected], active).astype(np.int64))
        np.subtract.at(barrier.arrivals, rows, 1)
        if (barrier.arrivals < 0).any():
            raise Fault("deadlock", "more arrivals at an mbarrier than its phase expects")
        barrier.turn()

    return Step(run, ())


@instruction(r"mbarrier\.try_wait\.parity" + MBARRIER)
def try_wait(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Whether the phase of this parity is complete. Copies that it waits for land at the second try."""
    done, place = translator.slot(each.operands[0], "pred"), Place(translator, each.operands[1])
    parity = translator.slot(each.operands[2], "b32")

    def run(group: Group, active: Array | None) -> None:
        if active is not None and not by_warp(group, active).any(2).all():
            raise Fault("refused", "a wait for an mbarrier by some warps of a program")  # the others could not see what it waits for
        rows = group.rows(active)
        barrier = group.barriers.used(group, place, active)
        barrier.waited = group.interval
        wanted = np.zeros(group.shape[0], np.int64)
        wanted[rows] = group.pick(group.registers[parity], active) & 1
        if not barrier.tried.all():
            barrier.tried[:] = True
            group.registers[done] = np.zeros((1, 1), bool)
            return
        _land(group, barrier)
        complete = barrier.phase % 2 != wanted
        if not complete[rows].any():
            raise Fault("deadlock", "a wait for an mbarrier whose phase cannot complete")
        if complete[rows].all():
            barrier.tried[:] = False
        group.registers[done] = complete[:, None]

    return Step(run, (done,))


def _land(group: Group, barrier: Barrier) -> None:
    for copy in barrier.copies:
        group.shared.end_copy(copy.places(group), copy.value, 0)
        group.shared.unfenced[copy.places(group)] = 0
        np.subtract.at(barrier.bytes, copy.row, 1)
    barrier.copies = []
    if (barrier.bytes < 0).any():
        raise Fault("deadlock", "copies bring more bytes than an mbarrier expects")
    barrier.turn()


@instruction(r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::(?:cta|cluster)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes")
def copy_tensor(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """One thread copies a block of a tensor. Elements outside the tensor are zeros."""
    to, source, barrier_place = (Place(translator, operand) for operand in each.operands)
    address = each.operands[1]
    assert isinstance(address, Address) and len(address.coordinates) == int(match[1])
    corner_slots = [translator.slot(operand, "s32") for operand in address.coordinates]

    def run(group: Group, active: Array | None) -> None:
        rows, warp = group.rows(active), group.warp(active)
        barrier = group.barriers.used(group, barrier_place, active)
        maps = {int(at) for at in source.of(group, active)}
        if len(maps) > 1:
            raise Fault("refused", "threads that name different tensor maps")
        if barrier.waited == group.interval and group.warps > 1:
            raise Fault("racecheck", "a tensor copy for an mbarrier where other warps may still wait for the one before")
        tensor = group.launch.tensor_maps[maps.pop() - PARAMETER_BASE]
        corners = np.stack([group.pick(group.registers[slot], active).view(np.int32) for slot in corner_slots], 1)
        lanes = group.lanes(active)
        for at, start in enumerate(to.of(group, active).astype(np.int64)):
            copy = _block(group, tensor, corners[at], int(rows[at]), int(warp[at]), int(start), lanes.program[at : at + 1])
            group.shared.begin_copy(copy.places(group), copy.warp)
            if group.shared.unfenced[copy.places(group)].any():
                raise Fault("racecheck", "a tensor copy over what threads stored to shared memory, and no fence.proxy.async between")
            barrier.copies.append(copy)

    return Step(run, ())


def _block(group: Group, tensor: TensorMap, corner: Array, row: int, warp: int, start: int, program: Array) -> Copy:
    if start % (128 if tensor.swizzle == 0 else 1024 >> (3 - tensor.swizzle)):
        raise Fault("memcheck", f"a tensor copy to shared address {start}, which is not aligned for its swizzle")
    addresses, inside = tensor.block_at(corner)
    values = np.zeros(len(addresses), UNSIGNED[tensor.element])
    if inside.any():
        lanes = Lanes(np.repeat(program, inside.sum()), np.full(inside.sum(), warp), group.interval)
        values[inside] = group.launch.memory.load(addresses[inside], tensor.element, 1, lanes)[:, 0]
    bytes_at = start + np.arange(values.nbytes)
    offsets = swizzled(bytes_at, tensor.swizzle) - BASE
    if offsets.min() < 0 or offsets.max() >= group.shared.size:
        raise Fault("memcheck", "a tensor copy outside of shared memory")
    size = values.nbytes
    return Copy(np.full(size, row), offsets, values.view(np.uint8), np.full(size, warp))
