"""What is compiled ahead of time: calls of attention and of its map on every chip, and the launches that backend.py makes for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import Call, Needs, Problem, Saved
from .. import backend, launch
from ..tiles import Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
ODD = 1045  # keys: rows of M of which every other one begins off any wide word
HEAD_SIZES = (32, 48, 64, 128, WIDEST)
FEW, MANY = (13, 30, 60, 100), 1045  # Numbers of queries: one in each tile size of tiles.py, none a multiple of a block.
NARROW = (86, 89, 120)  # chips of little shared memory, of which the sample has a few calls
SAMPLE, PRODUCT, FULL = "sample", "product", "full"


class Variant(NamedTuple):
    """What of the call is on, beside sizes and dtype."""

    name: str
    mask: tuple[int, int, int] | None = (2, 1, 2)  # M's batch, head and query axes: 1 broadcasts
    mask_dtype: torch.dtype = torch.float32
    padding: bool = False
    dropout: bool = False
    group: int = 1
    dlse: bool = False
    tf32: bool = False
    keep_out: bool = True  # with its remainder, for delta
    logits: bool = False  # in place of M
    misaligned: bool = False  # rows of query, key and value an odd number of elements apart: no descriptors
    as_map: bool = False  # attention_map's call, whose gradients are those of query, key, mask, alpha and head weights
    training: bool = True  # else forward alone, nothing of it kept
    needs: Needs = Needs(True, True, True, True, True, True)


PLAIN = Variant("mask")
FEATURES = Variant("padding dropout gqa lse", padding=True, dropout=True, group=2, dlse=True)
TF32 = Variant("tf32", tf32=True)
MAP, MAP_TF32 = Variant("map", as_map=True), Variant("map tf32", tf32=True, as_map=True)
PADDING, MISALIGNED = Variant("padding", padding=True), Variant("misaligned", misaligned=True)
HALF_MASKS = tuple(PLAIN._replace(name=f"{dtype} mask"[6:], mask_dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
DROPOUT = Variant("dropout", mask_dtype=torch.bfloat16, dropout=True)
SMALL_CALL = HALF_MASKS[1]._replace(name="bfloat16 mask, small call")
MISALIGNED_FEATURES = FEATURES._replace(name=f"misaligned {FEATURES.name}", misaligned=True)
OTHERS = (
    MAP._replace(name="map padding gqa", padding=True, group=2),
    MAP._replace(name="map, mask per head", mask=(2, 2, 2)),
    MAP._replace(name="map, no mask", mask=None),
    Variant("no mask", mask=None),
    Variant("logits", logits=True),
    Variant("key-only logits", mask=(2, 1, 1), logits=True, padding=True),
    Variant("mask shared by the batch", mask=(1, 1, 2), padding=True),
    Variant("mask per head", mask=(2, 2, 2), dropout=True),
    Variant("mask per head, shared by the batch", mask=(1, 2, 2), group=2),
    Variant("key-only mask", mask=(2, 1, 1), padding=True, dlse=True),
    Variant("key-only mask a head for the batch", mask=(1, 2, 1), group=2),
    Variant("no remainder", keep_out=False, dropout=True, padding=True, dlse=True),
    Variant("mask and alpha only", needs=Needs(False, False, False, mask=True, alpha=True)),
    Variant("alpha only", needs=Needs(False, False, False, False, alpha=True)),
    Variant("query only", needs=Needs(True, False, False, False, False)),
)


class Job(NamedTuple):
    arch: int
    dtype: torch.dtype
    D: int
    Nq: int
    variant: Variant
    B: int = 8  # with 2 its many queries would be few enough for the tiles of small calls
    H: int = 4
    Nk: int = 4096


def jobs(archs: list[int], extent: str = PRODUCT) -> Iterator[Job]:
    """Attention and its map on every chip, in every dtype, head size and number of queries. FULL: times every variant."""
    if extent == SAMPLE:
        yield from _sample(archs)
        return
    counted = list(_counted(archs))
    yield from counted
    variants = (PLAIN, *HALF_MASKS, TF32, MAP, MAP_TF32)
    if extent == FULL:
        variants = (*variants, FEATURES, PADDING, MISALIGNED, MISALIGNED_FEATURES, *OTHERS)
    for arch, dtype, D, Nq, variant in product(archs, DTYPES, HEAD_SIZES, (*FEW, MANY), variants):
        job = Job(arch, dtype, D, Nq, variant)
        if (dtype == torch.float32 or not variant.tf32) and variant.mask_dtype in (torch.float32, dtype) and job not in counted:
            yield job


def _counted(archs: list[int]) -> Iterator[Job]:
    """What the product lacks and whose inner loops are to be counted: odd numbers of keys, padding, dropout, and small calls."""
    for arch, D in product(archs, (64, 128)):
        yield from (Job(arch, torch.bfloat16, D, MANY, variant, Nk=ODD) for variant in (PLAIN, HALF_MASKS[1]))
        yield from (Job(arch, torch.bfloat16, D, MANY, variant) for variant in (PADDING, DROPOUT))
        yield Job(arch, torch.bfloat16, D, MANY, SMALL_CALL, B=2)


def _sample(archs: list[int]) -> Iterator[Job]:
    """Every kernel, chip and regime in every dtype, then each variant once, on one chip."""
    few, most = FEW[0], FEW[-1]
    yield from _counted([arch for arch in archs if arch not in NARROW])
    for arch in archs:
        if arch in NARROW:
            yield from _narrow(arch)
            continue
        for D, Nq in (*product((32, 64, 128, WIDEST), (few, MANY)), *product((32, 64, 128), (most,)), (48, MANY), (64, 30), (64, 60)):
            yield Job(arch, torch.float16, D, Nq, PLAIN)
        for D, Nq in (*product((64,), (few, most, MANY)), (32, few), (32, most), (128, few), (128, MANY), (WIDEST, MANY)):
            yield Job(arch, torch.float32, D, Nq, PLAIN)
        yield Job(arch, torch.bfloat16, 64, few, PLAIN)  # it has float16's tiles
        for Nq in (few, MANY):
            yield Job(arch, torch.float32, 64, Nq, TF32)
            yield Job(arch, torch.float16, 64, Nq, MAP)
        for D in (32, 64, 128):
            yield Job(arch, torch.bfloat16, D, MANY, HALF_MASKS[1])
        yield Job(arch, torch.float32, 64, MANY, MAP)
        for D in (32, 64, 128, WIDEST) if arch >= 90 else ():  # where the calls above have descriptors
            yield Job(arch, torch.float16, D, MANY, MISALIGNED)
        for D in (32, WIDEST) if arch >= 90 else ():  # beside those that are counted
            yield Job(arch, torch.float16, D, MANY, PADDING)
    chip = 90 if 90 in archs else archs[-1]
    yield from (Job(chip, torch.float16, 64, Nq, FEATURES) for Nq in (few, MANY))
    yield from (Job(chip, torch.bfloat16, 32, Nq, variant) for Nq, variant in product((few, MANY), OTHERS))


def one_of(every: int, calls: Iterable[Job]) -> list[Job]:
    """One of so many of each chip's calls. Each chip begins one call later, so that of what they have in common each has other calls."""
    by_chip: dict[int, list[Job]] = {}
    for job in calls:
        by_chip.setdefault(job.arch, []).append(job)
    return [job for first, of_chip in enumerate(by_chip.values()) for job in of_chip[first % every :: every]]


