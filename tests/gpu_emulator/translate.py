"""Instructions to Python: a kernel becomes basic blocks of steps, each a function of the threads that run it.

A register is a slot of a list, and its value an array of unsigned integers that broadcasts to (programs, threads). Literals have slots too.
The units (memory_access.py, warps.py, copies.py, matrix.py, wgmma.py) say by `@instruction` which opcodes they translate.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arithmetic import ARITHMETIC, DTYPES
from .memory import UNSIGNED, Array
from .parser import SIZES, Immediate, Instruction, Kernel, Operand, Pair, Refused, Register, Special, Symbol, Vector
from .shared import BASE as SHARED_BASE

if TYPE_CHECKING:
    from .machine import Group

# A step gets the group of programs, and which of their threads are active: None where all are.
Run = Callable[["Group", Array | None], None]
PARAMETER_BASE = 0x4000_0000  # the address of the first parameter
ENDS = ("bra", "bra.uni", "ret", "exit", "trap")


class Step(NamedTuple):
    run: Run
    writes: tuple[int, ...]  # the slots whose old values inactive threads keep


Builder = Callable[["Translator", Instruction, "re.Match[str]"], Step]
UNITS: list[tuple[re.Pattern[str], Builder]] = []


def instruction(pattern: str) -> Callable[[Builder], Builder]:
    """The decorated function translates the opcodes that match the whole pattern."""

    def register(builder: Builder) -> Builder:
        UNITS.append((re.compile(pattern), builder))
        return builder

    return register


class Block(NamedTuple):
    """Instructions that run one after the other, and where to go then."""

    instructions: list[Instruction]
    opcodes: Counter[str]
    steps: list[Run]
    masked_steps: list[Run]  # the same for groups some of whose threads went elsewhere
    condition: int | None  # the slot of the predicate of the branch at the end; None where it is not taken on a condition
    negated: bool
    target: int | None  # the block branched to; None: the threads return
    following: int | None  # the block that follows where the branch is not taken
    join: int | None = None  # the block where threads that the branch parts meet again; None: at the end


class Translator:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.slots: dict[Any, int] = {}
        self.initial: list[Array] = []
        self.offsets = {parameter.name: parameter.offset for parameter in kernel.parameters}

    def slot(self, operand: Operand, kind: str) -> int:
        """Where the operand's value is. kind: the type that the instruction takes it for, which gives a literal its width."""
        if isinstance(operand, Register):
            width = self.kernel.type_of(operand.name) if operand.name != "_" else kind
            return self._find(operand, np.bool_(False) if width == "pred" else np.uint64(2**64 - 1), SIZES[width], width == "pred")
        if isinstance(operand, Immediate):
            value = np.uint64(operand.value % 2**64) if kind != "pred" else operand.value != 0
            return self._find((operand.value, kind), value, SIZES[kind], kind == "pred")
        if isinstance(operand, Symbol):
            return self._find((operand, kind), np.uint64(self.address_of(operand)), SIZES[kind], False)
        raise Refused(f"operand {operand} where a value is expected")

    def _find(self, key: Any, value: Any, size: int, is_predicate: bool) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.initial)
            value = np.asarray(value).astype(np.bool_ if is_predicate else UNSIGNED[size])
            self.initial.append(value.reshape(1, 1))
        return self.slots[key]

    def address_of(self, symbol: Symbol) -> int:
        if symbol.name in self.kernel.shared:
            return SHARED_BASE + self.kernel.shared[symbol.name]
        if symbol.name in self.offsets:
            return PARAMETER_BASE + self.offsets[symbol.name]
        raise Refused(f"symbol {symbol.name}")

    def elements(self, operand: Operand, kind: str) -> list[int]:
        """The slots of a vector's elements, or of the one register that stands for a vector of one."""
        return [self.slot(part, kind) for part in (operand.elements if isinstance(operand, Vector) else (operand,))]

    def translate(self) -> list[Block]:
        starts = {0, *self.kernel.labels.values()}
        starts |= {at + 1 for at, each in enumerate(self.kernel.instructions) if each.opcode in ENDS}
        ordered = sorted(start for start in starts if start < len(self.kernel.instructions))
        number = {start: at for at, start in enumerate(ordered)}
        number[len(self.kernel.instructions)] = len(ordered)
        ends = [*ordered[1:], len(self.kernel.instructions)]
        blocks = [self._block(start, end, number) for start, end in zip(ordered, ends, strict=True)]
        return with_joins(blocks)

    def _block(self, start: int, end: int, number: dict[int, int]) -> Block:
        inside = self.kernel.instructions[start:end]
        last = inside[-1] if inside and inside[-1].opcode in ENDS else None
        body = inside[:-1] if last else inside
        following: int | None = number[end] if end < len(self.kernel.instructions) else None
        steps, masked = zip(*map(self._steps, body), strict=True) if body else ((), ())
        opcodes = Counter(each.opcode for each in inside)
        if last is None:
            return Block(inside, opcodes, list(steps), list(masked), None, False, following, None)
        if last.opcode == "trap":
            raise Refused(f"{last}: trap")
        target = None
        if last.opcode.startswith("bra"):
            label = last.operands[0]
            assert isinstance(label, (Symbol, Register))
            target = number[self.kernel.labels[label.name]]
        if last.guard is None:
            return Block(inside, opcodes, list(steps), list(masked), None, False, target, None)
        return Block(inside, opcodes, list(steps), list(masked), self.slot(last.guard, "pred"), last.guard_negated, target, following)

    def _steps(self, each: Instruction) -> tuple[Run, Run]:
        """The step as it is, and for groups with a mask."""
        try:
            step = self.step(each)
        except (Refused, KeyError, ValueError, AssertionError) as error:
            raise Refused(f"{each}: {error or type(error).__name__}") from error
        guard = None if each.guard is None else self.slot(each.guard, "pred")
        plain = step.run if guard is None else where_active(step, guard, each.guard_negated)
        return plain, where_active(step, guard, each.guard_negated)

    def step(self, each: Instruction) -> Step:
        if each.opcode in ARITHMETIC:
            return self._arithmetic(each)
        for pattern, builder in UNITS:
            if match := pattern.fullmatch(each.opcode):
                return builder(self, each, match)
        raise Refused(f"opcode {each.opcode} is not known")

    def _arithmetic(self, each: Instruction) -> Step:
        function, kinds, kind = ARITHMETIC[each.opcode]
        result, *sources = each.operands
        slots = [self.slot(source, of) for source, of in zip(sources, kinds, strict=True)]
        readers = [reader(self.initial[slot].dtype, DTYPES[of]) for slot, of in zip(slots, kinds, strict=True)]
        to = self.slot(result, kind)
        convert = writer(DTYPES[kind], self.initial[to].dtype)

        def run(group: Group, active: Array | None) -> None:
            registers = group.registers
            registers[to] = convert(function(*[read(registers[slot]) for read, slot in zip(readers, slots)]))  # noqa: B905

        return Step(run, (to,))


