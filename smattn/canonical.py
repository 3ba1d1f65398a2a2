"""The arguments of a public call brought into canonical form: the one form that the ops and every backend take.

A mask has four axes, alpha and head weights are one scalar a head in the accumulation dtype, query, key and value have the autocast dtype,
and what torch holds as a global setting is read once and travels as an argument.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .call import acc_dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of the first one's device, where autocast is on. What it does not cast stays as it is.

    This runs before validation, so an argument may be anything at all.
    """
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else ""
    if not kind or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def is_cast(tensor: Tensor) -> bool:
        if not isinstance(tensor, Tensor) or tensor.device.type != kind:
            return False
        return tensor.is_floating_point() and tensor.dtype != torch.float64

    return tuple(tensor.to(dtype) if is_cast(tensor) else tensor for tensor in tensors)


def four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask (B|1, Nq|1, Nk) or (B|1, H|1, Nq|1, Nk) as a 4-D view."""
    return mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask


@overload
def per_head(scalars: None, query: Tensor) -> None: ...


@overload
def per_head(scalars: float | Tensor, query: Tensor) -> Tensor: ...


def per_head(scalars: float | Tensor | None, query: Tensor) -> Tensor | None:
    """alpha or head_weights as (H,) in the accumulation dtype."""
    if scalars is None:
        return None
    acc = acc_dtype(query.dtype)
    if not isinstance(scalars, Tensor):
        return torch.full((query.shape[1],), scalars, dtype=acc, device=query.device)
    if scalars.dim() == 1 and scalars.dtype == acc:
        return scalars  # without a view or a cast, which autograd would have to undo
    return scalars.to(acc).expand(query.shape[1])


def scale_of(scale: float | None, query: Tensor) -> float:
    """The factor on Q K^T: 1/sqrt(D) unless the caller gives one."""
    return query.shape[3] ** -0.5 if scale is None else float(scale)


def draw_seed(device: torch.device) -> Tensor:
    """The dropout seed of one call, int64 (1,), from torch's generator. Compile, checkpointing and CUDA graphs replay a tensor's value."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def allow_tf32(query: Tensor) -> bool:
    """Whether float32 products may be TF32. A call reads this once, and its backward uses forward's answer."""
    return query.device.type == "cuda" and query.dtype == torch.float32 and _torch_allows_tf32()


def _torch_allows_tf32() -> bool:
    # torch's allow_tf32 is not read here: it raises once the setting was made by its newer name, fp32_precision.
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


# Dynamo cannot trace the getter, but it guards on what the getter reads. This mark is what torch.compiler.assume_constant_result sets;
# calling that would import Dynamo, and Triton with it, wherever smattn is imported.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
