"""PTX as text to PTX as data: the parameters, memory and instructions of a module's kernels.

Nothing is interpreted here. What the grammar of a statement does not cover is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Refused(Exception):
    """The emulator does not know this piece of PTX, and does not guess what it means."""


class Register(NamedTuple):
    name: str


class Special(NamedTuple):
    """A special register such as %tid.x."""

    name: str


class Immediate(NamedTuple):
    value: int
    bits: int | None = None  # of a floating-point literal, whose value is its bits; None for an integer


class Symbol(NamedTuple):
    """The address of a variable or of a parameter."""

    name: str


class Address(NamedTuple):
    """[base + offset], and for a tensor map [base, {coordinates}]."""

    base: Register | Symbol | Immediate
    offset: int
    coordinates: tuple[Operand, ...] = ()


class Vector(NamedTuple):
    elements: tuple[Operand, ...]


class Pair(NamedTuple):
    """A result and the predicate that comes with it, d|p."""

    first: Operand
    second: Operand


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None  # the predicate before it, @p
    guard_negated: bool
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    threads: int  # of a program; 0 where the module leaves it to the launch
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> the instruction that follows
    registers: dict[str, str] = field(default_factory=dict)  # name -> type; %r<9> declares "%r"
    shared: dict[str, int] = field(default_factory=dict)  # name -> offset of each variable in shared memory
    shared_size: int = 0  # of those with a size; what the launch adds comes after
    has_dynamic: bool = False  # whether one without a size was declared, which begins where what the launch adds does

    def type_of(self, name: str) -> str:
        known = self.registers.get(name) or self.registers.get(name.rstrip("0123456789"))
        if known is None:
            raise Refused(f"register {name} is not declared")
        return known


SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
ENTRY = re.compile(r"\.(?:visible|weak)?\s*\.?entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.S)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)(?:\[(\d+)\])?")
THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
VARIABLE = re.compile(r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\];")
LABEL = re.compile(r"([\w$]+):")
LINES_WITHOUT_END = re.compile(r"^[ \t]*\.(?:loc|file)\b.*$", re.M)  # directives that end with their line
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name."""
    text = COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    text = LINES_WITHOUT_END.sub("", text)
    kernels, entries = {}, list(ENTRY.finditer(text))
    for match in entries:
        threads = THREADS.search(match[3])
        kernel = Kernel(match[1], list(_parameters(match[2])), int(threads[1]) if threads else 0)
        for variable in VARIABLE.finditer(text[: entries[0].start()]):  # the module's own
            _declare_shared(kernel, variable)
        _Body(kernel, text, match.end()).read()
        kernels[kernel.name] = kernel
    return kernels


def _parameters(text: str) -> Iterator[Parameter]:
    offset = 0
    for align, kind, name, count in PARAMETER.findall(text):
        size = SIZES[kind] * int(count or 1)
        step = int(align or SIZES[kind])
        offset = -(-offset // step) * step
        yield Parameter(name, offset, size)
        offset += size


def _declare_shared(kernel: Kernel, variable: re.Match[str]) -> None:
    align, kind, name, count = int(variable[1]), variable[2], variable[3], variable[4]
    if count and kernel.has_dynamic:
        raise Refused(f"shared variable {name} behind one without a size")
    kernel.has_dynamic |= not count
    at = -(-kernel.shared_size // align) * align
    kernel.shared[name] = at
    kernel.shared_size = at + SIZES[kind] * int(count or 0)


class _Body:
    """The statements between a kernel's braces. Braces inside open a scope with names of its own, as inline assembly has."""

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.at = kernel, text, start
        self.scopes: list[tuple[int, set[str]]] = []  # the number of each open scope, and the names declared in it
        self.line, self.counted = 1 + text.count("\n", 0, start), start
        self.scope_count = 0

    def read(self) -> None:
        """Up to the brace that closes the kernel."""
        while True:
            self._skip_space()
            if self.text[self.at] == "}":
                self.at += 1
                if not self.scopes:
                    return
                self.scopes.pop()
            elif self.text[self.at] == "{":
                self.at += 1
                self.scope_count += 1
                self.scopes.append((self.scope_count, self._names_declared_here()))
            elif label := LABEL.match(self.text, self.at):
                self.kernel.labels[self._scoped(label[1])] = len(self.kernel.instructions)
                self.at = label.end()
            else:
                end = self.text.index(";", self.at)
                self._statement(self.text[self.at : end].strip())
                self.at = end + 1

    def _skip_space(self) -> None:
        while self.text[self.at].isspace():
            self.at += 1
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at

    def _names_declared_here(self) -> set[str]:
        end = self.text.index("}", self.at)
        while self.text.count("{", self.at, end) > self.text.count("}", self.at, end):
            end = self.text.index("}", end + 1)
        inside = self.text[self.at : end]
        registers = [name.strip().split("<")[0] for names in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", inside) for name in names.split(",")]
        return {*registers, *re.findall(r"^\s*([\w$]+):", inside, re.M)}

    def _scoped(self, name: str) -> str:
        stem = name.rstrip("0123456789")
        for number, names in reversed(self.scopes):
            if name in names or (name.startswith("%") and stem in names):
                return f"{name}@{number}" if name in names else f"{stem}@{number}.{name[len(stem):]}"
        return name

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", text, re.S).groups()  # type: ignore[union-attr]
            for name in names.split(","):
                self.kernel.registers[self._scoped(name.strip().split("<")[0])] = kind
        elif text.startswith(".shared"):
            variable = VARIABLE.fullmatch(text + ";")
            if variable is None:
                raise Refused(f"line {self.line}: {text}")
            _declare_shared(self.kernel, variable)
        elif text.startswith(".pragma"):
            pass  # a hint to the compiler
        elif text.startswith("."):
            raise Refused(f"line {self.line}: directive {text}")
        else:
            self.kernel.instructions.append(self._instruction(text))

    def _instruction(self, text: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
        if match is None:
            raise Refused(f"line {self.line}: {text}")
        guard = Register(self._scoped(match[2])) if match[2] else None
        operands = tuple(self._operand(part) for part in _split(match[4]))
        return Instruction(match[3], operands, guard, match[1] == "!", self.line, " ".join(text.split()))

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if literal := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return Immediate(int(literal[1] or literal[2], 16), 32 if literal[1] else 64)
        if INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"%[a-z_]+(?:\.[xyz])?", text) and self._scoped(text) == text and text not in self.kernel.registers:
            return Special(text)
        name = self._scoped(text)
        if text.startswith("%") or text == "_" or name in self.kernel.registers:
            return Register(name)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(name)
        raise Refused(f"line {self.line}: operand {text}")

    def _address(self, text: str) -> Address:
        base, *rest = _split(text)
        coordinates: tuple[Operand, ...] = ()
        if rest:
            vector = self._operand(rest[0])
            if len(rest) > 1 or not isinstance(vector, Vector):
                raise Refused(f"line {self.line}: address [{text}]")
            coordinates = vector.elements
        name, plus, offset = (part.strip() for part in base.partition("+"))
        operand = self._operand(name)
        if not isinstance(operand, (Register, Symbol, Immediate)):
            raise Refused(f"line {self.line}: address [{text}]")
        return Address(operand, int(offset, 0) if plus else 0, coordinates)


def _split(text: str) -> list[str]:
    """Operands, at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
