"""What a launch executes: instructions by class, tensor operations, requests to memory."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .machine import Group
    from .translate import Block

# The first class whose pattern an opcode begins with. An instruction is counted for each warp that issues it, guarded or not.
CLASSES = {
    "tensor": r"mma|wgmma\.mma", "exp2": r"ex2", "special": r"(lg2|rcp|sqrt|rsqrt|div)\.", "global": r"(ld|st)\.global|cp\.async\.c[ag]",
    "shared": r"(ld|st)\.(volatile\.)?shared|[ls][dt]matrix", "float": r"(add|sub|mul|fma|max|min|abs|neg)\.\w*\.?\w*\.?f(16|32)",
    "wait": r"bar|cp\.async|mbarrier|fence|wgmma", "exchange": r"shfl|redux|vote|elect", "branch": r"bra|ret|exit",
}  # fmt: skip
PRODUCT = re.compile(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)|wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")


@lru_cache
def class_of(opcode: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), "integer")


@lru_cache
def flops_of(opcode: str) -> float:
    """Of a tensor instruction, for each warp."""
    match = PRODUCT.match(opcode)
    if match is None:
        return 0
    sizes = [int(size) for size in match.groups() if size]
    return 2 * sizes[0] * sizes[1] * sizes[2] / (4 if opcode.startswith("w") else 1)


@lru_cache
def bytes_of(opcode: str) -> int:
    """Of a load, for each thread: ld.global.v4.b32 has 16."""
    *_, vector, kind = opcode.split(".")
    return int(kind[1:]) // 8 * (int(vector[1:]) if re.fullmatch(r"v\d", vector) else 1)


@dataclass
class Counts:
    """Of a launch, summed over its warps."""

    detailed: bool = False  # whether requests to memory are counted too, those of the first program of a group
    opcodes: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)  # of warps: "load", "store" and "shared"
    sectors: Counter[str] = field(default_factory=Counter)  # of 32 bytes that these touch in global memory
    requested_bytes: Counter[str] = field(default_factory=Counter)
    wavefronts: int = 0  # passes over the 32 banks of shared memory
    widths: Counter[tuple[str, int]] = field(default_factory=Counter)  # loads by their tensor's name and the bytes that each thread loads

    def block(self, block: Block, group: Group) -> None:
        if group.mask is None:
            warps = group.shape[0] * group.warps
        else:
            warps = int(group.mask.reshape(group.shape[0], group.warps, -1).any(2).sum())
        for opcode, number in block.opcodes.items():
            self.opcodes[opcode] += number * warps

    @property
    def instructions(self) -> Counter[str]:
        """By class."""
        classes = Counter[str]()
        for opcode, number in self.opcodes.items():
            classes[class_of(opcode)] += number
        return classes

    @property
    def tensor_flops(self) -> float:
        return sum(flops_of(opcode) * number for opcode, number in self.opcodes.items())

    @property
    def narrow_loads(self) -> int:
        """Loads of global memory by which each thread gets fewer than 16 bytes, counted as all instructions are."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.startswith("ld.global") and bytes_of(opcode) < 16)

    def bytes_a_thread(self, tensor: str) -> float:
        """How much of a tensor each thread loads at a time, on average: 16 is the most, and an element the least."""
        loads = {width: number for (name, width), number in self.widths.items() if name == tensor}
        return sum(width * number for width, number in loads.items()) / max(1, sum(loads.values()))

    def global_access(self, kind: str, addresses: Array, size: int, group: Group, active: Array | None) -> None:
        first = group.rows(active) == 0 if self.detailed else np.zeros(0, bool)
        if not first.any():
            return
        addresses, warp = addresses[first], group.warp(active)[first]
        pieces = [addresses.astype(np.int64) + at for at in range(0, size, 32)]
        keys = np.concatenate([warp * 2**48 + piece // 32 % 2**48 for piece in pieces])
        self.sectors[kind] += len(np.unique(keys))
        warps = len(np.unique(warp))
        self.requests[kind] += warps
        self.requested_bytes[kind] += len(addresses) * size
        if kind == "load":
            self.widths[group.launch.memory.owner(int(addresses[0])), size] += warps

    def shared_access(self, addresses: Array, size: int, group: Group, active: Array | None) -> None:
        """A request of more than 128 bytes is served a part of the warp at a time. Each part takes as many passes as its fullest bank."""
        first = group.rows(active) == 0 if self.detailed else np.zeros(0, bool)
        if not first.any():
            return
        addresses, warp = addresses[first], group.warp(active)[first]
        self.requests["shared"] += len(np.unique(warp))
        lane = group.pick(np.arange(group.threads)[None] % 32, active)[first]
        part = warp * 4 + lane * max(4, size) // 128
        words = np.unique(np.concatenate([part * 2**20 + addresses.astype(np.int64) // 4 + at for at in range(max(1, size // 4))]))
        banks, counts = np.unique(words // 2**20 * 32 + words % 32, return_counts=True)
        fullest = np.zeros(int(part.max()) + 1, np.int64)
        np.maximum.at(fullest, banks // 32, counts)
        self.wavefronts += int(fullest.sum())

    def add(self, other: Counts) -> None:
        self.opcodes += other.opcodes
        self.requests += other.requests
        self.sectors += other.sectors
        self.requested_bytes += other.requested_bytes
        self.wavefronts += other.wavefronts
        self.widths += other.widths
