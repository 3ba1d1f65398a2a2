"""Formulas for torch.utils.flop_counter: `import smattn.flops`, and FlopCounterMode counts the operations.

The matrix products of reference.py (1), (3), (6), (7) count, two operations for each multiply-add, as torch counts those of its own
attention. Backward counts what it computes, so a gradient that nobody asked for costs nothing.

This is an import of its own because torch.utils.flop_counter imports Triton, which importing smattn does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .call import Needs
from .ops import BackwardArguments, ForwardArguments, MapArguments, MapBackwardArguments

Shape = Sequence[int]


def _product(query: Shape, key: Shape, head_size: int) -> int:
    """Operations of one matrix product between (B, H, Nq, Nk) and rows of head_size."""
    B, H, Nq, _ = query
    return 2 * B * H * Nq * key[2] * head_size


# Each formula gets the op's arguments with shapes in place of tensors.


@register_flop_formula(torch.ops.smattn.forward)
def forward(*arguments: Any, **_: Any) -> int:
    """Q K^T, P V."""
    a: Any = ForwardArguments(*arguments)
    return _product(a.query, a.key, a.query[3] + a.value[3])


@register_flop_formula(torch.ops.smattn.backward)
def backward(*arguments: Any, **_: Any) -> int:
    """Q K^T again; dO V^T unless dV alone is wanted; then one product each for dQ, dK, dV. dM and dalpha have none of their own."""
    a: Any = BackwardArguments(*arguments)
    needs = Needs(*a.needs)
    of_scores = needs.query or needs.key or needs.mask or needs.alpha
    return _product(a.query, a.key, (1 + needs.query + needs.key) * a.query[3] + (of_scores + needs.value) * a.value[3])


@register_flop_formula(torch.ops.smattn.attention_map)
def attention_map(*arguments: Any, **_: Any) -> int:
    """Q K^T."""
    a: Any = MapArguments(*arguments)
    return _product(a.query, a.key, a.query[3])


@register_flop_formula(torch.ops.smattn.attention_map_backward)
def attention_map_backward(*arguments: Any, **_: Any) -> int:
    """Q K^T again, then one product each for dQ, dK."""
    a: Any = MapBackwardArguments(*arguments)
    needs = Needs(*a.needs)
    return _product(a.query, a.key, (1 + needs.query + needs.key) * a.query[3])
