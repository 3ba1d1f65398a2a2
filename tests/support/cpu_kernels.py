"""The sets of CPU kernels, one for each instruction set, how a test chooses among them, and shapes for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from smattn import cpu
from smattn.testing.cases import Results

KERNELS: list[str] = [] if cpu.reasons() else torch.ops.smattn_cpu.cpu_kernels().split()  # the fastest, which runs by default, first

# Sizes decide how a call is cut into items: few queries split the keys, many do not, and Nq > Nk turns backward inside out. With up to a
# quarter of a vector of queries, products are made in another way (few_queries.h).
SHAPES: dict[str, dict[str, Any]] = {
    "few queries": dict(B=1, H=4, Nq=13, Nk=3001, D=32),
    "one query": dict(B=1, H=4, Nq=1, Nk=3001, D=32),
    "three queries": dict(B=2, H=4, Nq=3, Nk=333, D=64, Dv=32, Hkv=2, with_lse=True, padded=0.1),
    "a last block of one query": dict(B=1, H=2, Nq=193, Nk=70, D=32, padded=0.1),
    "many queries": dict(B=2, H=2, Nq=150, Nk=200, D=40, Dv=24),
    "more queries than keys": dict(B=2, H=4, Nq=300, Nk=70, D=16, Hkv=2),
    "a mask for each head": dict(B=2, H=3, Nq=20, Nk=150, D=8, mask_shape=(1, 3, 20, 150)),
    "a mask for each head that batches share": dict(B=18, H=5, Nq=70, Nk=300, D=8, mask_shape=(1, 5, 70, 300), padded=0.002),
    "a mask of keys": dict(B=2, H=4, Nq=40, Nk=260, D=8, Hkv=2, mask_shape=(1, 1, 260)),
    "no mask": dict(B=1, H=2, Nq=65, Nk=129, D=33, mask=None),
    "every option": dict(B=3, H=4, Nq=17, Nk=300, D=16, Hkv=2, with_lse=True, dropout_p=0.3, padded=0.3),
    "a map": dict(B=2, H=4, Nq=21, Nk=300, D=32, Hkv=2, as_map=True, padded=0.2),
    "a map of few queries": dict(B=1, H=2, Nq=3, Nk=3001, D=32, as_map=True),
    "a map whose batches take turns": dict(B=30, H=3, Nq=3, Nk=2001, D=8, Hkv=1, as_map=True, padded=0.2),
    "a map whose heads take turns": dict(B=2, H=60, Nq=3, Nk=3001, D=4, Hkv=1, as_map=True, padded=0.2),
    "a map of many keys": dict(B=1, H=2, Nq=70, Nk=22000, D=8, mask_shape=(1, 2, 70, 22000), as_map=True),
}
ALL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def differing(a: Results, b: Results) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@contextmanager
def forced(name: str) -> Iterator[None]:
    torch.ops.smattn_cpu.select_cpu_kernels(name)
    try:
        yield
    finally:
        torch.ops.smattn_cpu.select_cpu_kernels(KERNELS[0])


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
