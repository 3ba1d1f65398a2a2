"""The machine: groups of programs that run a kernel's blocks in lockstep.

All threads of all programs of a group do the same step at once. Programs that branch apart become groups of their own. Threads of a
program that branch apart run one side after the other, under a mask, until they meet again. Lockstep hides races and orders nothing that a
GPU does not order: what threads may rely on is checked where they read and write, in memory.py and shared.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import copies, matrix, memory_access, tensor_copies, warps, wgmma  # noqa: F401  they say which instructions they translate
from .counters import Counts
from .memory import Array, Fault, GlobalMemory, Lanes
from .parser import Kernel
from .shared import SharedMemory
from .translate import Block, Translator
from .warps import all_threads

LANES = 8192  # threads that run together, about as many as numpy needs to be quick and caches hold


class Compiled(NamedTuple):
    """A kernel that is ready to run."""

    kernel: Kernel
    blocks: list[Block]
    initial: list[Array]  # the registers' values at the start: of literals, and poison

    @classmethod
    def of(cls, kernel: Kernel) -> Compiled:
        translator = Translator(kernel)
        return cls(kernel, translator.translate(), translator.initial)


class Launch(NamedTuple):
    """What all programs of a launch share."""

    code: Compiled
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: bytes
    tensor_maps: dict[int, Any]  # parameter offset -> tensor_copies.TensorMap
    memory: GlobalMemory
    counts: Counts


@dataclass
class Group:
    """Programs that run together."""

    launch: Launch
    programs: Array  # (programs, 1), their numbers in the grid
    registers: list[Array]
    shared: SharedMemory
    copying: copies.Copying
    barriers: tensor_copies.Barriers
    products: wgmma.Products
    block: int | None = 0
    interval: int = 0  # barriers passed
    mask: Array | None = None  # the threads that run, where some have gone elsewhere

    def __post_init__(self) -> None:
        self.threads = self.launch.threads
        self.shape = (len(self.programs), self.threads)
        self.warps = -(-self.threads // 32)
        self._row = np.repeat(np.arange(len(self.programs)), self.threads)
        self._warp = np.tile(np.arange(self.threads) // 32, len(self.programs))
        self._program = np.repeat(self.programs[:, 0].astype(np.int64), self.threads)

    def pick(self, value: Array, active: Array | None) -> Array:
        """The active threads' values as a flat array."""
        full = np.broadcast_to(value, self.shape)
        return full.reshape(-1) if active is None else full[active]

    def rows(self, active: Array | None) -> Array:
        """Of each active thread, which of the group's programs it belongs to."""
        return self._row if active is None else self._row[active.reshape(-1)]

    def warp(self, active: Array | None) -> Array:
        return self._warp if active is None else self._warp[active.reshape(-1)]

    def lanes(self, active: Array | None) -> Lanes:
        program = self._program if active is None else self._program[active.reshape(-1)]
        return Lanes(program, self.warp(active), self.interval)

    def put(self, values: Array, active: Array | None) -> Array:
        """The active threads' values in their places, the opposite of `pick`."""
        if active is None:
            return values.reshape(self.shape)
        full = np.zeros(self.shape, values.dtype)
        full[active] = values
        return full

    def special(self, name: str) -> Array:
        """Section "Special Registers"."""
        x, y, _ = self.launch.grid
        values: dict[str, Any] = {
            "%tid.x": np.arange(self.threads)[None], "%tid.y": 0, "%tid.z": 0, "%laneid": np.arange(self.threads)[None] % 32,
            "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": self.programs % x, "%ctaid.y": self.programs // x % y, "%ctaid.z": self.programs // x // y,
        }  # fmt: skip
        values |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", self.launch.grid, strict=True)}
        if name not in values:
            raise Fault("refused", f"special register {name}")
        return np.atleast_2d(np.asarray(values[name], dtype=np.uint32))

    def barrier(self, active: Array | None) -> None:
        """bar.sync, for all threads of a program."""
        if active is not None and (active.any(1) & ~active.all(1)).any():
            raise Fault("deadlock", "a barrier that only some threads of a program come to")
        all_threads(active, "a barrier")
        self.shared.barrier()
        self.interval += 1

    def split(self, chosen: Array) -> Group:
        """Leaves the programs that are not chosen, and returns those that are as a group of their own."""
        registers = _rows(self.registers, chosen)
        return Group(
            self.launch, self.programs[chosen], registers, self.shared.rows(chosen), self.copying.rows(chosen, self),
            self.barriers.rows(chosen), self.products.rows(chosen, self, registers), self.block, self.interval,
        )  # fmt: skip


