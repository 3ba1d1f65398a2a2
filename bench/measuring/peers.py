"""What one would use instead of smattn. Each peer is one function of (query, key, value, mask, alpha), with what makes it ready to call.

query (B, H, Nq, D), key and value (B, H, Nk, D), mask (B|1, H|1, Nq|1, Nk), not expanded, alpha (H,); or a second batch axis, along which
the mask has size 1, and B = 1. If you can tune a peer, we are glad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import smattn
from bench.reporting.rows import OURS, UNMASKED
from smattn import cpu

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    scores = (query @ key.mT) * query.shape[-1] ** -0.5 + alpha[:, None, None].to(mask.dtype) * mask
    return torch.softmax(scores, -1).to(value.dtype) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    bias = (alpha[:, None, None].to(mask.dtype) * mask).to(query.dtype)
    if 1 < bias.shape[:-3].numel() < query.shape[:-3].numel():
        bias = bias.expand(*query.shape[:-3], -1, -1, -1)  # It takes a bias for each batch element or for all of them, nothing between.
    out = F.scaled_dot_product_attention(*map(_one_batch_axis, (query, key, value)), attn_mask=_one_batch_axis(bias))
    return out.view(query.shape)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    mask = _one_batch_axis(mask)
    has_heads, sharers = mask.shape[1] > 1, query.shape[:-3].numel() // mask.shape[0]

    def soft_mask(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + alpha[h] * mask[b if sharers == 1 else b // sharers, h if has_heads else 0, i, j]

    out = flex_attention(*map(_one_batch_axis, (query, key, value)), score_mod=soft_mask)
    assert isinstance(out, Tensor)
    return out.view(query.shape)


def flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*map(_one_batch_axis, (query, key, value))).view(query.shape)


def _one_batch_axis(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -4)


def _with_one_batch_axis(function: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    return function(*map(_one_batch_axis, (query, key, value, mask)), alpha).view(query.shape)


@dataclass(frozen=True)
class Contestant:
    """A function to measure, compiled or not. It is picklable, so that a fresh process can measure its memory."""

    name: str
    function: Callable[..., Tensor]
    compiled: bool = False
    forward_only_on: tuple[str, ...] = ()  # device types on which it has no backward
    holds_scores: bool = True  # whether it holds tensors of B*H*Nq*Nk elements
    gradients: int = 5  # It gives those of the first so many inputs.
    one_batch_axis: bool = False  # It is compiled for one: torch's CPU template of FlexAttention fails on a view made inside.
    kernels: str = ""  # the instruction set of the CPU kernels to force on the process, "avx2" say

    def ready(self) -> Attend:
        """The function to call. Call torch.compiler.reset() between shapes, or torch.compile generalises and then gives up."""
        if self.kernels:
            select_cpu_kernels(self.kernels)
        function = torch.compile(self.function, dynamic=False) if self.compiled else self.function
        return partial(_with_one_batch_axis, function) if self.one_batch_axis else function


PEERS = (
    Contestant("eager", eager),
    Contestant("compiled", eager, compiled=True),
    Contestant("sdpa", sdpa),
    Contestant("flex", flex, compiled=True, forward_only_on=("cpu",), holds_scores=False, one_batch_axis=True),
)
WITHOUT_MASK = Contestant(UNMASKED, flash, holds_scores=False, gradients=3)


@dataclass(frozen=True)
class _Backend:
    name: str

    def __call__(self, *args: Any) -> Tensor:
        return smattn.soft_masked_attention(*args, backend=self.name)


def ours(name: str, kernels: str = "") -> Contestant:
    """A backend of smattn as a contestant: "smattn/cpu", say, or "smattn/cpu (avx2)" where an instruction set is forced."""
    label = f"{OURS}{name} ({kernels})" if kernels else f"{OURS}{name}"
    return Contestant(label, _Backend(name), holds_scores=name == "reference", kernels=kernels)


def cpu_kernels() -> list[str]:
    """The instruction sets of CPU kernels that this processor can run, first the one that it runs unasked; none without the extension."""
    return [] if cpu.reasons() else torch.ops.smattn_cpu.cpu_kernels().split()


def which_cpu_kernels(forced: str = "") -> str:
    """The instruction set of the CPU kernels that run, and why, "avx2: it was asked for" say; "" without the extension."""
    if forced:
        return f"{forced}: it was asked for"
    return str(torch.ops.smattn_cpu.cpu_kernels_reason()) if cpu_kernels() else ""


def select_cpu_kernels(name: str) -> None:
    """Make this process run the CPU kernels of that instruction set."""
    cpu.reasons()  # It loads the ops.
    torch.ops.smattn_cpu.select_cpu_kernels(name)
