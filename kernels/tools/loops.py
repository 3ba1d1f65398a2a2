"""What a kernel executes in its inner loop, counted in its machine code: the loop that holds its products and exponentials.

Nothing is run: each instruction of the loop counts once for each time round, and shared memory as if no two lanes of an access met in one
bank. What is outside the loop, and how long anything waits, is not seen.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# An instruction, its operands, or a label before one. The address is not used: branches name labels.
LINE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:(@!?U?P\w+) )?([A-Z][A-Z0-9_.a-z]*)(.*?);|^(\.L_x_\d+):", re.MULTILINE)
TARGET = re.compile(r"\.L_x_\d+")
MMA = re.compile(r"^(?:HMMA\.(?:(16)(8)(\d+)|(16)(\d)(\d))|HGMMA\.(\d+)x(\d+)x(\d+))\.")
SHARED = re.compile(r"^(LDS|STS|LDSM|STSM|LDGSTS|ATOMS)\b(?:.*?\.(64|128|M88\.2|M88\.4|MT88\.2|MT88\.4|2|4))?")
PASSES_OF_A_WARP = {None: 1, "64": 2, "128": 4, "M88.2": 2, "MT88.2": 2, "M88.4": 4, "MT88.4": 4, "2": 2, "4": 4}
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")
WARPGROUP = 4  # warps, which execute one wgmma together


class Loop(NamedTuple):
    """What a warp executes once round the loop."""

    instructions: int = 0
    exponentials: int = 0  # exp2 of 32 lanes
    flops: float = 0.0  # of the tensor cores
    hmma: float = 0.0  # those of HMMA, and below of HGMMA, in TF32 twice: a tensor core does half as many at a time
    hgmma: float = 0.0
    passes: float = 0.0  # over shared memory's 128 bytes
    has_others: bool = False  # whether there are products besides, by UTC*MMA, whose sizes do not stand in the code


class Instruction(NamedTuple):
    predicate: str
    opcode: str
    operands: str


def blocks(code: str) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The basic blocks, and to which ones each leads."""
    bodies: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for predicate, opcode, operands, label in LINE.findall(code):
        if label:
            if bodies[-1]:
                bodies.append([])
            labels[label] = len(bodies) - 1
            continue
        bodies[-1].append(Instruction(predicate, opcode, operands))
        if opcode.split(".")[0] in ENDS:
            bodies.append([])
    following = []
    for index, body in enumerate(bodies):
        last = body[-1] if body else Instruction("", "NOP", "")
        target = TARGET.search(last.operands) if last.opcode.startswith("BRA") else None
        conditional = bool(last.predicate) or last.operands.strip().startswith(("P", "!P", "UP", "!UP"))
        conditional |= last.opcode == "BRA.DIV"  # It is taken where the threads of a warp are apart.
        onwards = conditional or last.opcode.split(".")[0] not in ENDS
        ways = [labels[target[0]]] if target and target[0] in labels else []
        following.append(ways + [index + 1] * (onwards and index + 1 < len(bodies)))
    return bodies, following


def natural_loops(following: list[list[int]]) -> list[set[int]]:
    """The blocks of each loop: an edge back to a block that every way to the edge goes through, and all between."""
    before: list[list[int]] = [[] for _ in following]
    for index, ways in enumerate(following):
        for way in ways:
            before[way].append(index)
    everything = set(range(len(following)))
    dominators = [{0}, *(everything for _ in following[1:])]
    changed = True
    while changed:
        changed = False
        for index in range(1, len(following)):
            common = set.intersection(*(dominators[way] for way in before[index])) if before[index] else set()
            changed |= dominators[index] != common | {index}
            dominators[index] = common | {index}
    loops: dict[int, set[int]] = {}
    for index, ways in enumerate(following):
        for head in ways:
            if head in dominators[index]:
                body = loops.setdefault(head, {head})
                waiting = [index]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += before[block]
    return list(loops.values())


def count(instructions: list[Instruction]) -> Loop:
    exponentials, flops, passes, others, cost = 0, 0.0, 0.0, False, {"HMMA": 0.0, "HGMMA": 0.0}
    for _, opcode, operands in instructions:
        exponentials += opcode.startswith("MUFU.EX2")
        others |= opcode.startswith("UTC") and "MMA" in opcode
        if found := MMA.match(opcode):
            rows, cols, depth = (int(size) for size in found.groups() if size)
            unit, is_wide = opcode.split(".")[0], "TF32" in opcode
            together = WARPGROUP if unit == "HGMMA" else 1
            flops += 2 * rows * cols * depth / together
            cost[unit] += 2 * rows * cols * depth / together * (1 + is_wide)
            if unit == "HGMMA":  # It reads its second operand from shared memory, and the first where no register is named for that.
                from_registers = len(re.findall(r"\bR\d+|\bRZ", operands.split("gdesc")[0])) > 1
                passes += (cols + rows * (not from_registers)) * depth * (4 if is_wide else 2) / 128 / together
        elif found := SHARED.match(opcode):
            passes += PASSES_OF_A_WARP[found[2]]
    return Loop(len(instructions), exponentials, flops, cost["HMMA"], cost["HGMMA"], passes, others)


def inner_loop(code: str) -> Loop:
    """The innermost loop with the most tensor operations, or exponentials where there are none. All 0 where no loop has any.

    Of several that have as many the shortest: a pass over keys has a second loop for the last block, which tests what the first need not.
    """
    bodies, following = blocks(code)
    counted = [(loop, count([line for block in sorted(loop) for line in bodies[block]])) for loop in natural_loops(following)]
    busy = [(loop, of) for loop, of in counted if of.flops or of.exponentials]
    innermost = [of for loop, of in busy if not any(other < loop for other, _ in busy)]
    return max(innermost, key=lambda of: (of.flops, of.exponentials, -of.instructions), default=Loop())
