"""Asynchronous copies of threads to shared memory: cp.async, "Data Movement and Conversion Instructions: Asynchronous copy".

A copy lands as late as the program allows, at the wait for its group. Until then its place holds what it held, and nobody may read or
write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .memory import Array, Fault
from .memory_access import Place
from .parser import Immediate, Instruction, Refused, Register
from .translate import Step, Translator, instruction
from .warps import all_threads

if TYPE_CHECKING:
    from .machine import Group


class Copy(NamedTuple):
    """Bytes on their way, flat: each one's program in the group, offset in shared memory, value, and the warp that sent it."""

    row: Array
    offset: Array
    value: Array
    warp: Array

    def places(self, group: Group) -> Array:
        return self.row * group.shared.size + self.offset

    def rows(self, chosen: Array) -> Copy:
        """The part of the chosen programs, numbered anew."""
        number, keep = np.cumsum(chosen) - 1, chosen[self.row]
        return Copy(number[self.row[keep]], *(part[keep] for part in self[1:]))


@dataclass
class Copying:
    """The cp.async of a group: those of no group yet, and the groups in order."""

    loose: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)

    def rows(self, chosen: Array, group: Group) -> Copying:
        return Copying([copy.rows(chosen) for copy in self.loose], [[copy.rows(chosen) for copy in each] for each in self.groups])

    def wait(self, group: Group, left: int) -> None:
        """Land all but the latest `left` groups."""
        while len(self.groups) > left:
            for copy in self.groups.pop(0):
                group.shared.end_copy(copy.places(group), copy.value, (copy.warp + 1).astype(np.uint8))
                group.shared.unfenced[copy.places(group)] = 1

    def check_end(self) -> None:
        if any(len(copy.row) for each in (self.loose, *self.groups) for copy in each):
            raise Fault("racecheck", "the program ends before a copy that it started")


@instruction(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)*")
def copy_async(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """4, 8 or 16 bytes a thread. With a source size, the bytes beyond it are zeros and are not read."""
    to, source = Place(translator, each.operands[0]), Place(translator, each.operands[1])
    size = each.operands[2]
    assert isinstance(size, Immediate)
    width = size.value
    read_slot = translator.slot(each.operands[3], "b32") if len(each.operands) > 3 else None
    if any(isinstance(one, Register) and translator.kernel.type_of(one.name) == "pred" for one in each.operands[3:]):
        raise Refused("a copy with a predicate that says whether it reads")

    def run(group: Group, active: Array | None) -> None:
        row, warp = group.rows(active), group.warp(active)
        addresses, places = source.of(group, active), to.of(group, active)
        read = np.full(len(row), width) if read_slot is None else group.pick(group.registers[read_slot], active).astype(np.int64)
        if (read > width).any() or (addresses[read > 0] % width).any():
            raise Fault("memcheck", f"a copy of {width} bytes that is not aligned, or that reads more")
        values = _read(group, addresses, read, width, active)
        index = group.shared.index(row, places, width, 1)  # for its checks
        offsets = (index[:, 0] * width - row * group.shared.size)[:, None] + np.arange(width)
        copy = Copy(np.repeat(row, width), offsets.reshape(-1), values.reshape(-1), np.repeat(warp, width))
        group.shared.begin_copy(copy.places(group), copy.warp)
        group.copying.loose.append(copy)

    return Step(run, ())


def _read(group: Group, addresses: Array, read: Array, width: int, active: Array | None) -> Array:
    """(threads, width) bytes, of which each thread reads the first ones, and the rest are zeros."""
    values, lanes = np.zeros((len(read), width), np.uint8), group.lanes(active)
    for count in np.unique(read[read > 0]):
        these = read == count
        group.launch.counts.global_access("load", addresses[these], int(count), group, group.put(these, active))
        piece = min(width, 4) if count == width else 1
        at = (addresses[these][:, None] + np.arange(0, count, piece, dtype=np.uint64)).reshape(-1)
        program, warp = (np.repeat(of[these], count // piece) for of in (lanes.program, lanes.warp))
        loaded = group.launch.memory.load(at, piece, 1, lanes._replace(program=program, warp=warp))
        values[these, :count] = loaded.view(np.uint8).reshape(-1, count)
    return values


@instruction(r"cp\.async\.commit_group")
def commit(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    def run(group: Group, active: Array | None) -> None:
        all_threads(active, "cp.async.commit_group")
        group.copying.groups.append(group.copying.loose)
        group.copying.loose = []

    return Step(run, ())


@instruction(r"cp\.async\.wait_group")
def wait(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Until at most so many of the latest groups are under way."""
    assert isinstance(each.operands[0], Immediate)
    left = each.operands[0].value

    def run(group: Group, active: Array | None) -> None:
        all_threads(active, "cp.async.wait_group")
        group.copying.wait(group, left)

    return Step(run, ())
