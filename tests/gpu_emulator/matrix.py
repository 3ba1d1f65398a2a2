"""Matrix instructions of a warp: mma.sync, ldmatrix and stmatrix, "Warp Level Matrix Multiply-Accumulate Instructions".

A lane is 4 * g + t: g in 0..7 chooses a row of a fragment, and t in 0..3 its columns.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import from_bfloat
from .memory import Array
from .memory_access import Place
from .parser import Instruction
from .translate import Step, Translator, instruction
from .warps import by_warp, full_warps

if TYPE_CHECKING:
    from .machine import Group


def unpack(words: Array, kind: str) -> Array:
    """The numbers in 32-bit registers as float64, along a new last axis: two of 16 bits, lower half first, or one of tf32."""
    if kind == "tf32":  # the 13 lowest bits are not read
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return (halves.view(np.float16) if kind == "f16" else from_bfloat(halves)).astype(np.float64)


def multiply(a: Array, b: Array, c: Array) -> Array:
    """a @ b + c, rounded once to float32. How a tensor core rounds inside is not specified."""
    return (np.matmul(a, b) + c).astype(np.float32)


@instruction(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)\.f32")
def mma(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """d = a @ b + c with a of 16 rows, b of 8 columns. Fragments as in "Matrix Fragments for mma.m16n8k8" and m16n8k16."""
    kind = match[2]
    d, a, b, c = (translator.elements(operand, "b32") for operand in each.operands)
    assert kind == match[3] and len(a) == 4 and (kind == "tf32") == (match[1] == "8"), "this shape has other fragments"

    def run(group: Group, active: Array | None) -> None:
        full_warps(group, active, "mma.sync")
        a_matrix, b_matrix = matrix_of(group, a, kind), np.swapaxes(matrix_of(group, b, kind), -1, -2)
        result = multiply(a_matrix, b_matrix, accumulator_of(group, c))
        for at, slot in enumerate(d):
            rows = result[:, :, 8 * (at // 2) : 8 * (at // 2) + 8, at % 2 :: 2]
            group.registers[slot] = np.ascontiguousarray(rows).reshape(group.shape).view(np.uint32)

    return Step(run, tuple(d))


def matrix_of(group: Group, slots: list[int], kind: str) -> Array:
    """(programs, warps, rows, columns) from registers that hold 8 rows each: of b the left half of k and the right one, and of a the left
    half's upper and lower rows, then the right half's."""
    words = [by_warp(group, group.registers[slot]) for slot in slots]
    parts = [unpack(each, kind).reshape(*each.shape[:-1], 8, -1) for each in words]
    if len(parts) == 4:
        return np.concatenate([np.concatenate(parts[:2], -2), np.concatenate(parts[2:], -2)], -1)
    return np.concatenate(parts, -1)


def accumulator_of(group: Group, slots: list[int]) -> Array:
    """(programs, warps, 16, 8) from four registers: two adjacent columns of row g, and of row g + 8."""
    result = np.empty((group.shape[0], group.warps, 16, 8), np.float32)
    for at, slot in enumerate(slots):
        values = by_warp(group, group.registers[slot]).view(np.float32)
        result[:, :, 8 * (at // 2) : 8 * (at // 2) + 8, at % 2 :: 2] = values.reshape(*values.shape[:2], 8, 4)
    return result


def _lanes_with_addresses(group: Group, active: Array | None, matrices: int) -> Array | None:
    """Lanes 0-7 give the rows' addresses of the first matrix, 8-15 of the second, and so on. The others' are not read."""
    if matrices == 4:
        return active
    these = np.broadcast_to(np.arange(group.threads) % 32 < 8 * matrices, group.shape)
    return these if active is None else these & active


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def load_matrices(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Matrices of 8 rows of 16 bytes. Lane 4 * g + t gets word t of row g, or transposed, rows 2t and 2t + 1 of column g."""
    slots, place, count = translator.elements(each.operands[0], "b32"), Place(translator, each.operands[1]), int(match[1])
    transposed = match[2] is not None
    assert len(slots) == count

    def run(group: Group, active: Array | None) -> None:
        full_warps(group, active, "ldmatrix")
        lanes = _lanes_with_addresses(group, active, count)
        addresses = place.of(group, lanes)
        group.launch.counts.shared_access(addresses, 16, group, lanes)
        index = group.shared.index(group.rows(lanes), addresses, 8, 2)
        loaded = group.shared.load(index, 8, group.warp(lanes)).view(np.uint32)
        words = np.zeros((*group.shape, 4), np.uint32)
        words[np.ones(group.shape, bool) if lanes is None else lanes] = loaded
        matrices = words.reshape(group.shape[0], group.warps, 4, 8, 4)
        for at, slot in enumerate(slots):
            matrix = np.ascontiguousarray(matrices[:, :, at])
            if transposed:
                elements = np.ascontiguousarray(np.swapaxes(matrix.view(np.uint16), -1, -2))
                matrix = elements.view(np.uint32)
            group.registers[slot] = matrix.reshape(group.shape)

    return Step(run, tuple(slots))


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def store_matrices(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """The opposite of ldmatrix."""
    place, slots, count = Place(translator, each.operands[0]), translator.elements(each.operands[1], "b32"), int(match[1])
    transposed = match[2] is not None
    assert len(slots) == count

    def run(group: Group, active: Array | None) -> None:
        full_warps(group, active, "stmatrix")
        lanes = _lanes_with_addresses(group, active, count)
        matrices = np.zeros((group.shape[0], group.warps, 4, 8, 4), np.uint32)
        for at, slot in enumerate(slots):
            matrix = np.ascontiguousarray(by_warp(group, group.registers[slot])).reshape(group.shape[0], group.warps, 8, 4)
            if transposed:
                matrix = np.ascontiguousarray(np.swapaxes(matrix.view(np.uint16), -1, -2)).view(np.uint32)
            matrices[:, :, at] = matrix
        addresses = place.of(group, lanes)
        group.launch.counts.shared_access(addresses, 16, group, lanes)
        index = group.shared.index(group.rows(lanes), addresses, 8, 2)
        rows = matrices.reshape(*group.shape, 4).view(np.uint64)
        group.shared.store(index, rows.reshape(-1, 2) if lanes is None else rows[lanes], group.warp(lanes))

    return Step(run, ())