def _narrow(arch: int) -> Iterator[Job]:
    """Where tiles of the chips above may want too much shared memory: each regime once in its widest tiles."""
    for dtype, D in product((torch.bfloat16, torch.float32), (64, 128, WIDEST)):
        yield Job(arch, dtype, D, MANY, PLAIN)
    for Nq in (FEW[0], FEW[-1]):
        yield Job(arch, torch.bfloat16, 64, Nq, PLAIN)


def name_of(kernel: Any) -> str:
    """A kernel as tables and tiles.csv know it."""
    return str(kernel.__name__).strip("_").removesuffix("_kernel")


def record(job: Job) -> list[tuple[Any, dict[str, Any], Tile]]:
    """The launches of one forward and backward, of attention or of its map."""
    v, B, H, Nk = job.variant, job.B, job.H, job.Nk

    def tensor(*sizes: int, dtype: torch.dtype = job.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    mask = None
    if v.mask is not None:
        axes = [n if axis > 1 else 1 for axis, n in zip(v.mask, (B, H, job.Nq), strict=True)]
        mask = tensor(axes[0], 1, *axes[1:], Nk, dtype=v.mask_dtype)
    problem = Problem(
        B=B, H=H, Hkv=H // v.group, Nq=job.Nq, Nk=Nk, D=job.D, Dv=0 if v.as_map else job.D, dtype=job.dtype,
        mask_dtype=None if mask is None else mask.dtype, mask_shape=None if mask is None else tuple(mask.shape),  # type: ignore[arg-type]
        device_type="cuda", has_padding=v.padding, scale=0.125, dropout_p=0.1 if v.dropout else 0.0, allow_tf32=v.tf32,
        mask_is_logits=v.logits,
    )  # fmt: skip
    query, key = (tensor(B, heads, n, job.D + v.misaligned)[..., : job.D] for heads, n in ((H, job.Nq), (H // v.group, Nk)))
    call = Call(
        problem, query, key,
        value=None if v.as_map else key,
        mask=mask,
        alpha=None if mask is None else tensor(H, dtype=torch.float32),
        key_padding_mask=tensor(B, Nk, dtype=torch.bool) if v.padding else None,
        seed=tensor(1, dtype=torch.int64) if v.dropout else None,
        head_weights=tensor(H, dtype=torch.float32) if v.as_map else None,
    )  # fmt: skip
    recorder = launch.Recorder(job.arch)
    launch.record(recorder)
    try:
        if v.as_map:
            amap, saved = backend.attention_map(call)
            backend.attention_map_backward(call, _as_read(saved), amap, v.needs)
        else:
            _, saved = backend.forward(call, save_out=v.keep_out and v.training, save_mbar=v.training)
            if not v.training:
                return recorder.launches
            dlse = tensor(B, H, job.Nq, dtype=torch.float32) if v.dlse else None
            backend.backward(call, _as_read(saved), query, dlse, v.needs)
    finally:
        launch.record(None)
    return recorder.launches


def _as_read(saved: Saved) -> Saved:
    """What of forward's rows autograd hands on: see Saved.lse."""
    return saved if saved.normalizer is None else saved._replace(lse=None)
