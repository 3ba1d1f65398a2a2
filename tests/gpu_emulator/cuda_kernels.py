"""The CUDA C++ kernels to PTX by nvcc, and launches of what comes out."""

from __future__ import annotations

import hashlib
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from . import machine
from .compile import CACHE, States, bytes_of, written_whole
from .counters import Counts
from .memory import GlobalMemory
from .parser import Kernel, parse

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = {"4HalfE": "half", "8BFloat16E": "bfloat", "8Tf32MathE": "tf32", "9FloatMathE": "float", "KernelIfE": "float"}  # by mangled types


def name_of(kernel: str) -> str:
    """kernel: here and below, the mangled name of its type."""
    found = re.search(r"([A-Z][A-Za-z]+)Kernel", kernel)
    assert found is not None
    return found[1]


def source_of(kernel: str) -> str:
    """The file that instantiates it. What depends on the dtype alone is in those of all head sizes."""
    dtype = next((file for mangled, file in FILES.items() if mangled in kernel), None)
    size = re.search(r"Li(\d+)E", kernel)
    return "small_kernels" if dtype is None else f"instances/{dtype}_{size[1] if size else 32}"


@cache
def module(source: str, arch: int) -> dict[str, Kernel]:
    """What nvcc makes of the file, kept until one of csrc changes."""
    files = sorted(file for file in CSRC.rglob("*") if file.suffix in (".h", ".cu"))
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:32]
    path = CACHE / f"{source.replace('/', '-')}-{arch}-{key}.ptx"
    if not path.exists():
        options = ("-ptx", f"-arch=sm_{arch}", "-std=c++17", "--expt-relaxed-constexpr")
        with written_whole(path) as unfinished:
            subprocess.run(["nvcc", *options, "-o", str(unfinished), str(CSRC / "cuda" / f"{source}.cu")], check=True)
    return parse(path.read_text())


@cache
def compiled(kernel: str, arch: int) -> machine.Compiled:
    """From its own name on, the type is spelled alike in the name of its entry."""
    own = kernel[kernel.index(f"{name_of(kernel)}Kernel") :]
    (found,) = (each for name, each in module(source_of(kernel), arch).items() if own in name)
    return machine.Compiled.of(found)


def launch(
    code: machine.Compiled, blocks: int, shared_bytes: int, arguments: bytes, tensors: list[Tensor], states: States, counts: Counts
) -> None:
    """arguments: the kernel's one parameter, a struct as the host's compiler lays it out. Its pointers into the tensors' storages become
    pointers into simulated memory. What another one points to is outside of that."""
    (parameter,) = code.kernel.parameters
    assert len(arguments) == parameter.size, "the two compilers lay out the arguments differently"
    memory = GlobalMemory()
    words = np.frombuffer(arguments, np.uint64)
    inside = words.copy()
    for start, tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.items():
        data = bytes_of(tensor)
        pointers = (words >= start) & (words < start + data.size)
        if pointers.any():
            inside[pointers] = words[pointers] - np.uint64(start) + np.uint64(memory.add(data, start, states.get(start)))
    launched = machine.Launch(code, (blocks, 1, 1), code.kernel.threads, shared_bytes, inside.tobytes(), {}, memory, counts)
    machine.run(launched)