def _rows(registers: list[Array], chosen: Array) -> list[Array]:
    return [value if value.shape[0] == 1 else value[chosen] for value in registers]


def run(launch: Launch) -> None:
    """All programs of the launch, a group after the other. Raises Fault at the first thing that is wrong."""
    total = int(np.prod(launch.grid))
    each = max(1, LANES // launch.threads)
    waiting = [np.arange(start, min(start + each, total), dtype=np.uint32)[:, None] for start in range(0, total, each)]
    launch.memory.begin()
    with np.errstate(all="ignore"):
        for programs in waiting:
            groups = [_new_group(launch, programs)]
            while groups:
                groups += _run_until(groups.pop(), None)
    launch.memory.finish()


def _new_group(launch: Launch, programs: Array) -> Group:
    shared = SharedMemory(len(programs), launch.code.kernel.shared_size + launch.shared_bytes)
    registers = list(launch.code.initial)
    return Group(launch, programs, registers, shared, copies.Copying(), tensor_copies.Barriers(len(programs)), wgmma.Products())


def _run_until(group: Group, stop: int | None) -> list[Group]:
    """Run a group from its block up to the block `stop`, or to the end. Returns the groups that parted from it, which have still to run."""
    parted: list[Group] = []
    blocks = group.launch.code.blocks
    while group.block is not None and group.block != stop:
        block = blocks[group.block]
        _run_block(group, block)
        if block.condition is None:
            group.block = block.target
            continue
        taken = group.registers[block.condition]
        taken = ~taken if block.negated else taken
        active = np.ones((1, 1), bool) if group.mask is None else group.mask
        goes, stays = taken & active, ~taken & active
        if not stays.any():
            group.block = block.target
        elif not goes.any():
            group.block = block.following
        elif group.mask is None and (each := np.broadcast_to(taken, group.shape)).all(1).tolist() == each.any(1).tolist():
            group.block = block.target
            parted.append(group.split(each[:, 0]))
            group.block = block.following
            group = group.split(~each[:, 0])
        else:
            _run_both_sides(group, block, goes, stays)
    if group.block is None and group.mask is None:
        _check_end(group)
    return parted


def _run_both_sides(group: Group, block: Block, goes: Array, stays: Array) -> None:
    """Threads of one program part, and meet again at the block's join."""
    mask = group.mask
    for side, start in ((stays, block.following), (goes, block.target)):
        group.mask, group.block = np.broadcast_to(side, group.shape), start
        if _run_until(group, block.join):
            raise AssertionError("a group under a mask does not part")
    group.mask, group.block = mask, block.join


def _run_block(group: Group, block: Block) -> None:
    group.launch.counts.block(block, group)
    steps = block.steps if group.mask is None else block.masked_steps
    at = 0
    try:
        for at, step in enumerate(steps):  # noqa: B007
            step(group, None)
    except Fault as fault:
        fault.where = fault.where or f"{group.launch.code.kernel.name}, {block.instructions[at]}"
        raise


def _check_end(group: Group) -> None:
    try:
        group.copying.check_end()
        group.products.check_end()
    except Fault as fault:
        fault.where = f"{group.launch.code.kernel.name}, line {group.launch.code.kernel.instructions[-1].line}: the end"
        raise
