"""Formulas for torch.utils.flop_counter: `import smattn.flops`, and FlopCounterMode counts the operations.

Counted are the matrix products of reference.py (1), (3), (6), (7), two operations a multiply-add, as torch counts those of its own
attention; backward counts what it computes, so a gradient that nobody asked for costs nothing.

An import of its own: torch.utils.flop_counter imports Triton, which importing smattn does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def _product(query: Shape, key: Shape, head_size: int) -> int:
    """Of one matrix product between (B, H, Nq, Nk) and rows of head_size."""
    B, H, Nq, _ = query
    return 2 * B * H * Nq * key[2] * head_size


@register_flop_formula(torch.ops.smattn.forward)
def forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Q K^T, P V."""
    return _product(query, key, query[3] + value[3])


@register_flop_formula(torch.ops.smattn.backward)
def backward(dout: Shape, dlse: Shape | None, query: Shape, key: Shape, value: Shape, *rest: Any, **_: Any) -> int:
    """Q K^T again; dO V^T unless dV alone is wanted; then one product each for dQ, dK, dV. dM and dalpha have none of their own."""
    needs = rest[-2]
    of_scores = any(needs[i] for i in (0, 1, 3, 4))
    return _product(query, key, (1 + needs[0] + needs[1]) * query[3] + (of_scores + needs[2]) * value[3])


@register_flop_formula(torch.ops.smattn.attention_map)
def attention_map(query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Q K^T."""
    return _product(query, key, query[3])


@register_flop_formula(torch.ops.smattn.attention_map_backward)
def attention_map_backward(dmap: Shape, query: Shape, key: Shape, *rest: Any, **_: Any) -> int:
    """Q K^T again, then one product each for dQ, dK."""
    needs = rest[-2]
    return _product(query, key, (1 + needs[0] + needs[1]) * query[3])
