"""The named workloads that tests, benchmarks and tuning share, and the one place where a workload becomes a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import Case, make_case


@dataclass(frozen=True)
class Workload:
    """A named shape. Dv = D, and there are as many key heads as query heads.

    The mask is (B, Nq, Nk), and alpha default_alpha's. Where there are rows, a second batch axis, it is a bias of each head that the rows
    share, (B, 1, H, Nq, Nk) in float32, and alpha is 1.
    """

    name: str
    B: int
    H: int
    Nq: int
    Nk: int
    D: int
    what: str
    rows: int | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return (self.B,) if self.rows is None else (self.B, self.rows)

    @property
    def masks(self) -> tuple[str, ...]:
        """The kinds of mask that it is measured under, as `make_case` names them."""
        return ("uniform", "blob") if self.rows is None else ("bias",)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("hodor_train", 2, 8, 13, 9504, 32, "descriptors attend to stride-8 pixels, 480p training clip"),
        Workload("hodor_infer", 1, 8, 13, 7424, 32, "the same at inference"),
        Workload("queries100", 4, 8, 100, 16384, 32, "Mask2Former-like decoder, 128x128 features"),
        Workload("queries100_b1", 1, 8, 100, 16384, 32, "the same, one image"),
        Workload("self1k", 1, 8, 1024, 1024, 64, "self-attention, small"),
        Workload("video64k", 1, 8, 128, 65536, 64, "descriptors over a whole clip"),
        Workload("self4k", 4, 8, 4096, 4096, 64, "self-attention among pixels under a full mask"),
        Workload("self4k_d128", 4, 8, 4096, 4096, 128, "the same, wide heads"),
        Workload("vit_cls", 4, 12, 1045, 1045, 64, "20 class tokens + 1024 patches + 1 register, 512 px / 16"),
        Workload("vit_cls_d48", 4, 16, 1045, 1045, 48, "the head size of the token-masking paper's ViT"),
        Workload("pair128", 1, 4, 128, 128, 32, "triangle attention of AlphaFold-like models", rows=128),
        Workload("pair384", 1, 4, 384, 384, 32, "the same at a usual crop", rows=384),
        Workload("pair512", 1, 4, 512, 512, 32, "the same at a large crop", rows=512),
        Workload("windows", 64, 3, 49, 49, 32, "shifted windows of a Swin transformer, whose bias 8 images share", rows=8),
    )
}


def workload_case(
    workload: str | Workload, *, mask: str | None = None, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Case:
    """The seeded case of a workload, given by name or by itself. mask: one of its masks, the first unless given, in the inputs' dtype.

    A bias is float32.
    """
    w = WORKLOADS[workload] if isinstance(workload, str) else workload
    mask = mask or w.masks[0]
    if w.rows is None:
        return make_case(w.B, w.H, w.Nq, w.Nk, w.D, dtype=dtype, mask=mask, mask_dtype=dtype, device=device)
    shape = (w.B, 1, w.H, w.Nq, w.Nk)
    return make_case(w.B * w.rows, w.H, w.Nq, w.Nk, w.D, batch=w.batch, dtype=dtype, mask=mask, mask_shape=shape, device=device)
