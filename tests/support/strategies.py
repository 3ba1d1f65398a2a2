"""Random calls for hypothesis: sizes, dtypes, broadcasts, strides and every option, as cases of smattn.testing."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from smattn.testing import Case, make_case

HEAD_SIZES = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 96]))
MASK_DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
DROPOUT = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9])
PADDED = st.sampled_from([0.0, 0.0, 0.3, 0.95])


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, device: str, largest: int = 80, as_map: bool = False) -> Case:
    B, Hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    H, Nq, Nk = Hkv * group, draw(st.integers(1, largest // 4)), draw(st.integers(1, largest))
    mask = draw(st.sampled_from(["uniform", "uniform", "logits", "blob", None]))
    shape = (draw(st.sampled_from([1, B])), *draw(st.sampled_from([(), (1,), (H,)])), draw(st.sampled_from([1, Nq])), Nk)
    case = make_case(
        B, H, Nq, Nk, draw(HEAD_SIZES),
        Hkv=Hkv, Dv=draw(HEAD_SIZES), dtype=dtype, mask=mask, mask_shape=shape, mask_dtype=draw(MASK_DTYPES),
        with_lse=draw(st.booleans()), as_map=as_map, dropout_p=0.0 if as_map else draw(DROPOUT), padded=draw(PADDED),
        device=device, rng=draw(st.integers(0, 2**20)),
    )  # fmt: skip
    case = replace(
        case,
        query=draw(restrided(case.query)),
        key=draw(restrided(case.key)),
        value=draw(restrided(case.value)),
        dout=draw(restrided(case.dout)),
        scale=draw(st.sampled_from([None, None, 0.3, -0.5, 0.0])),
    )
    if case.alpha is None:
        return case
    soft = "mask" if case.mask_logits is None else "mask_logits"
    return replace(case, **{soft: draw(restrided(getattr(case, soft), expand=True))}, alpha=draw(st.sampled_from(alphas(case.alpha))))


def alphas(alpha: Tensor) -> list[float | Tensor]:
    """Alpha in each of its forms, (H,), () or a float, and of either sign."""
    return [alpha, -alpha, alpha[0] / 3, alpha[::2].repeat_interleave(2)[: len(alpha)], 2.5]


@st.composite
def restrided(draw: st.DrawFn, tensor: Tensor, expand: bool = False) -> Tensor:
    """The same values in a layout drawn at random. With `expand` they may be one row that stride 0 repeats."""
    layout = draw(st.sampled_from(["as it is", "axes permuted", "every second element", "inside a larger one", *["expanded"] * expand]))
    if layout == "axes permuted":
        axes = draw(st.permutations(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute([axes.index(i) for i in range(tensor.dim())])
    if layout == "every second element":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
    if layout == "inside a larger one":
        return torch.nn.functional.pad(tensor, (1, 2, 3, 1), value=float("nan"))[..., 3:-1, 1:-2]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor
