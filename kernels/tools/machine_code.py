"""What a compiled kernel's machine code says of its speed: registers, spills, tensor cores and loads."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.runtime.cache import get_cache_manager

from . import loops
from .loops import Loop, inner_loop

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Tensor-core instruction -> what waits for it. HMMA is synchronous: what stops a stream of them is a barrier or a copy not yet there.
WAITS = {"HGMMA": r"WARPGROUP\.DEPBAR", "UTC[A-Z]*MMA": r"SYNCS\.PHASECHK", "HMMA": r"BAR\.SYNC|DEPBAR"}
OPCODE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?\w+ )?([A-Z][A-Z0-9_.a-z]*)(.*?);", re.MULTILINE)
LOAD = re.compile(r"^(LDG|LDGSTS|UTMALDG)\b(?:.*?\.(64|128))?")


class Reading(NamedTuple):
    """One kernel's machine code."""

    registers: int  # per thread
    spill_bytes: int
    instruction: str  # of the tensor cores; "" where there is none
    shortest: int  # tensor-core instructions between two waits
    longest: int
    groups: int  # of asynchronous ones that are waited for together; 0 where they are synchronous
    loads: dict[str, int]  # bits of a load from global memory, or "TMA" -> how many
    loop: Loop = Loop()

    def text(self) -> str:
        run = f"{self.instruction} {self.shortest}-{self.longest}" if self.instruction else ""
        loads = " ".join(f"{bits}*{n}" for bits, n in sorted(self.loads.items()))
        return f"{self.registers:3} regs {self.spill_bytes:6} spill  {run:14} loads {loads:20}"


def read(cubin: bytes) -> Reading:
    """Disassembled, unless Triton's cache has the reading of this cubin by these files."""
    readers = b"".join(Path(file).read_bytes() for file in (__file__, loops.__file__))
    cache = get_cache_manager(hashlib.sha256(cubin + readers).hexdigest())
    path = cache.get_file("reading.json")
    if path is None:
        path = cache.put(json.dumps(_read(cubin)), "reading.json", binary=False)
    *figures, loop = json.loads(Path(path).read_text())
    return Reading(*figures)._replace(loop=Loop(*loop))


def _read(cubin: bytes) -> Reading:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    registers, stack, local = (re.search(name + r":(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, usage
    return Reading(int(registers[1]), int(stack[1]) + int(local[1]), *tensor_cores(code), loads(code), inner_loop(code))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def tensor_cores(code: str) -> tuple[str, int, int, int]:
    """The fastest tensor-core instruction there, the shortest and the longest run of it between waits, and its groups."""
    for name, wait in WAITS.items():
        runs, groups = [0], 0
        for opcode, operands in OPCODE.findall(code):
            if re.match(name + r"\b", opcode):
                runs[-1] += 1
                groups += "gsb0" in operands
            elif re.match(wait, opcode):
                runs.append(0)
        runs = [run for run in runs if run]
        if runs:
            return ("UTCMMA" if name.startswith("UTC") else name), min(runs), max(runs), groups
    return "", 0, 0, 0


def loads(code: str) -> dict[str, int]:
    matches = (LOAD.match(opcode) for opcode, _ in OPCODE.findall(code))
    return dict(Counter("TMA" if m[1] == "UTMALDG" else m[2] or "32" for m in matches if m))
