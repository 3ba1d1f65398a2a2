"""Planted mistakes: every place in a kernel where one of five kinds of mistake can be made, and the kernel with it.

Some changes are no mistakes, and none can be caught. Which these are is decided here, by rules on the code or on what the run has met:

- a barrier that the run does not need, by witness.py;
- a wait while nothing is under way, or one before a later wait for as much, where nothing on the way there names a register of the products
  under way. That nothing is written over what they read in shared memory, the run checks, and test_checks.py that it does;
- a bound that no element is equal to;
- two fragment registers that hold the same;
- a zero that no sum begins with, or that nothing reads before it is written over.

Where a bound or a zero decides on values alone, and not on what is accessed, it is no mistake either if every bit of the results is what it
was: another bound covers it, or the value is multiplied by 0 before anything is added.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .arithmetic import ARITHMETIC, Operation
from .memory import Array
from .parser import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector
from .translate import Step, Translator, instruction

if TYPE_CHECKING:
    from .machine import Group

KINDS = ("barrier dropped", "wait one too few", "fragments swapped", "bound off by one", "accumulator not zero")
NEXT_TO = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


@dataclass
class Met:
    """Whether the run came upon anything for which the change matters."""

    anything: bool = False


MET = Met()


class Watched(np.ndarray):  # type: ignore[type-arg]
    """A value that says when it is read. To move it from register to register is not to read it."""

    def __array_finalize__(self, source: object) -> None:
        MET.anything |= isinstance(source, Watched)


class Site(NamedTuple):
    kind: str
    at: int  # the instruction's number
    text: str


def sites(kernel: Kernel) -> Iterator[Site]:
    for at, each in enumerate(kernel.instructions):
        kind = _kind(kernel, at, each)
        if kind is not None:
            yield Site(kind, at, str(each))


def _kind(kernel: Kernel, at: int, each: Instruction) -> str | None:
    if each.opcode == "bar.sync":
        return "barrier dropped"
    if re.match(r"(cp\.async|wgmma)\.wait_group", each.opcode):
        return None if each.opcode.startswith("wgmma") and _waited_for_later(kernel, at) else "wait one too few"
    if each.opcode.startswith("mma.sync") or each.opcode.startswith("wgmma.mma") and isinstance(each.operands[1], Vector):
        a = each.operands[1]
        assert isinstance(a, Vector)
        return "fragments swapped" if a.elements[0] != a.elements[1] else None
    if re.match(r"setp\.(lt|le|gt|ge)\.[su](32|64)", each.opcode):
        return "bound off by one"
    if each.opcode.startswith("wgmma.mma") and each.operands[3] == Immediate(0):
        return "accumulator not zero"
    if each.opcode == "mov.b32" and each.operands[1] == Immediate(0, 32) and _begins_a_sum(kernel, each):
        return "accumulator not zero"
    return None


def _begins_a_sum(kernel: Kernel, zero: Instruction) -> bool:
    """Whether the register, or one that it is moved to, is added to by a product or a sum."""
    known = {zero.operands[0]}
    moves = [each for each in kernel.instructions if each.opcode == "mov.b32"]
    while more := {each.operands[0] for each in moves if each.operands[1] in known} - known:
        known |= more
    for each in kernel.instructions:
        addends = each.operands[-1:] if each.opcode.startswith(("mma", "fma")) else each.operands[:1] if "wgmma.mma" in each.opcode else ()
        addends = each.operands[1:] if each.opcode == "add.f32" else addends
        for operand in addends:
            if known & set(operand.elements if isinstance(operand, Vector) else (operand,)):
                return True
    return False


def decides_on_values_alone(kernel: Kernel, site: Site) -> bool:
    """A zero does. A bound does where no predicate that depends on it guards an access to memory or a branch."""
    if site.kind != "bound off by one":
        return site.kind == "accumulator not zero"
    known = {kernel.instructions[site.at].operands[0]}
    predicates = [each for each in kernel.instructions if each.opcode.endswith(".pred") or each.opcode.startswith("setp")]
    while more := {each.operands[0] for each in predicates if known & set(each.operands[1:])} - known:
        known |= more
    integers = [each for each in kernel.instructions if re.match(r"selp\.[bsu]|cvt.*pred", each.opcode)]  # sizes of copies, say
    return not any(each.guard in known for each in kernel.instructions) and not any(known & set(each.operands) for each in integers)


def _waited_for_later(kernel: Kernel, at: int) -> bool:
    """Whether every way on from a wait comes to one for as much before an instruction that names a register of a product before it."""
    each, products = kernel.instructions, set[Operand]()
    for before in _reached(kernel, at, backwards=True):
        if "wgmma.mma" in each[before].opcode:
            products |= _registers([one for one in each[before].operands[:2] if isinstance(one, Vector)])
    left = each[at].operands[0]
    assert isinstance(left, Immediate)
    for after in _reached(kernel, at, backwards=False):
        if each[after].opcode in ("ret", "exit") or products & _registers(each[after].operands):
            return False
    return True


def _reached(kernel: Kernel, at: int, backwards: bool) -> set[int]:
    """The instructions between a wait for products and the next for as much, or the last, on every way."""
    each, steps = kernel.instructions, defaultdict[int, list[int]](list)
    for number, one in enumerate(each):
        ways = [] if one.opcode in ("ret", "exit") or one.opcode.startswith("bra") and one.guard is None else [number + 1]
        if one.opcode.startswith("bra"):
            label = one.operands[0]
            assert isinstance(label, (Symbol, Register))
            ways.append(kernel.labels[label.name])
        for way in ways:
            steps[way if backwards else number].append(number if backwards else way)
    found, waiting, left = set[int](), steps[at][:], each[at].operands[0]
    while waiting:
        number = waiting.pop()
        one = each[number]
        if number in found or one.opcode == each[at].opcode and one.operands[0].value <= left.value:  # type: ignore[union-attr]
            continue
        found.add(number)
        waiting += steps[number]
    return found


def _registers(operands: Sequence[Operand]) -> set[Operand]:
    flat = [part for operand in operands for part in (operand.elements if isinstance(operand, Vector) else (operand,))]
    return {part.base if isinstance(part, Address) else part for part in flat if not isinstance(part, Immediate)}


def mutant(kernel: Kernel, site: Site) -> Kernel:
    """The kernel with the mistake. MET says afterwards whether the run met what it changes."""
    each = kernel.instructions[site.at]
    MET.anything = site.kind == "accumulator not zero" and each.opcode.startswith("wgmma.mma")
    changed = kernel.instructions[:]
    changed[site.at] = _changed(each, site.kind)
    return replace(kernel, instructions=changed)


def _changed(each: Instruction, kind: str) -> Instruction:
    if kind == "barrier dropped":
        return each._replace(opcode="mutant.nothing", operands=())
    if kind == "wait one too few":
        return each._replace(opcode=f"mutant.{each.opcode}")
    if kind == "fragments swapped":
        a = each.operands[1]
        assert isinstance(a, Vector)
        swapped = Vector((a.elements[1], a.elements[0], *a.elements[2:]))
        return each._replace(opcode=f"mutant.{each.opcode}", operands=(each.operands[0], swapped, *each.operands[2:]))
    if kind == "bound off by one":
        return each._replace(opcode=f"mutant.{each.opcode}")
    if each.opcode == "mov.b32":
        return each._replace(opcode="mutant.one", operands=each.operands[:1])
    return each._replace(operands=(*each.operands[:3], Immediate(1), *each.operands[4:]))


def _off_by_one(opcode: str) -> Operation:
    name = opcode.split(".")[1]
    right, wrong = ARITHMETIC[opcode], ARITHMETIC[opcode.replace(f".{name}.", f".{NEXT_TO[name]}.")]

    def compare(a: Array, b: Array) -> Array:
        result = wrong.function(a, b)
        MET.anything |= bool(np.any(result != right.function(a, b)))
        return result

    return right._replace(function=compare)


for name in NEXT_TO:
    for kind in ("s32", "u32", "s64", "u64"):
        ARITHMETIC[f"mutant.setp.{name}.{kind}"] = _off_by_one(f"setp.{name}.{kind}")


@instruction(r"mutant\.nothing")
def nothing(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    def run(group: Group, active: Array | None) -> None:
        MET.anything = True

    return Step(run, ())


@instruction(r"mutant\.(mma\.sync|wgmma\.mma_async)\..*")
def swapped(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    step = translator.step(each._replace(opcode=each.opcode.removeprefix("mutant.")))
    first, second = translator.elements(each.operands[1], "b32")[:2]

    def run(group: Group, active: Array | None) -> None:
        MET.anything |= bool(np.any(group.registers[first] != group.registers[second]))
        step.run(group, active)

    return step._replace(run=run)


@instruction(r"mutant\.one")
def one(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    slot = translator.slot(each.operands[0], "b32")

    def run(group: Group, active: Array | None) -> None:
        group.registers[slot] = np.full((1, 1), 0x3F800000, np.uint32).view(Watched)

    return Step(run, (slot,))


@instruction(r"mutant\.(cp\.async|wgmma)\.wait_group.*")
def wait_for_one_less(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    count = each.operands[0]
    assert isinstance(count, Immediate)
    left = count.value

    def run(group: Group, active: Array | None) -> None:
        waiting = group.copying if match[1] == "cp.async" else group.products
        done = waiting.groups[: max(0, len(waiting.groups) - left)]
        MET.anything |= any(len(copy.row) for each in done for copy in each) if match[1] == "cp.async" else any(done)
        waiting.wait(group, left + 1)

    return Step(run, ())
