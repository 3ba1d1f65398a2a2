"""What kernels are called with: pointers, strides, sizes, scalars and flags, made from a call and a tile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Problem, normalizer_shape
from . import tiles
from .chip import generation
from .launch import arch_of
from .primitives.load import LOGITS, ROUNDED_LOGITS, SOFT
from .tiles import FEW_QUERIES, Tile, block_of

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
Layouts = tuple["Layout | None", ...]  # of query, key, mask, alpha, padding and, except for a map, value


class Rows(NamedTuple):
    """What every pass of backward reads of each query, and what it is made of."""

    values: Tensor | None  # room_for_rows
    normalizer: Tensor | None  # (B, H, Nq, 2) float32, of float32 calls: forward's
    out: Tensor | None = None  # (B, H, Nq, Dv), given where the first pass is to compute the values from it
    remainder: Tensor | None = None  # of out, where it is rounded
    lse: Tensor | None = None  # (B, H, Nq) float32, given where there is no normalizer
    dlse: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return strides("dl", "bhm", self.dlse) | dict(
            out_ptr=self.out, remainder_ptr=self.remainder, lse_ptr=self.lse, dl_ptr=self.dlse,
            FIRST_PASS=self.out is not None, HAS_DLSE=self.dlse is not None,
        )


def tile_of(call: Call, kernel: str, pointers: bool = False) -> Tile:
    return tiles.tile(kernel, call.problem, arch_of(call.query.device), pointers)


def pins_mask(call: Call) -> bool:
    """Whether a kernel may use as_product on M: of products in 16 bits. With sums in tensor memory, sm_100's, Triton 3.9 fails at it."""
    return call.mask is not None and call.query.element_size() == 2 and generation(arch_of(call.query.device)) not in (100, 942)


def is_ragged(call: Call) -> bool:
    """Whether rows of M begin off wide words, so that it is loaded an element at a time."""
    return call.mask is not None and call.mask.stride(-2) % tiles.WORD != 0


def accumulator(call: Call, *sizes: int) -> Tensor:
    """Uninitialised float32 buffer on the call's device."""
    return torch.empty(sizes, dtype=torch.float32, device=call.query.device)


def room_for_rows(call: Call) -> Tensor:
    """Room for delta of each query, and where forward left no normalizer for lse in base 2 before it: (B, H, Nq, 1 or 2)."""
    t = call.problem
    return accumulator(call, t.B, t.H, t.Nq, 2 if normalizer_shape(t) is None else 1)


def score_arguments(call: Call, tile: Tile) -> dict[str, Any]:
    """What every kernel takes: pointers, strides (0 along broadcast axes), sizes, scalars, flags and blocks of the scores."""
    pointers = _score_pointers(call)
    return _numbers_of_scores(call.problem, tile, tuple(map(_layout, pointers.values()))) | pointers


def attention_arguments(call: Call, tile: Tile) -> dict[str, Any]:
    """What every attention kernel takes: the arguments of the scores, and those of value and dropout."""
    pointers = _score_pointers(call)
    pointers["v_ptr"] = call.value
    arguments = _numbers_of_attention(call.problem, tile, tuple(map(_layout, pointers.values()))) | pointers
    arguments["seed_ptr"] = call.seed
    return arguments


def gradient_arguments(call: Call, tile: Tile, dout: Tensor, rows: Rows) -> dict[str, Any]:
    """What every pass of backward takes: those of attention, and the incoming gradient; for an attention map dout is (B, 1, Nq, Nk)."""
    arguments = attention_arguments(call, tile)
    arguments |= strides("do", "bhmd", dout)
    arguments.update(do_ptr=dout, weights_ptr=call.head_weights, rows_ptr=rows.values, normalizer_ptr=rows.normalizer)
    return arguments


def _score_pointers(call: Call) -> dict[str, Tensor | None]:
    pad = None if call.key_padding_mask is None else call.key_padding_mask.view(torch.uint8)
    return dict(q_ptr=call.query, k_ptr=call.key, mask_ptr=call.mask, alpha_ptr=call.alpha, pad_ptr=pad)


def strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Arguments stride_{name}{axis}. They are 0 along axes of one element, so that these broadcast."""
    return _strides(name, axes, _layout(tensor))


def _layout(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else (tensor.shape, tensor.stride())


@lru_cache
def _strides(name: str, axes: str, layout: Layout | None) -> dict[str, int]:
    shape, steps = layout or ((1,) * len(axes),) * 2
    return {f"stride_{name}{axis}": 0 if n == 1 else step for axis, n, step in zip(axes, shape, steps, strict=True)}


def sharing_arguments(t: Problem) -> dict[str, int]:
    """Which batch elements share a mask: those of mask number n are n * own_step + i * share_step, for i below sharers."""
    masks, sharers, own_step, share_step = t.sharing
    return dict(sharers=sharers, own_step=own_step, share_step=share_step)


@lru_cache
def mask_kind(t: Problem) -> int:
    """MASK_KIND of the kernels. Where queries are few, each pass takes the sigmoid of logits; else M is written once, see soft_mask.py."""
    if t.mask_shape is None:
        return 0
    kind = SOFT if not t.mask_is_logits else LOGITS if t.Nq <= FEW_QUERIES else ROUNDED_LOGITS
    return int(kind.value)


@lru_cache
def _numbers_of_scores(t: Problem, tile: Tile, layouts: Layouts) -> dict[str, Any]:
    """Every argument of the scores that is not a pointer, cached: computing them costs as much Python as the rest of the launch."""
    query, key, mask, alpha, pad, *_ = layouts
    return dict(
        **_strides("q", "bhmd", query), **_strides("k", "bhnd", key),
        **_strides("m", "bihmn", mask), inner_batch=t.inner_batch, **_strides("a", "h", alpha), **_strides("p", "bn", pad),
        H=t.H, Nq=t.Nq, Nk=t.Nk, scale=t.scale, GROUP=t.H // t.Hkv, D=t.D,
        MASK_KIND=mask_kind(t), HAS_PADDING=t.has_padding, ALLOW_TF32=t.allow_tf32,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_of(t.D),
    )  # fmt: skip


@lru_cache
def _numbers_of_attention(t: Problem, tile: Tile, layouts: Layouts) -> dict[str, Any]:
    threshold = int(t.dropout_p * 2**32)
    return _numbers_of_scores(t, tile, layouts) | _strides("v", "bhnd", layouts[-1]) | dict(
        HAS_DROPOUT=t.dropout_p > 0, drop_threshold=threshold - 2**32 if threshold >= 2**31 else threshold,  # a uint32's bits in an int32
        keep_scale=1.0 / (1.0 - t.dropout_p), DV=t.Dv, BLOCK_DV=block_of(t.Dv),
    )  # fmt: skip
