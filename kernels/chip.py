"""Which chip the kernels run on: NVIDIA's as its compute capability, 80, 90, ..., AMD's as its gfx number, 942, or INTERPRETER."""

from __future__ import annotations

from functools import cache

import torch
import triton

INTERPRETER = 0  # the arch of TRITON_INTERPRET=1
AMD = 900  # AMD's chips have numbers from here on, and NVIDIA's smaller ones
SMALL_SHARED = (86, 89, 120, 121)  # chips with 99 KB of shared memory per block (sm_80 has 163 KB)


def arch_of(device: torch.device) -> int:
    """The number of `device`; INTERPRETER under TRITON_INTERPRET=1."""
    return INTERPRETER if triton.knobs.runtime.interpret else _number(device)


@cache
def _number(device: torch.device) -> int:
    if torch.version.hip:  # whose "compute capability" is none: 9.4 would be read as an NVIDIA chip's
        return amd_number(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def amd_number(name: str) -> int:
    """942 for "gfx942:sramecc+:xnack-", and 910 for "gfx90a", whose last digit is hexadecimal."""
    digits = name.partition(":")[0].removeprefix("gfx")
    return 100 * int(digits[:-2]) + 10 * int(digits[-2]) + int(digits[-1], 16)


def generation(arch: int) -> int:
    """The chip in whose place tiles.csv has lines for `arch`: 80, 86, 90 or 100, and 942 for all of AMD's."""
    if arch >= AMD:
        return 942
    return 86 if arch in SMALL_SHARED else 100 if arch >= 100 else 90 if arch >= 90 else 80
