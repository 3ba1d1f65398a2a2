"""What the suite expects to find on this machine, and how tests are run over it.

A test that takes `backend` runs once for every expected backend; with `dtype` as well, once for every dtype that backend claims.
`map_backend` and `fused_backend` are the same over those with attention_map and over those that the memory promises hold for.
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
    fused: bool  # never holds a score tensor, reads masks in place


# Device -> backends that must run there: one that is missing, or that runs and is not listed, makes the suite red. Not one is skipped.
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
INTERPRETED = DEVICE == "cpu"  # how triton runs


def names(attention_map: bool = False, fused: bool = False) -> list[str]:
    return [name for name, b in BACKENDS.items() if (b.attention_map or not attention_map) and (b.fused or not fused)]


def interpreter_breaks(triton: str, numpy: str) -> str:
    """Why the interpreter of this Triton cannot work beside this numpy; "" when it can."""
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"the interpreter of Triton {triton} breaks with numpy {numpy}: pip install 'numpy<2.4'"
    return ""
