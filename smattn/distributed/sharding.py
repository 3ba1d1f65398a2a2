"""DTensors: the call on batches, heads or queries that are sharded over a mesh. Each rank computes its own.

Over these axes no rank needs another's results. An input without the sharded axis, or with size 1 along it, is replicated, and the
gradients that the ranks have for it are summed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..attention import soft_masked_attention

_AXES = {"query": "BHQD", "key": "BHKD", "value": "BHKV", "mask": "BHQK", "key_padding_mask": "BK", "alpha": "H"}


def sharded_attention(
    query: DTensor,
    key: DTensor,
    value: DTensor,
    mask: DTensor | None = None,
    alpha: float | DTensor | None = None,
    *,
    scale: float | None = None,
    key_padding_mask: DTensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """smattn.soft_masked_attention on DTensors that are sharded as query is: over batch, Shard(0), heads, Shard(1), or queries, Shard(2).

    Args:
        query: a DTensor (B, H, Nq, D), replicated or sharded over one of these axes on every mesh dimension.
        key, value, mask, alpha, key_padding_mask: DTensors on query's mesh, in shapes as in soft_masked_attention. Those that are not
            sharded as query is are redistributed. alpha may be a float.
        scale, enable_gqa, return_lse, backend: as in soft_masked_attention. There are no mask_logits, and no dropout, because its bits
            would repeat from shard to shard.

    Returns:
        A DTensor (B, H, Nq, Dv) placed as query is; with return_lse also (B, H, Nq). Gradients are placed as the inputs were.

    Raises:
        TypeError: an argument is not a DTensor.
        ValueError: query is placed otherwise, key's heads do not divide among the ranks, or as in soft_masked_attention.

    Communication: forward has none unless it redistributes an input; backward all-reduces the gradient of each replicated input.
    """
    given: dict[str, Any] = dict(query=query, key=key, value=value, mask=mask, alpha=alpha, key_padding_mask=key_padding_mask)
    for name, tensor in given.items():
        if not isinstance(tensor, DTensor) and (name in ("query", "key", "value") or isinstance(tensor, Tensor)):
            raise TypeError(f"{name}: expected a DTensor, got {type(tensor).__name__}")
    sharded = [_sharded_axis(query, dim) for dim in range(query.device_mesh.ndim)]
    ranks = math.prod(query.device_mesh.size(dim) for dim, axis in enumerate(sharded) if axis == "H")
    if key.shape[1] % ranks:
        raise ValueError(f"key: expected a number of heads that {ranks} ranks can share equally, got {key.shape[1]}")
    local: dict[str, Any] = {
        name: _local(name, tensor, query, sharded) if isinstance(tensor, DTensor) else tensor for name, tensor in given.items()
    }
    results: Any = soft_masked_attention(**local, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend)  # type: ignore[call-overload]
    B, H, Nq, _ = query.shape
    shapes = (B, H, Nq, value.shape[3]), (B, H, Nq)
    if not isinstance(results, tuple):
        return _global(results, query, shapes[0])
    return tuple(_global(result, query, shape) for result, shape in zip(results, shapes, strict=True))


def _sharded_axis(query: DTensor, dim: int) -> str:
    """The axis of query that mesh dimension `dim` shards; "" where it shards none."""
    placement = query.placements[dim]
    if placement.is_replicate():
        return ""
    if not isinstance(placement, Shard) or placement.dim > 2:
        raise ValueError(f"query: expected Replicate() or Shard of axis 0, 1 or 2 on every mesh dimension, got {query.placements}")
    return _AXES["query"][placement.dim]


def _local(name: str, tensor: DTensor, query: DTensor, sharded: list[str]) -> Tensor:
    """This rank's part of an argument. Its gradient comes back summed over the ranks that share it."""
    axes = "BQK" if name == "mask" and tensor.ndim == 3 else _AXES[name]
    placements: list[Placement] = []
    gradients: list[Placement] = []
    for axis in sharded:
        at = axes.find(axis) if axis and tensor.ndim else -1
        if at >= 0 and tensor.shape[at] > 1:
            placements.append(Shard(at))
            gradients.append(Shard(at))
        else:
            placements.append(Replicate())
            gradients.append(Partial() if axis else Replicate())
    return tensor.redistribute(query.device_mesh, placements).to_local(grad_placements=gradients)


def _global(result: Tensor, query: DTensor, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(result, query.device_mesh, query.placements, run_check=False, shape=torch.Size(shape), stride=stride)
