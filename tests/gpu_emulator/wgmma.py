"""Matrix instructions of a warpgroup, "Asynchronous Warpgroup Level Matrix Instructions": wgmma.

It reads its operands from shared memory and runs by itself.
Until a wgmma is waited for, its accumulators hold NaN, its operands in shared memory may not be written, and its registers neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .arithmetic import from_bfloat
from .matrix import matrix_of, multiply
from .memory import UNSIGNED, Array, Fault
from .parser import Immediate, Instruction, Vector
from .shared import BASE
from .tensor_copies import swizzled
from .translate import Step, Translator, instruction
from .warps import all_threads

if TYPE_CHECKING:
    from .machine import Group

WARPGROUP = 128  # threads


class Product(NamedTuple):
    """A wgmma that was issued and not yet waited for."""

    fragments: dict[int, Array]  # the registers of a, which must stay what they are
    sums: dict[int, Array]  # those of d, which hold NaN
    operands: list[Array]  # places in shared memory that it reads


@dataclass
class Products:
    """The wgmmas of a group: those of no wgmma-group yet, the wgmma-groups in order, and the sums that they leave in accumulators."""

    loose: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)
    sums: dict[int, Array] = field(default_factory=dict)  # slot -> its bits once it is waited for
    fenced: dict[int, Array] = field(default_factory=dict)  # by id: what registers held at the last wgmma.fence, or a wgmma left since

    def rows(self, chosen: Array, group: Group, registers: list[Array]) -> Products:
        """The part of the chosen programs, whose registers are `registers`."""
        under_way = [product for each in (*self.groups, self.loose) for product in each]
        latest = {slot: bits for product in under_way for slot, bits in product.sums.items()}
        for slot, bits in (*latest.items(), *(item for product in under_way for item in product.fragments.items())):
            if group.registers[slot] is not bits:
                raise Fault("racecheck", "a register of a wgmma was written before it was waited for")
        moved = (np.flatnonzero(chosen) - np.arange(chosen.sum()))[:, None, None] * group.shared.size

        def part(product: Product) -> Product:
            fragments, sums = ({slot: registers[slot] for slot in each} for each in (product.fragments, product.sums))
            return Product(fragments, sums, [places[chosen] - moved for places in product.operands])

        sums = {slot: bits[chosen] for slot, bits in self.sums.items()}
        fenced = {id(of): of for bits, of in zip(group.registers, registers, strict=True) if id(bits) in self.fenced}
        return Products([part(each) for each in self.loose], [[part(each) for each in of] for of in self.groups], sums, fenced)

    def wait(self, group: Group, left: int) -> None:
        """All but the latest `left` wgmma-groups are complete."""
        done = self.groups[: len(self.groups) - left]
        self.groups = self.groups[len(done) :]
        busy = {slot for each in (*self.groups, self.loose) for product in each for slot in product.sums}
        complete = [product for each in done for product in each]
        latest = {slot: bits for product in complete for slot, bits in product.sums.items() if slot not in busy}
        for slot, bits in (*latest.items(), *(item for product in complete for item in product.fragments.items())):
            if group.registers[slot] is not bits:
                raise Fault("racecheck", "a register of a wgmma was written before it was waited for")
        for slot in latest:
            group.registers[slot] = self.keep(self.sums.pop(slot))
        for places in (places for product in complete for places in product.operands):
            group.shared.end_product(places)
        for places in (places for each in (*self.groups, self.loose) for product in each for places in product.operands):
            group.shared.held[places] = 1

    def keep(self, bits: Array) -> Array:
        """What a register holds that no wgmma.fence has to be behind."""
        self.fenced[id(bits)] = bits
        return bits

    def check_end(self) -> None:
        if self.loose or self.groups:
            raise Fault("racecheck", "the program ends before a wgmma that it started")


class Layout(NamedTuple):
    """A matrix descriptor, "Matrix Descriptor Format", of each warpgroup."""

    start: Array
    leading: Array
    stride: Array
    swizzle: int

    @classmethod
    def of(cls, bits: Array) -> Layout:
        """The fields are in units of 16 bytes."""
        swizzles = np.unique(bits >> np.uint64(62))
        base_offset = (bits >> np.uint64(49)) & np.uint64(7)
        if len(swizzles) > 1 or base_offset.any():
            raise Fault("refused", "matrix descriptors of several swizzles, or with a base offset")
        start, leading, stride = (((bits >> np.uint64(at)) & np.uint64(0x3FFF)).astype(np.int64) * 16 for at in (0, 16, 32))
        return cls(start, leading, stride, (0, 3, 2, 1)[int(swizzles[0])])

    def addresses(self, rows: int, columns: int, size: int, transposed: bool) -> Array:
        """(programs, warpgroups, rows, columns): where elements lie. Columns are k; `transposed`: a row's neighbours are of other rows.

        Tiles are 8 rows of as many bytes as the swizzle spans, each row contiguous along k, or transposed along the rows.
        """
        across, along = np.arange(rows)[:, None], np.arange(columns)[None, :]
        if transposed:
            across, along = along, across
        span = 16 << self.swizzle  # bytes of a row of a tile
        byte, tile = along * size % span, along * size // span
        start, leading, stride = (part[..., None, None] for part in (self.start, self.leading, self.stride))
        if self.swizzle == 0 and transposed:  # the two offsets change places
            leading, stride = stride, leading
        return swizzled(start + tile * leading + across // 8 * stride + across % 8 * span + byte, self.swizzle)


def shared_matrix(group: Group, bits: Array, rows: int, kind: str, transposed: bool) -> tuple[Array, Array]:
    """The matrix (programs, warpgroups, rows, k) that descriptors name, and the places of its bytes, which are read from now on."""
    size, columns = (4, 8) if kind == "tf32" else (2, 16)
    per_group = np.broadcast_to(bits, group.shape).reshape(group.shape[0], -1, WARPGROUP)
    if (per_group != per_group[:, :, :1]).any():
        raise Fault("refused", "threads of a warpgroup that give different matrix descriptors")
    offsets = Layout.of(per_group[:, :, 0]).addresses(rows, columns, size, transposed) - BASE
    if offsets.min() < 0 or offsets.max() + size > group.shared.size:
        raise Fault("memcheck", "a wgmma reads outside of shared memory")
    places = offsets + (np.arange(group.shape[0]) * group.shared.size)[:, None, None, None]
    places = np.broadcast_to(places, (group.shape[0], per_group.shape[1], rows, columns))
    every_byte = (places.reshape(*places.shape[:2], -1, 1) + np.arange(size)).reshape(*places.shape[:2], -1)
    group.shared.begin_product(every_byte)
    words = group.shared.data.view(UNSIGNED[size])[places // size]
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64), every_byte
    return (words.view(np.float16) if kind == "f16" else from_bfloat(words)).astype(np.float64), every_byte


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)")
def multiply_async(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """d = a @ b + d where scale-d holds, else a @ b. a has 64 rows, of which each warp of the warpgroup has 16."""
    columns, kind = int(match[1]), match[3]
    d_operand, a_operand, b_operand, scale, *more = each.operands
    flags = [flag.value for flag in more if isinstance(flag, Immediate)]
    a_in_registers = isinstance(a_operand, Vector)
    expected = 2 if kind == "tf32" else 3 if a_in_registers else 4
    assert kind == match[4] and flags[:2] == [1, 1] and len(flags) == len(more) == expected, "signs or transpositions"
    transposed = {"b": kind != "tf32" and flags[-1] == 1, "a": len(flags) == 4 and flags[2] == 1}
    d, b = translator.elements(d_operand, "b32"), translator.slot(b_operand, "b64")
    a = translator.elements(a_operand, "b32") if a_in_registers else [translator.slot(a_operand, "b64")]
    adds = translator.slot(scale, "pred")
    assert len(d) == columns // 2

    def run(group: Group, active: Array | None) -> None:
        products = group.products
        if active is not None or group.threads % WARPGROUP:
            raise Fault("deadlock", "a wgmma that only some threads of a warpgroup come to")
        # Compilers move registers behind the fence, which makes no new value.
        if any(id(group.registers[slot]) not in products.fenced for slot in (*d, *(a if a_in_registers else ()))):
            raise Fault("racecheck", "a wgmma without wgmma.fence before it")
        operands, fragments = [], {}
        if a_in_registers:
            left = matrix_of(group, a, kind).reshape(group.shape[0], -1, 64, 8 if kind == "tf32" else 16)
            fragments = {slot: group.registers[slot] for slot in a}
        else:
            left, places = shared_matrix(group, group.registers[a[0]], 64, kind, transposed["a"])
            operands.append(places)
        right, places = shared_matrix(group, group.registers[b], columns, kind, transposed["b"])
        operands.append(places)
        before = _accumulator(group, d) * group.registers[adds].astype(np.float32)[..., None, None]
        before = np.where(group.registers[adds][..., None, None], before, np.float32(0))
        _leave(group, d, multiply(left, np.swapaxes(right, -1, -2), before))
        products.loose.append(Product(fragments, {slot: group.registers[slot] for slot in d}, operands))

    return Step(run, tuple(d))


def _accumulator(group: Group, slots: list[int]) -> Array:
    """(programs, warpgroups, 64, columns) from registers: as mma.sync's, a warp below the other."""
    result = np.empty((group.shape[0], group.threads // WARPGROUP, 4, 2, 8, len(slots) // 4, 4, 2), np.float32)
    for at, slot in enumerate(slots):
        bits = group.products.sums.get(slot, group.registers[slot])
        values = np.broadcast_to(bits, group.shape).view(np.float32).reshape(group.shape[0], -1, 4, 8, 4)
        result[:, :, :, at // 2 % 2, :, at // 4, :, at % 2] = values
    return result.reshape(*result.shape[:2], 64, -1)


def _leave(group: Group, slots: list[int], result: Array) -> None:
    """The sums, for whoever waits, and NaN in the registers."""
    parts = result.reshape(*result.shape[:2], 4, 2, 8, -1, 4, 2)
    for at, slot in enumerate(slots):
        lanes = parts[:, :, :, at // 2 % 2, :, at // 4, :, at % 2]
        group.products.sums[slot] = np.ascontiguousarray(lanes).reshape(group.shape).view(np.uint32)
        group.registers[slot] = group.products.keep(np.full((1, 1), 0xFFFFFFFF, np.uint32))


@instruction(r"wgmma\.fence\.sync\.aligned")
def fence(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    def run(group: Group, active: Array | None) -> None:
        all_threads(active, "wgmma.fence")
        group.products.fenced = {id(bits): bits for bits in group.registers}

    return Step(run, ())


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def commit(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    def run(group: Group, active: Array | None) -> None:
        all_threads(active, "wgmma.commit_group")
        group.products.groups.append(group.products.loose)
        group.products.loose = []

    return Step(run, ())


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wait(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    assert isinstance(each.operands[0], Immediate)
    left = each.operands[0].value

    def run(group: Group, active: Array | None) -> None:
        all_threads(active, "wgmma.wait_group")
        group.products.wait(group, left)

    return Step(run, ())


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def fence_proxy(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """What threads stored is there for TMA and wgmma. Compilers put it before the barrier or after, and either is accepted."""

    def run(group: Group, active: Array | None) -> None:
        all_threads(active, "fence.proxy.async")
        group.shared.unfenced[:] = 0

    return Step(run, ())
