"""Which chip the kernels run on, as its compute capability: 80, 90, ..., or INTERPRETER."""

from __future__ import annotations

from functools import cache

import torch
import triton

INTERPRETER = 0  # the arch of TRITON_INTERPRET=1
SMALL_SHARED = (86, 89, 120, 121)  # chips with 99 KB of shared memory per block (sm_80 has 163 KB)


def arch_of(device: torch.device) -> int:
    """The compute capability of `device` as 80, 90, ...; INTERPRETER under TRITON_INTERPRET=1."""
    return INTERPRETER if triton.knobs.runtime.interpret else _capability(device)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def generation(arch: int) -> int:
    """The chip in whose place tiles.csv has lines for `arch`: 80, 86, 90 or 100."""
    return 86 if arch in SMALL_SHARED else 100 if arch >= 100 else 90 if arch >= 90 else 80
