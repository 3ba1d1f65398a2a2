"""Cases: seeded inputs of one public call, and the results of running it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_map, soft_masked_attention
from ..call import Call, Problem, acc_dtype, make_call
from ..canonical import alpha_of, draw_seed, five_axes, of_batch, one_batch_axis, per_head, scale_of

Results = dict[str, Tensor]  # "out", "lse" or "map", and "dquery", "dkey", "dvalue", "dmask", "dalpha", "dhead_weights"


@dataclass(frozen=True)
class Case:
    """One call of soft_masked_attention, or of attention_map when head_weights is given, with the gradients fed to its backward."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    alpha: float | Tensor | None
    dout: Tensor  # output's shape and dtype
    dlse: Tensor | None = None  # None: lse is not asked for
    head_weights: Tensor | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    rng: int = 0  # torch.manual_seed before the call: fixes the dropout bits
    key_padding_mask: Tensor | None = None
    enable_gqa: bool = False
    mask_logits: Tensor | None = None  # instead of mask

    def inputs(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by argument name."""
        value = () if self.is_map else ("value",)
        names = ("query", "key", *value, "mask", "mask_logits", "alpha", "head_weights")
        return {name: tensor for name in names if isinstance(tensor := getattr(self, name), Tensor)}

    def with_inputs(self, tensors: dict[str, Any]) -> Case:
        return replace(self, **tensors)

    @property
    def batch(self) -> Sequence[int]:
        """The sizes of the batch axes."""
        return self.query.shape[:-3]

    @property
    def is_map(self) -> bool:
        return self.head_weights is not None

    def problem(self) -> Problem:
        return self._call(None).problem

    def call(self) -> Call:
        """The case as a backend gets it."""
        return self._call(self.seed())

    def _call(self, seed: Tensor | None) -> Call:
        acc = acc_dtype(self.query.dtype)
        query, key, value = (one_batch_axis(tensor, 3) for tensor in (self.query, self.key, self.value))
        return make_call(
            query, key, None if self.is_map else value, self.mask_or_logits(),
            per_head(alpha_of(self.alpha, self.mask, self.mask_logits), query),
            one_batch_axis(self.key_padding_mask, 1), seed, None if self.head_weights is None else self.head_weights.to(acc).contiguous(),
            scale=scale_of(self.scale, query), dropout_p=self.dropout_p, mask_is_logits=self.mask_logits is not None,
        )  # fmt: skip

    def mask_or_logits(self) -> Tensor | None:
        """mask or mask_logits, whichever is given, in canonical form."""
        return five_axes(self.mask if self.mask_logits is None else self.mask_logits, self.batch)

    def seed(self) -> Tensor | None:
        """The dropout seed that the call will draw."""
        if self.dropout_p == 0:
            return None
        with forked_rng(self):
            return draw_seed(self.query.device)


def default_alpha(H: int) -> Tensor:
    """[32, 32, 16, 16, 8, 8, 4, 4] repeated to H heads, float32."""
    return torch.tensor([32.0, 32.0, 16.0, 16.0, 8.0, 8.0, 4.0, 4.0]).repeat(math.ceil(H / 8))[:H]


def blob_mask(B: int, Nq: int, Nk: int, generator: torch.Generator) -> Tensor:
    """A mask as real ones are, float32 (B, Nq, Nk): each query has a Gaussian bump on a square key grid, above 0.5 at a tenth of it."""
    side = math.ceil(math.sqrt(Nk))
    j = torch.arange(Nk)
    grid = torch.stack((j // side, j % side), -1).float()
    centre = torch.rand(B, Nq, 1, 2, generator=generator) * side
    r2 = (grid - centre).square().sum(-1)
    at_half = r2.kthvalue(max(1, round(0.1 * Nk)), -1, keepdim=True).values.clamp_min(0.25)
    return torch.exp(-math.log(2) * r2 / at_half)


def make_case(
    B: int,
    H: int,
    Nq: int,
    Nk: int,
    D: int,
    *,
    batch: Sequence[int] = (),
    Dv: int | None = None,
    Hkv: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: str | None = "uniform",
    mask_shape: Sequence[int] | None = None,
    mask_dtype: torch.dtype = torch.float32,
    with_lse: bool = False,
    as_map: bool = False,
    dropout_p: float = 0.0,
    padded: float = 0.0,
    device: str | torch.device = "cpu",
    rng: int = 0,
) -> Case:
    """A seeded case: q, k, v and dO are normal, alpha is default_alpha's.

    Args:
        B, H, Nq, Nk, D, Dv, Hkv: sizes; Dv is D and Hkv is H unless given.
        batch: sizes of several batch axes, whose product is B; mask_shape then has as many.
        mask: "uniform" in [0, 1], "blob" by blob_mask, "bias" (normal, and alpha is the float 1), "logits" (normal, times 3) in place of a
            mask, or None.
        mask_shape: (B, Nq, Nk) unless given; "blob" takes no other.
        with_lse: the call also returns lse, which has a gradient.
        as_map: a case of attention_map.
        padded: the share of keys that is padding, drawn at random.
        rng: the seed of all of this, and of dropout.
    """
    g = torch.Generator().manual_seed(rng)
    Hkv, Dv, acc = Hkv or H, Dv or D, acc_dtype(dtype)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=acc).to(device, to)

    m = None
    if mask == "blob":
        m = blob_mask(B, Nq, Nk, g).to(device, mask_dtype)
    elif mask == "uniform":
        m = torch.rand(*(mask_shape or (B, Nq, Nk)), generator=g, dtype=acc).to(device, mask_dtype)
    elif mask == "bias":
        m = normal(*(mask_shape or (B, Nq, Nk)), to=mask_dtype)
    elif mask == "logits":
        m = 3 * normal(*(mask_shape or (B, Nq, Nk)), to=mask_dtype)
    axes = tuple(batch) or (B,)
    return Case(
        query=of_batch(normal(B, H, Nq, D), axes),
        key=of_batch(normal(B, Hkv, Nk, D), axes),
        value=of_batch(normal(B, Hkv, Nk, Dv), axes),
        mask=None if mask == "logits" else m,
        mask_logits=m if mask == "logits" else None,
        alpha=None if m is None else 1.0 if mask == "bias" else default_alpha(H).to(device, acc),
        dout=of_batch(normal(B, Nq, Nk, to=acc) if as_map else normal(B, H, Nq, Dv), axes),
        dlse=of_batch(normal(B, H, Nq, to=acc), axes) if with_lse and not as_map else None,
        head_weights=normal(H, to=acc) if as_map else None,
        dropout_p=dropout_p,
        rng=rng,
        key_padding_mask=of_batch((torch.rand(B, Nk, generator=g) < padded).to(device), axes) if padded else None,
        enable_gqa=Hkv != H,
    )


def run(case: Case, backend: str | None = None, needs: Sequence[str] | None = None) -> Results:
    """The results of the public call on a case, with the gradients of the inputs named in needs, of all inputs unless given."""
    leaves = {name: t.detach().requires_grad_(needs is None or name in needs) for name, t in case.inputs().items()}
    c = case.with_inputs(leaves)
    common = dict(mask_logits=c.mask_logits, scale=c.scale, key_padding_mask=c.key_padding_mask, enable_gqa=c.enable_gqa, backend=backend)
    with forked_rng(c):
        if c.is_map:
            outputs = {"map": attention_map(c.query, c.key, c.mask, c.alpha, head_weights=c.head_weights, **common)}  # type: ignore[arg-type]
        else:
            with_lse = c.dlse is not None  # else lse is freed before the backward
            results = soft_masked_attention(  # type: ignore[call-overload]
                c.query, c.key, c.value, c.mask, c.alpha, dropout_p=c.dropout_p, return_lse=with_lse, **common
            )
            outputs = dict(zip(("out", "lse"), results, strict=True)) if with_lse else {"out": results}
    return with_gradients(outputs, leaves, c)


def with_gradients(outputs: Results, leaves: Results, case: Case) -> Results:
    """The outputs, detached, and the gradients of those leaves that require one, from the case's dout and dlse."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    if wanted:
        incoming = [case.dlse if name == "lse" else case.dout for name in outputs]
        grads = torch.autograd.grad(list(outputs.values()), list(wanted.values()), incoming, allow_unused=True)
        results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return results


@contextmanager
def forked_rng(case: Case) -> Iterator[None]:
    """Inside, torch's generators are seeded by the case; afterwards they are where the caller left them."""
    device = case.query.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(case.rng)
        yield