def reader(stored: np.dtype[Any], wanted: np.dtype[Any]) -> Callable[[Array], Array]:
    """From a register's bits to a type. Of a wider register it takes the lower bits."""
    if stored == wanted:
        return lambda bits: bits
    if stored.itemsize == wanted.itemsize:
        return lambda bits: bits.view(wanted)
    narrow = UNSIGNED[wanted.itemsize]
    return lambda bits: bits.astype(narrow).view(wanted)


def writer(produced: np.dtype[Any], stored: np.dtype[Any]) -> Callable[[Array], Array]:
    """From a result to a register's bits. A wider register is filled up with zeros or with the sign."""
    if produced == stored:
        return lambda value: value
    if produced.itemsize == stored.itemsize:
        return lambda value: np.asarray(value).view(stored)
    return lambda value: value.astype(stored)


def where_active(step: Step, guard: int | None, negated: bool) -> Run:
    """The step for the threads whose guard holds, among those that have not gone elsewhere. The others keep their registers."""

    def run(group: Group, _: Array | None) -> None:
        active = group.mask
        if guard is not None:
            holds = ~group.registers[guard] if negated else group.registers[guard]
            active = holds if active is None else holds & active
        if active is None or active.all():
            step.run(group, None)
        elif active.any():
            before = [group.registers[slot] for slot in step.writes]
            step.run(group, np.broadcast_to(active, group.shape))
            for slot, old in zip(step.writes, before, strict=True):
                group.registers[slot] = np.where(active, group.registers[slot], old)

    return run


