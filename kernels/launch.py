"""Where every kernel is started, and the arguments that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from . import chip, tiles
from .primitives.load import LOGITS, ROUNDED_LOGITS, SOFT
from .tiles import FEW_QUERIES, Tile, block_of

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
Layouts = tuple["Layout | None", ...]  # of query, key, mask, alpha, padding and, but for a map, value


@dataclass
class Recorder:
    """Collects launches instead of running them, for ahead-of-time compilation: (kernel, arguments, tile)."""

    arch: int
    launches: list[tuple[Any, dict[str, Any], Tile]] = field(default_factory=list)


_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """From now on hand every launch to `recorder`; None: run them again."""
    global _recorder
    _recorder = recorder


def launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
    """Start `programs` programs of a kernel on the current stream."""
    if _recorder is not None:
        _recorder.launches.append((kernel, arguments, tile))
    else:
        kernel[(programs,)](**arguments, **tile.options())


def arch_of(device: torch.device) -> int:
    return chip.arch_of(device) if _recorder is None else _recorder.arch


class Rows(NamedTuple):
    """Of each query row lse in base 2 and delta: what every pass of backward reads."""

    values: Tensor | None  # (B, H, Nq, 2) float32
    out: Tensor | None = None  # the unrounded output (B, H, Nq, Dv), from which the first pass is to work out the values
    lse: Tensor | None = None  # (B, H, Nq) float32
    dlse: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return strides("dl", "bhm", self.dlse) | dict(
            out_ptr=self.out, lse_ptr=self.lse, dl_ptr=self.dlse, FIRST_PASS=self.out is not None, HAS_DLSE=self.dlse is not None
        )


@dataclass(frozen=True)
class Inputs:
    """The canonical tensors of one call."""

    problem: Problem
    query: Tensor  # (B, H, Nq, D)
    key: Tensor  # (B, Hkv, Nk, D)
    value: Tensor  # (B, Hkv, Nk, Dv)
    mask: Tensor | None  # (B|1, H|1, Nq|1, Nk), any strides, any floating dtype
    alpha: Tensor | None  # (H,) float32
    key_padding_mask: Tensor | None  # (B, Nk) bool
    seed: Tensor | None = None  # (1,) int64
    head_weights: Tensor | None = None  # (H,) float32, contiguous, of an attention map: its value has no columns

    @property
    def empty(self) -> bool:
        """Whether there are no scores at all."""
        return 0 in (self.problem.B, self.problem.Nq, self.problem.Nk)

    def tile(self, kernel: str, pointers: bool = False) -> Tile:
        return tiles.tile(kernel, self.problem, arch_of(self.query.device), pointers)

    def accumulator(self, *sizes: int) -> Tensor:
        """Uninitialised float32 buffer."""
        return torch.empty(sizes, dtype=torch.float32, device=self.query.device)

    def score_arguments(self, tile: Tile) -> dict[str, Any]:
        """What every kernel takes: pointers, strides (0 along broadcast axes), sizes, scalars, flags and blocks of the scores."""
        pointers = self._pointers()
        return _numbers_of_scores(self.problem, tile, tuple(map(_layout, pointers.values()))) | pointers

    def arguments(self, tile: Tile) -> dict[str, Any]:
        """Those, and value and dropout: what every attention kernel takes."""
        pointers = self._pointers() | dict(v_ptr=self.value)
        arguments = _numbers_of_attention(self.problem, tile, tuple(map(_layout, pointers.values()))) | pointers
        arguments["seed_ptr"] = self.seed
        return arguments

    def _pointers(self) -> dict[str, Tensor | None]:
        pad = None if self.key_padding_mask is None else self.key_padding_mask.view(torch.uint8)
        return dict(q_ptr=self.query, k_ptr=self.key, mask_ptr=self.mask, alpha_ptr=self.alpha, pad_ptr=pad)

    def gradient_arguments(self, tile: Tile, dout: Tensor, rows: Rows) -> dict[str, Any]:
        """Those, and the gradient that comes in: what every pass of backward takes. dout: for an attention map (B, 1, Nq, Nk)."""
        arguments = self.arguments(tile)
        arguments |= strides("do", "bhmd", dout)
        arguments.update(do_ptr=dout, weights_ptr=self.head_weights, rows_ptr=rows.values)
        return arguments


def strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Arguments stride_{name}{axis}, 0 along axes of one element, so that these broadcast."""
    return _strides(name, axes, _layout(tensor))


def _layout(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else (tensor.shape, tensor.stride())


@lru_cache
def _strides(name: str, axes: str, layout: Layout | None) -> dict[str, int]:
    shape, steps = layout or ((1,) * len(axes),) * 2
    return {f"stride_{name}{axis}": 0 if n == 1 else step for axis, n, step in zip(axes, shape, steps, strict=True)}


@lru_cache
def mask_kind(t: Problem) -> int:
    """MASK_KIND of the kernels. Where queries are few each pass takes the sigmoid of logits; else see soft_mask.py."""
    if t.mask_shape is None:
        return 0
    kind = SOFT if not t.mask_is_logits else LOGITS if t.Nq <= FEW_QUERIES else ROUNDED_LOGITS
    return int(kind.value)


@lru_cache
def _numbers_of_scores(t: Problem, tile: Tile, layouts: Layouts) -> dict[str, Any]:
    """All that is no pointer, worked out once for the calls that agree in it: as much Python as the rest of a call."""
    query, key, mask, alpha, pad, *_ = layouts
    return dict(
        **_strides("q", "bhmd", query), **_strides("k", "bhnd", key),
        **_strides("m", "bhmn", mask), **_strides("a", "h", alpha), **_strides("p", "bn", pad),
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
