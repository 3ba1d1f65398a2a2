"""Loads and stores: ld, st and address conversions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import DTYPES
from .memory import UNSIGNED, Array, Fault
from .parser import SIZES, Address, Immediate, Instruction, Operand, Register
from .translate import PARAMETER_BASE, Step, Translator, instruction, reader, writer

if TYPE_CHECKING:
    from .machine import Group


class Place:
    """An address operand: for a group, the address of each active thread."""

    def __init__(self, translator: Translator, operand: Operand) -> None:
        assert isinstance(operand, Address), operand
        self._fixed = 0
        self._slot = None
        if isinstance(operand.base, Register):
            self._slot = translator.slot(operand.base, "b64")
        elif isinstance(operand.base, Immediate):
            self._fixed = operand.base.value
        else:
            self._fixed = translator.address_of(operand.base)
        self._offset = operand.offset

    def of_all(self, group: Group) -> Array:
        base = np.full((1, 1), self._fixed, np.int64) if self._slot is None else group.registers[self._slot].astype(np.int64)
        return base + self._offset

    def of(self, group: Group, active: Array | None) -> Array:
        return group.pick(self.of_all(group), active)


SPACE = r"(global|shared|shared::cta|param)"
VECTOR = r"(?:\.v([24]))?"
TYPE = r"\.([bsuf](?:8|16|32|64))"


@instruction(r"ld(?:\.volatile|\.relaxed\.\w+)?\.param" + VECTOR + TYPE)
def load_parameter(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    kind, place = match[2], Place(translator, each.operands[1])
    slots, size = translator.elements(each.operands[0], kind), SIZES[kind]
    converts = [writer(DTYPES[kind], translator.initial[slot].dtype) for slot in slots]

    def run(group: Group, active: Array | None) -> None:
        data = np.frombuffer(group.launch.parameters, np.uint8)
        at = place.of_all(group) - PARAMETER_BASE
        at = at if active is None else np.where(active, at, 0)
        if (at < 0).any() or (at > len(data) - size * len(slots)).any() or (at % size).any():
            raise Fault("memcheck", "load outside of the parameters, or one that is not aligned")
        for slot, convert in zip(slots, converts, strict=True):
            group.registers[slot] = convert(data[at[..., None] + np.arange(size)].view(DTYPES[kind])[..., 0])
            at = at + size

    return Step(run, tuple(slots))


@instruction(r"ld\.global(?:\.nc)?(?:\.L1::\w+|\.L2::\w+)*" + VECTOR + TYPE)
def load_global(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    kind, place = match[2], Place(translator, each.operands[1])
    slots, size = translator.elements(each.operands[0], kind), SIZES[kind]
    put, wide = _putter(translator, slots, kind), min(8, size * len(slots))

    def run(group: Group, active: Array | None) -> None:
        addresses = place.of(group, active)
        group.launch.counts.global_access("load", addresses, size * len(slots), group, active)
        values = group.launch.memory.load(addresses, wide, size * len(slots) // wide, group.lanes(active))
        put(group, values.view(UNSIGNED[size]), active)

    return Step(run, tuple(slots))


@instruction(r"ld\.(?:volatile\.)?shared(?:::cta)?" + VECTOR + TYPE)
def load_shared(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    kind, place = match[2], Place(translator, each.operands[1])
    slots, size = translator.elements(each.operands[0], kind), SIZES[kind]
    put, wide = _putter(translator, slots, kind), min(8, size * len(slots))  # fewer elements are quicker

    def run(group: Group, active: Array | None) -> None:
        addresses = place.of(group, active)
        group.launch.counts.shared_access(addresses, size * len(slots), group, active)
        index = group.shared.index(group.rows(active), addresses, wide, size * len(slots) // wide)
        put(group, group.shared.load(index, wide, group.warp(active)).view(UNSIGNED[size]), active)

    return Step(run, tuple(slots))


def _putter(translator: Translator, slots: list[int], kind: str) -> Any:
    """Puts (threads, elements) that were loaded into registers."""
    converts = [writer(DTYPES[kind], translator.initial[slot].dtype) for slot in slots]

    def put(group: Group, values: Array, active: Array | None) -> None:
        for at, (slot, convert) in enumerate(zip(slots, converts, strict=True)):
            group.registers[slot] = convert(group.put(np.ascontiguousarray(values[:, at]).view(DTYPES[kind]), active))

    return put


@instruction(r"st\.global" + VECTOR + TYPE)
def store_global(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    place, take = Place(translator, each.operands[0]), _taker(translator, each.operands[1], match[2])

    def run(group: Group, active: Array | None) -> None:
        addresses, values = place.of(group, active), take(group, active)
        group.launch.counts.global_access("store", addresses, values.dtype.itemsize * values.shape[1], group, active)
        group.launch.memory.store(addresses, values, group.lanes(active))

    return Step(run, ())


@instruction(r"st\.(?:volatile\.)?shared(?:::cta)?" + VECTOR + TYPE)
def store_shared(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    place, take = Place(translator, each.operands[0]), _taker(translator, each.operands[1], match[2])

    def run(group: Group, active: Array | None) -> None:
        addresses, values = place.of(group, active), take(group, active)
        width = values.dtype.itemsize * values.shape[1]
        values = values.view(UNSIGNED[min(8, width)])
        group.launch.counts.shared_access(addresses, width, group, active)
        index = group.shared.index(group.rows(active), addresses, values.dtype.itemsize, values.shape[1])
        group.shared.store(index, values, group.warp(active))

    return Step(run, ())


def _taker(translator: Translator, operand: Operand, kind: str) -> Any:
    """Takes (threads, elements) to be stored from registers."""
    slots, dtype = translator.elements(operand, kind), UNSIGNED[SIZES[kind]]
    readers = [reader(translator.initial[slot].dtype, dtype) for slot in slots]

    def take(group: Group, active: Array | None) -> Array:
        columns = [group.pick(read(group.registers[slot]), active) for read, slot in zip(readers, slots, strict=True)]
        return np.stack(columns, 1)

    return take


@instruction(r"cvta\.(?:to\.)?(?:global|param)\.u64")
def convert_address(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """The address spaces of this machine do not overlap, so that an address is the same in its own and in the generic one."""
    to, source = translator.slot(each.operands[0], "u64"), translator.slot(each.operands[1], "u64")

    def run(group: Group, active: Array | None) -> None:
        group.registers[to] = group.registers[source]

    return Step(run, (to,))
