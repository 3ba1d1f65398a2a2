"""Planted mistakes: every place in a kernel where one of five kinds of mistake can be made, and the kernel with it.

Some changes are no mistakes, and none can be caught. Which these are is decided here, by rules on the code or on what the run has met:
a barrier with no access to memory between it and the next; a wait while nothing is under way; a bound that no element is equal to; two
fragment registers that are one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .arithmetic import ARITHMETIC, Operation
from .memory import Array
from .parser import Immediate, Instruction, Kernel, Vector
from .translate import Step, Translator, instruction

KINDS = ("barrier dropped", "wait one too few", "fragments swapped", "bound off by one", "accumulator not zero")
MEMORY = re.compile(r"ld\.(global|shared|volatile)|st\.|[ls][dt]matrix|cp\.async|wgmma\.mma|mbarrier")
NEXT_TO = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


class Site(NamedTuple):
    kind: str
    at: int  # the instruction's number
    text: str


@dataclass
class Met:
    """Whether the run came upon anything for which the change matters."""

    anything: bool = False


MET = Met()


def sites(kernel: Kernel) -> Iterator[Site]:
    for at, each in enumerate(kernel.instructions):
        kind = _kind(kernel, at, each)
        if kind is not None:
            yield Site(kind, at, str(each))


def _kind(kernel: Kernel, at: int, each: Instruction) -> str | None:
    if each.opcode == "bar.sync":
        return "barrier dropped" if _matters(kernel, at) else None
    if re.match(r"(cp\.async|wgmma)\.wait_group", each.opcode):
        return "wait one too few"
    if each.opcode.startswith("mma.sync") or each.opcode.startswith("wgmma.mma") and isinstance(each.operands[1], Vector):
        a = each.operands[1]
        assert isinstance(a, Vector)
        return "fragments swapped" if a.elements[0] != a.elements[1] else None
    if re.match(r"setp\.(lt|le|gt|ge)\.[su](32|64)", each.opcode):
        return "bound off by one"
    if each.opcode.startswith("wgmma.mma") and each.operands[3] == Immediate(0):
        return "accumulator not zero"
    if each.opcode == "mov.b32" and each.operands[1] == Immediate(0, 32):
        return "accumulator not zero"
    return None


def _matters(kernel: Kernel, at: int) -> bool:
    """Whether there is an access to memory before the next barrier, and since the last one."""
    both = kernel.instructions[at + 1 :], reversed(kernel.instructions[:at])
    for side in both:
        for each in side:
            if each.opcode == "bar.sync":
                return False
            if MEMORY.match(each.opcode):
                break
    return True


def mutant(kernel: Kernel, site: Site) -> Kernel:
    """The kernel with the mistake. MET says afterwards whether the run met what it changes."""
    each = kernel.instructions[site.at]
    MET.anything = site.kind not in ("wait one too few", "bound off by one")
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
        return each._replace(operands=(each.operands[0], swapped, *each.operands[2:]))
    if kind == "bound off by one":
        return each._replace(opcode=f"mutant.{each.opcode}")
    if each.opcode == "mov.b32":
        return each._replace(operands=(each.operands[0], Immediate(0x3F800000, 32)))
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
    return Step(lambda group, active: None, ())


@instruction(r"mutant\.(cp\.async|wgmma)\.wait_group.*")
def wait_for_one_less(translator: Translator, each: Instruction, match: re.Match[str]) -> Step:
    count = each.operands[0]
    assert isinstance(count, Immediate)
    left = count.value

    def run(group, active):  # type: ignore[no-untyped-def]
        waiting = group.copying if match[1] == "cp.async" else group.products
        done = waiting.groups[: max(0, len(waiting.groups) - left)]
        MET.anything |= any(len(copy.row) for each in done for copy in each) if match[1] == "cp.async" else any(done)
        waiting.wait(group, left + 1)

    return Step(run, ())
