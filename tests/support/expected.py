"""The table of what the suite expects to find on this machine.

A test that takes `backend` runs once for every expected backend, and with `dtype` once for every dtype that the backend claims.
`map_backend` stands for the backends with attention_map, `fused_backend` for those that the promises about memory hold for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from smattn import cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*HALF_AND_SINGLE, torch.float64)


class Expected(NamedTuple):
    """What a backend claims."""

    dtypes: tuple[torch.dtype, ...]
    attention_map: bool
    fused: bool  # holds no score tensor and reads masks in place


# Device -> the backends that must run there. One that is missing, or that runs and is not listed, makes the suite red; none is skipped.
TABLE = {
    "cpu": {
        "cpu": Expected(ALL_DTYPES, attention_map=True, fused=True),
        "reference": Expected(ALL_DTYPES, attention_map=True, fused=False),
        "triton": Expected(HALF_AND_SINGLE, attention_map=True, fused=True),  # interpreted
    },
    "cuda": {
        "reference": Expected(ALL_DTYPES, attention_map=True, fused=False),
        "triton": Expected(HALF_AND_SINGLE, attention_map=True, fused=True),
    },
}
if cuda.LIBRARY.path.exists():  # built only where asked for; on the CPU the same kernels are tried by test_cuda_emulated.py
    TABLE["cuda"]["cuda"] = Expected(HALF_AND_SINGLE, attention_map=True, fused=True)
BACKENDS = TABLE[DEVICE]
INTERPRETED = DEVICE == "cpu"  # how Triton's kernels run
MANY = 131  # queries, enough for the other regime of the fused kernels


def names(attention_map: bool = False, fused: bool = False) -> list[str]:
    return [name for name, b in BACKENDS.items() if (b.attention_map or not attention_map) and (b.fused or not fused)]


def interpreter_breaks(triton: str, numpy: str) -> str:
    """The reason why the interpreter of this Triton cannot work with this numpy, or "" where it can."""
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"the interpreter of Triton {triton} breaks with numpy {numpy}: pip install 'numpy<2.4'"
    return ""
