"""Problems for the emulated chips: an endless list of calls, drawn by a seed, in runs of calls that need no new compilation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from smattn import reference
from smattn.call import Call, Needs
from smattn.testing import Case, assert_within_budget, make_case, run, run_exact

from .backend import CHIPS, Module

TOGETHER = 10  # problems of one specialisation, one behind the other
LAYOUTS = ("aligned", "misaligned", "heads behind the sequence", "packed")


class Specialisation(NamedTuple):
    """What compiled code depends on, besides divisibility of sizes, which `problems` keeps."""

    arch: int
    dtype: torch.dtype
    tf32: bool
    B: int
    H: int
    Hkv: int
    queries: int  # the most; the fewest are more than half of it
    keys: int  # the fewest; more by multiples of 16
    D: int
    Dv: int
    mask: str | None
    mask_axes: tuple[bool, bool, bool]  # whether it has the axes of batch, heads and queries
    mask_dtype: torch.dtype
    layout: str
    as_map: bool
    padded: float
    dropout_p: float
    with_lse: bool
    needs: tuple[str, ...] | None  # None: every gradient


def draw(random: random.Random) -> Specialisation:
    """Each choice by itself, those that cost most the rarest."""
    dtype = random.choice([torch.float16, torch.bfloat16, torch.float32])
    tf32 = dtype == torch.float32 and random.random() < 0.3
    H, group = random.choice([(2, 1), (2, 2), (4, 2), (1, 1), (3, 1)])
    D = random.choice([5, 16, 32, 33, 64, 64, 128] if dtype == torch.float32 else [1, 16, 24, 32, 33, 48, 64, 64, 64, 72, 128, 200, 256])
    as_map = not tf32 and random.random() < 0.2
    names = ["query", "key", "mask", "alpha", "head_weights"] if as_map else ["query", "key", "value", "mask", "alpha"]
    mask = random.choice(["uniform", "uniform", "bias", "logits", "blob", None])
    has = {name: random.random() < 0.4 for name in names}
    some = tuple(name for name, wanted in has.items() if wanted and (mask or name not in ("mask", "alpha")))
    axes = (True, False, True) if mask == "blob" else (random.random() < 0.7, random.random() < 0.3, random.random() < 0.7)
    return Specialisation(
        arch=random.choice(CHIPS), dtype=dtype, tf32=tf32, B=random.choice([1, 2, 3]), H=H, Hkv=H // group,
        queries=random.choice([1, 15, 31, 63, 127, 191, 257]), keys=random.choice([1, 16, 33, 64, 70, 128, 131, 257]),
        D=D, Dv=random.choice([D, D, D, 24, 32, 65]), mask=mask, mask_axes=axes,
        mask_dtype=random.choice([torch.float32, dtype, torch.bfloat16]), layout=random.choice(LAYOUTS), as_map=as_map,
        padded=random.choice([0.0, 0.0, 0.3, 0.9]), dropout_p=0.0 if as_map else random.choice([0.0, 0.0, 0.2]),
        with_lse=random.random() < 0.5, needs=None if random.random() < 0.6 or not some else some,
    )  # fmt: skip


def problems(seed: int) -> Iterator[tuple[Specialisation, Case]]:
    chance = random.Random(seed)
    while True:
        drawn = draw(chance)
        for number in range(TOGETHER):
            yield drawn, case_of(drawn, chance, number)


def case_of(drawn: Specialisation, chance: random.Random, number: int) -> Case:
    """Odd numbers of queries, and keys that are alike modulo 16, so that no stride becomes divisible by 16 or ceases to be."""
    Nq = drawn.queries - 2 * chance.randrange(drawn.queries // 4 + 1)
    Nk = drawn.keys + 16 * chance.randrange(3) if drawn.keys > 1 else 1
    batch, heads, queries = drawn.mask_axes
    shape = (drawn.B if batch else 1, *([drawn.H] if heads else []), Nq if queries else 1, Nk)
    case = make_case(
        drawn.B, drawn.H, Nq, Nk, drawn.D, Dv=drawn.Dv, Hkv=drawn.Hkv, dtype=drawn.dtype, mask=drawn.mask,
        mask_shape=None if drawn.mask == "blob" else shape, mask_dtype=drawn.mask_dtype, as_map=drawn.as_map, padded=drawn.padded,
        dropout_p=drawn.dropout_p, with_lse=drawn.with_lse, rng=chance.randrange(2**20),
    )  # fmt: skip
    tensors = {name: getattr(case, name) for name in ("query", "key", "value", "dout")}
    if drawn.tf32:
        tensors = {name: rounded(tensor) for name, tensor in tensors.items()}
    return replace(case, **{name: laid_out(tensor, drawn.layout) for name, tensor in tensors.items()})


def rounded(tensor: Tensor) -> Tensor:
    """Numbers that TF32 has, so that only what is computed of them is rounded in products."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of (B, H, N, D) where rows, or heads, are otherwise apart. "packed": as a part of queries, keys and values in one."""
    if tensor.dim() != 4 or layout == "aligned":
        return tensor
    B, H, N, D = tensor.shape
    if layout == "misaligned":
        place = torch.zeros(B, H, N, D + 1, dtype=tensor.dtype)[..., 1:]
    elif layout == "packed":
        place = torch.zeros(B, N, 3, H, D, dtype=tensor.dtype)[:, :, 1].transpose(1, 2)
    else:
        place = torch.zeros(B, N, H, D, dtype=tensor.dtype).transpose(1, 2)
    return place.copy_(tensor)


def check(drawn: Specialisation, case: Case, name: str, emulated: Module) -> None:
    """`emulated` is the backend of that name. The call's results are inside the budget, or with TF32 near those of exact products."""
    if drawn.tf32:
        check_tf32(case, emulated)
    else:
        results = run(case, name, drawn.needs)
        assert_within_budget(results, case)


def check_tf32(case: Case, emulated: Module) -> None:
    call: Call = case.call()
    call = call._replace(problem=call.problem._replace(allow_tf32=True))
    needs = Needs(True, True, True, call.mask is not None, call.alpha is not None)
    out, saved = emulated.forward(call, save_out=True, save_mbar=call.mask is not None)
    exact_out, exact_saved = reference.forward(call, save_out=True, save_mbar=call.mask is not None)
    grads = emulated.backward(call, saved, case.dout, case.dlse, needs)
    exact = reference.backward(call, exact_saved, case.dout, case.dlse, needs)
    pairs = {"out": (out, exact_out), **dict(zip((f"d{name}" for name in Needs._fields), zip(grads, exact, strict=True), strict=True))}
    in_float64 = run_exact(case)
    rounding = 2.0**-22 * (1 + in_float64.largest_score)  # of float32, as in the error budget: with one key some gradients are exactly 0
    magnitudes = {name.removesuffix("_logits"): rounding * magnitude.norm() for name, magnitude in in_float64.magnitudes.items()}
    for name, (got, expected) in pairs.items():
        if expected is not None and expected.numel():
            error, largest = (got.double() - expected).norm(), expected.double().norm()
            allowed = 2e-3 * largest + magnitudes.get(name, 0.0)  # dalpha has none where alpha is no tensor
            assert error <= allowed, f"{name}: {error:.2e} of {largest:.2e}"


def some(seed: int, count: int, every: int = TOGETHER) -> list[tuple[Specialisation, Case]]:
    """`count` problems of as many specialisations as TOGETHER / every allows."""
    return list(itertools.islice(itertools.islice(problems(seed), 0, None, every), count))