def with_joins(blocks: list[Block]) -> list[Block]:
    """With each block's immediate post-dominator, the first block that every way from it to the end goes through."""
    end = len(blocks)
    after = [{end if to is None else to for to in _ways(block)} for block in blocks]
    dominators = [set(range(end + 1)) for _ in blocks] + [{end}]
    changed = True
    while changed:
        changed = False
        for at in reversed(range(end)):
            new = {at} | set.intersection(*(dominators[to] for to in after[at]))
            changed |= new != dominators[at]
            dominators[at] = new
    joins = []
    for at in range(end):
        others = dominators[at] - {at}
        nearest = next(one for one in others if others == dominators[one])
        joins.append(None if nearest == end else nearest)
    return [block._replace(join=join) for block, join in zip(blocks, joins, strict=True)]


def _ways(block: Block) -> set[int | None]:
    return {block.target} if block.condition is None else {block.target, block.following}


@instruction(r"mov\.(pred|[bufs](?:16|32|64))")
def move(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    """Also of special registers, of addresses, and to and from vectors."""
    kind = match[1]
    to, source = each.operands
    if isinstance(source, Special):
        slot = translator.slot(to, kind)

        def special(group: Group, active: Array | None) -> None:
            group.registers[slot] = group.special(source.name).astype(group.registers[slot].dtype)

        return Step(special, (slot,))
    if isinstance(to, Vector):
        return _unpack(translator, to, source, kind)
    if isinstance(source, Vector):
        return _pack(translator, to, source, kind)
    slot, old = translator.slot(to, kind), translator.slot(source, kind)

    def run(group: Group, active: Array | None) -> None:
        group.registers[slot] = group.registers[old]

    return Step(run, (slot,))


def _part(kind: str, vector: Vector) -> tuple[str, np.dtype[Any]]:
    size = SIZES[kind] // len(vector.elements)
    return f"b{8 * size}", UNSIGNED[size]


def _unpack(translator: Translator, to: Vector, source: Operand, kind: str) -> Step:
    part, dtype = _part(kind, to)
    whole, slots = translator.slot(source, kind), translator.elements(to, part)
    wide = UNSIGNED[SIZES[kind]].type
    shifts = [wide(8 * dtype.itemsize * at) for at in range(len(slots))]

    def run(group: Group, active: Array | None) -> None:
        bits = group.registers[whole]
        for slot, shift in zip(slots, shifts, strict=True):
            group.registers[slot] = (bits >> shift).astype(dtype)

    return Step(run, tuple(slots))


def _pack(translator: Translator, to: Operand, source: Vector, kind: str) -> Step:
    part, dtype = _part(kind, source)
    slot, slots = translator.slot(to, kind), translator.elements(source, part)
    wide = UNSIGNED[SIZES[kind]].type

    def run(group: Group, active: Array | None) -> None:
        parts = [group.registers[each].astype(wide) << wide(8 * dtype.itemsize * at) for at, each in enumerate(slots)]
        total = parts[0]
        for more in parts[1:]:
            total = total | more
        group.registers[slot] = total

    return Step(run, (slot,))


def results_of(translator: Translator, operand: Operand, kind: str) -> tuple[int, int | None]:
    """The slots of a result, and of the predicate beside it where there is one."""
    if isinstance(operand, Pair):
        return translator.slot(operand.first, kind), translator.slot(operand.second, "pred")
    return translator.slot(operand, kind), None
