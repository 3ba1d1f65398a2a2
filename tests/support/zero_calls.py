"""The calls whose memory is watched: a table of them, and random ones of 32 to 512 MB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from hypothesis import assume
from hypothesis import strategies as st

from smattn.testing import Case


@dataclass(frozen=True)
class ZeroCall:
    """The sizes and options of a forward and backward of soft_masked_attention, or of its map, over tensors of zeros.

    mask says for each of the axes batch, head and query whether M has it or is of size 1 there; None means no mask. layout says how M
    lies in memory. Hkv is H unless given. rows is the size of a second batch axis, along which M is shared. threads is the number of CPU
    threads; None leaves it to torch.
    """

    B: int
    H: int
    Nq: int
    Nk: int
    D: int
    dtype: str = "float32"
    needs: tuple[str, ...] = ("query", "key", "value", "mask", "alpha")
    layout: str = "contiguous"
    options: bool = False  # dropout, padding and a gradient of lse
    Hkv: int | None = None
    mask: tuple[bool, bool, bool] | None = (True, False, True)
    threads: int | None = None
    as_map: bool = False
    logits: bool = False  # mask_logits in place of the mask
    rows: int | None = None

    def case(self, device: str = "cpu") -> Case:
        """The call's tensors. They are never written, so that a system that commits memory lazily commits none for them."""
        dtype, Hkv = getattr(torch, self.dtype), self.Hkv or self.H
        batch = (self.B,) if self.rows is None else (self.B, self.rows)

        def zeros(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        mask = None
        if self.mask is not None:
            B, H, Nq = (n if has else 1 for n, has in zip((self.B, self.H, self.Nq), self.mask, strict=True))
            mask = zeros(B, H, Nq, self.Nk) if H > 1 else laid_out(zeros, (B, Nq, self.Nk), self.layout)
            mask = mask if self.rows is None else mask[:, None]
        return Case(
            query=zeros(*batch, self.H, self.Nq, self.D),
            key=zeros(*batch, Hkv, self.Nk, self.D),
            value=zeros(*batch, Hkv, self.Nk, self.D),
            mask=None if self.logits else mask,
            mask_logits=mask if self.logits else None,
            alpha=None if mask is None else zeros(self.H, dtype=torch.float32),
            dout=zeros(self.B, self.Nq, self.Nk, dtype=torch.float32) if self.as_map else zeros(*batch, self.H, self.Nq, self.D),
            head_weights=zeros(self.H, dtype=torch.float32) if self.as_map else None,
            dlse=zeros(*batch, self.H, self.Nq, dtype=torch.float32) if self.options else None,
            dropout_p=0.1 if self.options else 0.0,
            key_padding_mask=zeros(*batch, self.Nk, dtype=torch.bool) if self.options else None,
            enable_gqa=Hkv != self.H,
        )

    def ceiling(self, results: dict[str, torch.Tensor]) -> float:
        """0.25 * (inputs + outputs + gradients) + 16 MiB."""
        case = self.case()
        inputs = [*case.inputs().values(), case.dout, case.dlse, case.key_padding_mask]
        given = sum(t.numel() * t.element_size() for t in inputs if t is not None)
        return 0.25 * (given + sum(t.nbytes for t in results.values())) + 16 * 2**20


LAYOUTS = ("queries and keys swapped", "every second key", "every second query", "one row for all queries", "one mask for the batch")


def laid_out(zeros: Callable[..., torch.Tensor], shape: tuple[int, int, int], layout: str) -> torch.Tensor:
    B, Nq, Nk = shape
    if layout == "queries and keys swapped":
        return zeros(B, Nk, Nq).mT
    if layout == "every second key":
        return zeros(B, Nq, 2 * Nk)[..., ::2]
    if layout == "every second query":
        return zeros(B, 2 * Nq, Nk)[:, ::2]
    if layout == "one row for all queries":
        return zeros(B, 1, Nk).expand(shape)
    if layout == "one mask for the batch":
        return zeros(1, Nq, Nk).expand(shape)
    return zeros(*shape)


MAP_GRADIENTS = ("query", "key", "mask", "alpha", "head_weights")
LOGITS_MAP_GRADIENTS = ("query", "key", "mask_logits", "alpha", "head_weights")
WITH_LOGITS = dict(logits=True, needs=("query", "key", "value", "mask_logits", "alpha"))
BIAS = ("query", "key", "value", "mask")
TRIANGLE = ZeroCall(2, 16, 64, 64, 16, needs=BIAS, rows=64, mask=(True, True, True))
CALLS = {
    "B1 H8 Nq1024 Nk16384 D32": ZeroCall(1, 8, 1024, 16384, 32),
    "queries100 at Nk 65536": ZeroCall(4, 8, 100, 65536, 32),
    "one image": ZeroCall(1, 8, 100, 65536, 32),
    "hodor_infer": ZeroCall(1, 8, 13, 7424, 32),
    "video64k": ZeroCall(1, 8, 128, 65536, 64),
    "half": ZeroCall(1, 8, 1024, 16384, 32, dtype="float16"),
    "half, few queries": ZeroCall(4, 8, 100, 65536, 32, dtype="bfloat16"),
    "dropout padding lse": ZeroCall(1, 8, 1024, 16384, 32, options=True),
    "dropout padding lse, few queries": ZeroCall(1, 8, 13, 65536, 32, options=True),
    "mask and alpha only": ZeroCall(1, 8, 1024, 16384, 32, needs=("mask", "alpha")),
    "wide": ZeroCall(1, 8, 129, 16384, 256),
    "half, many queries for few keys": ZeroCall(1, 8, 262144, 13, 64, dtype="float16"),
    "half, many queries for few keys, mask and alpha only": ZeroCall(1, 8, 262144, 13, 64, dtype="float16", needs=("mask", "alpha")),
    "half, many batches of few queries and fewer keys": ZeroCall(1024, 8, 100, 10, 64, dtype="bfloat16"),
    "half, no mask": ZeroCall(1024, 8, 72, 48, 64, dtype="float16", mask=None),
    "half, no mask, grouped heads": ZeroCall(256, 16, 96, 128, 64, dtype="float16", mask=None, Hkv=1),
    "half, no mask, one batch and kv head": ZeroCall(1, 256, 1024, 1100, 64, dtype="float16", mask=None, Hkv=1),
    "half, key-only mask, grouped heads": ZeroCall(2, 32, 130, 262144, 32, dtype="float16", mask=(True, False, False), Hkv=1),
    "half, key-only mask a head, grouped heads": ZeroCall(2, 32, 130, 262144, 32, dtype="float16", mask=(True, True, False), Hkv=1),
    "half, key-only mask a head for the batch, grouped": ZeroCall(
        4, 32, 130, 131072, 32, dtype="float16", mask=(False, True, False), Hkv=1
    ),
    "half, one mask for many batches": ZeroCall(512, 8, 64, 96, 64, dtype="float16", mask=(False, False, True)),
    "map": ZeroCall(1, 8, 1024, 16384, 32, needs=MAP_GRADIENTS, as_map=True),
    "map, a mask a head for the batch": ZeroCall(4, 16, 1024, 1024, 32, needs=MAP_GRADIENTS, as_map=True, mask=(False, True, True)),
    "half, map, few queries": ZeroCall(4, 8, 100, 65536, 32, dtype="bfloat16", needs=MAP_GRADIENTS, as_map=True),
    "half, map, many queries for few keys": ZeroCall(1, 8, 262144, 13, 64, dtype="float16", needs=MAP_GRADIENTS, as_map=True),
    "half, map, very many queries of narrow heads": ZeroCall(1, 8, 524288, 13, 16, dtype="float16", needs=MAP_GRADIENTS, as_map=True),
    "map, very many queries of narrow heads": ZeroCall(1, 8, 524288, 13, 16, needs=MAP_GRADIENTS, as_map=True),
    "very many queries of narrow heads": ZeroCall(1, 8, 524288, 8, 8, mask=(True, False, False)),
    "half, alpha only": ZeroCall(128, 8, 4096, 400, 16, dtype="float16", needs=("alpha",)),
    "logits": ZeroCall(1, 8, 1024, 16384, 32, **WITH_LOGITS),
    "half, logits, many queries for as many keys": ZeroCall(1, 8, 4096, 4096, 64, dtype="float16", **WITH_LOGITS),
    "half, logits, few queries": ZeroCall(4, 8, 100, 65536, 32, dtype="bfloat16", **WITH_LOGITS),
    "logits, map": ZeroCall(1, 8, 1024, 16384, 32, needs=LOGITS_MAP_GRADIENTS, as_map=True, logits=True),
    "half, one mask a head for many batches": ZeroCall(512, 8, 64, 96, 64, dtype="float16", mask=(False, True, True)),
    "half, one mask for very many heads": ZeroCall(1, 256, 384, 256, 160, dtype="bfloat16"),
    "half, one mask for very many heads, without its gradient": ZeroCall(1, 256, 384, 256, 160, dtype="bfloat16", needs=("query", "key")),
    "one head, one large mask for the batch": ZeroCall(8, 1, 4096, 4096, 32, needs=BIAS, mask=(False, False, True)),
    "triangle attention, B2 N64": TRIANGLE,
    "half, triangle attention of 384": ZeroCall(1, 4, 384, 384, 32, dtype="bfloat16", needs=BIAS, rows=384, mask=(True, True, True)),
}
MANY_THREADS = {
    "many heads": ZeroCall(1, 32, 64, 1024, 128, threads=8),
    "half, many heads": ZeroCall(1, 32, 64, 1024, 128, dtype="float16", threads=8),
    "bfloat16, many heads": ZeroCall(1, 32, 64, 1024, 128, dtype="bfloat16", threads=8),
    "many batches and heads": ZeroCall(8, 32, 64, 64, 128, threads=8),
    "wide": ZeroCall(16, 8, 64, 64, 256, threads=64),
    "double": ZeroCall(32, 8, 64, 64, 128, dtype="float64", threads=128),
    "self1k": ZeroCall(1, 8, 1024, 1024, 64, threads=128),
    "half, self1k": ZeroCall(1, 8, 1024, 1024, 64, dtype="float16", threads=64),
    "bfloat16, self1k": ZeroCall(1, 8, 1024, 1024, 64, dtype="bfloat16", threads=64),
    "many heads of as many queries": ZeroCall(1, 32, 1024, 1024, 64, threads=64),
    "bfloat16, vit_cls": ZeroCall(4, 12, 1045, 1045, 64, dtype="bfloat16", threads=64),
    "half, much kept, one mask row": ZeroCall(4, 16, 1045, 1045, 48, dtype="float16", mask=(False, False, False), threads=64),
}


@st.composite
def calls(draw: st.DrawFn) -> ZeroCall:
    """A call of 32 to 512 MB. The sizes are drawn by their order of magnitude, and heads have 16 elements or more."""
    size = st.floats(0, 18).map(lambda exponent: round(2**exponent))
    Hkv, group, dtype = draw(st.integers(1, 16)), draw(st.sampled_from([1, 1, 2, 8, 32])), draw(st.sampled_from(["float16", "float32"]))
    mask = draw(st.sampled_from([None, *product((False, True), repeat=3)]))
    names = ["query", "key", "value", *(["mask", "alpha"] if mask else [])]
    needs = draw(st.one_of(st.just(names), st.lists(st.sampled_from(names), min_size=1, unique=True)))
    D = draw(st.sampled_from([16, 32, 48, 64, 128, 256]))
    call = ZeroCall(
        draw(st.integers(1, 512)), Hkv * group, draw(size), draw(size), D,
        dtype=dtype, needs=tuple(needs), options=draw(st.booleans()), Hkv=Hkv, mask=mask,
    )  # fmt: skip
    elements = call.B * D * (call.H * call.Nq + Hkv * call.Nk)
    if mask:
        B, H, Nq = (n if has else 1 for n, has in zip((call.B, call.H, call.Nq), mask, strict=True))
        elements += B * H * Nq * call.Nk
    assume(2**24 < elements < 2**27)
    return call
