"""The arguments of a public call brought into canonical form: the one form that the ops and every backend take.

The batch is one axis, and two of a mask's; alpha and head weights are one scalar a head in the accumulation dtype; query, key and value
have the autocast dtype; and what torch holds as a global setting is read once and travels as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@overload
def one_batch_axis(tensor: None, axes: int) -> None: ...


@overload
def one_batch_axis(tensor: Tensor, axes: int) -> Tensor: ...


def one_batch_axis(tensor: Tensor | None, axes: int) -> Tensor | None:
    """A tensor (*batch, ...) with `axes` axes behind its batch as (B, ...): a view, or a copy where its batch axes do not merge as one."""
    if tensor is None or tensor.dim() == axes + 1:
        return tensor
    return tensor.flatten(0, tensor.dim() - axes - 1)


def five_axes(mask: Tensor | None, batch: Sequence[int]) -> Tensor | None:
    """A mask (*batch|1, Nq|1, Nk) or (*batch|1, H|1, Nq|1, Nk) as a view (outer|1, inner|1, H|1, Nq|1, Nk); see two_batch_axes."""
    if mask is None:
        return None
    if mask.dim() == len(batch) + 2:
        mask = mask.unsqueeze(-3)
    return mask.unsqueeze(1) if len(batch) == 1 else two_batch_axes(mask, batch)


def two_batch_axes(mask: Tensor, batch: Sequence[int]) -> Tensor | None:
    """A mask (*batch|1, H|1, Nq|1, Nk) as a view (outer|1, inner|1, H|1, Nq|1, Nk), where outer * inner is the number of batch elements.

    Neighbouring axes become one where the mask is shared along all of them, or along none and its strides allow it. None where more than
    two are left.
    """
    sizes: list[int] = []
    strides: list[int] = []
    for elements, size, stride in zip(batch, mask.shape, mask.stride(), strict=False):
        if elements == 1:
            continue
        # Sizes are compared with 1 alone: compared with each other, a symbolic one would become a constant.
        are_shared = bool(sizes) and sizes[-1] == 1 and size == 1
        are_own = bool(sizes) and sizes[-1] != 1 and size != 1
        if are_shared or (are_own and strides[-1] == size * stride):
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return None
    return mask.reshape(*sizes, *(1,) * (2 - len(sizes)), *mask.shape[len(batch) :])


def of_batch(result: Tensor, batch: Sequence[int]) -> Tensor:
    """A result (B, ...) as (*batch, ...)."""
    return result if len(batch) == 1 else result.unflatten(0, tuple(batch))


def alpha_of(alpha: float | Tensor | None, mask: Tensor | None, mask_logits: Tensor | None) -> float | Tensor | None:
    """alpha, which is 1 where there is a mask and the caller gives none."""
    return 1.0 if alpha is None and (mask is not None or mask_logits is not None) else alpha


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
        return torch.full((query.shape[1],), float(scalars), dtype=acc, device=query.device)
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
    """Whether float32 products may be TF32. A call reads this once, and its backward uses forward's answer.

    Never on ROCm, whose chips mostly have no such products: Triton's compiler refuses them on gfx90a.
    """
    return query.device.type == "cuda" and torch.version.hip is None and query.dtype == torch.float32 and _torch_allows_tf32()


def _torch_allows_tf32() -> bool:
    # torch's allow_tf32 is not read here: it raises once the setting was made by its newer name, fp32_precision.
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


# Dynamo cannot trace the getter, but it guards on what the getter reads. This mark is what torch.compiler.assume_constant_result sets;
# calling that would import Dynamo, and Triton with it, wherever smattn is imported.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
