"""Instructions by which the threads of a warp exchange values, and the barrier of a program: "Parallel Synchronization and
Communication Instructions", and shfl.sync.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .memory import Array, Fault
from .parser import Immediate, Instruction, Refused
from .translate import Step, Translator, instruction, results_of

if TYPE_CHECKING:
    from .machine import Group


def by_warp(group: Group, value: Array) -> Array:
    """(programs, warps, 32): what each lane holds."""
    return np.broadcast_to(value, group.shape).reshape(group.shape[0], group.warps, 32)


def full_warps(group: Group, active: Array | None, name: str, mask: int | None = None) -> None:
    """Whoever takes part waits for its whole warp. mask: where the lanes are named, which have to be all."""
    if mask is not None and (group.pick(group.registers[mask], active) != 0xFFFFFFFF).any():
        raise Fault("refused", f"{name} of some lanes")
    if active is not None:
        warps = active.reshape(active.shape[0], -1, 32)
        if (warps.any(2) & ~warps.all(2)).any():
            raise Fault("deadlock", f"{name} of a whole warp, whose lanes are not all there")


def all_threads(active: Array | None, name: str) -> None:
    """Of what acts on all programs of a group at once. No compiler here puts it under a predicate that is not the same for all threads."""
    if active is not None:
        raise Fault("refused", f"{name} of some threads")


@instruction(r"shfl\.sync\.(bfly|idx)\.b32")
def shuffle(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Each lane reads another's register. Operand c clamps the lane to a segment; where it lies outside, a lane reads itself."""
    to, inside = results_of(translator, each.operands[0], "b32")
    source, by, clamp, mask = (translator.slot(operand, "b32") for operand in each.operands[1:])

    def run(group: Group, active: Array | None) -> None:
        full_warps(group, active, "shfl.sync", mask)
        lane = np.arange(32)
        b, c = by_warp(group, group.registers[by]).astype(np.int64) & 31, by_warp(group, group.registers[clamp]).astype(np.int64)
        segment = (c >> 8) & 31
        last = (lane & segment) | (c & 31 & ~segment)
        first = lane & segment
        wanted = lane ^ b if match[1] == "bfly" else first | (b & ~segment)
        found = wanted <= last
        values = by_warp(group, group.registers[source])
        group.registers[to] = np.take_along_axis(values, np.where(found, wanted, lane), 2).reshape(group.shape)
        if inside is not None:
            group.registers[inside] = found.reshape(group.shape)

    return Step(run, (to,) if inside is None else (to, inside))


@instruction(r"redux\.sync\.(max|min)\.s32")
def reduce(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Of the integers of all lanes, to all of them."""
    to, source, mask = (translator.slot(operand, "b32") for operand in each.operands)
    combine = np.max if match[1] == "max" else np.min

    def run(group: Group, active: Array | None) -> None:
        full_warps(group, active, "redux.sync", mask)
        values = by_warp(group, group.registers[source]).view(np.int32)
        total = combine(values, axis=2, keepdims=True).view(np.uint32)
        group.registers[to] = np.broadcast_to(total, values.shape).reshape(group.shape)

    return Step(run, (to,))


@instruction(r"elect\.sync")
def elect(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """One lane of the warp is the leader. Which one is not specified; here it is lane 0."""
    to, chosen = results_of(translator, each.operands[0], "b32")
    assert chosen is not None
    mask = translator.slot(each.operands[1], "b32")

    def run(group: Group, active: Array | None) -> None:
        full_warps(group, active, "elect.sync", mask)
        group.registers[to] = np.zeros((1, 1), np.uint32)
        group.registers[chosen] = np.arange(group.threads)[None] % 32 == 0

    return Step(run, (to, chosen))


@instruction(r"bar\.sync")
def barrier(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Only barrier 0 of all threads: a barrier of some warps belongs to warp specialisation, which no kernel here uses."""
    if each.operands != (Immediate(0),):
        raise Refused(f"barrier {each.operands}")
    return Step(lambda group, active: group.barrier(active), ())


@instruction(r"bar\.warp\.sync")
def warp_barrier(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Lanes of a warp are never apart here."""
    return Step(lambda group, active: full_warps(group, active, "bar.warp.sync"), ())
